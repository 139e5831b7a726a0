"""Affine frames: where in an image a patch lies (arXiv 1811.11147, sections 5 and 6).

A frame (2, 3) = [A | c] takes patch coordinates u in [-1, 1]^2 to pixels x = A u + c. Pixel centres
are at whole numbers, x to the right and y down, so that an image of width W spans -0.5 to W - 0.5.
Angles turn from x to y: clockwise as displayed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAGNIFICATION = 5.0  # half sides of a patch over a key point's sigma, as HPatches was cut

Level = Literal["easy", "medium", "hard"]
# Times the noise of the level "medium". A circle overlaps its noisy copy (intersection over union)
# by 0.92, 0.83 and 0.70 in the median; the levels are our own.
NOISE: dict[Level, float] = {"easy": 0.5, "medium": 1.0, "hard": 2.0}
ROTATION = math.radians(10)
LOG_SCALE = 0.12
SHIFT = 0.06  # in half sides


def frames_from_keypoints(
    xy: Tensor,
    scale: Tensor,
    angle: Tensor | None = None,
    magnification: float = MAGNIFICATION,
) -> Tensor:
    """Return square frames around key points.

    Args:
        xy: Centres (N, 2), pixels.
        scale: Sigma of the detector (N,), pixels, above 0.
        angle: Orientations (N,), radians; None for upright frames.
        magnification: Half the side of a frame over its sigma.

    Returns:
        [magnification sigma R(angle) | xy] (N, 2, 3), in the type of `xy`.

    Raises:
        InputError: The shapes do not fit, or a scale or the magnification is not above 0.
    """
    count = len(xy)
    shapes = [tuple(v.shape) for v in (xy, scale, *([] if angle is None else [angle]))]
    if shapes[0] != (count, 2) or any(shape != (count,) for shape in shapes[1:]):
        raise InputError(
            f"key points of shapes {', '.join(map(str, shapes))}: give (N, 2) centres, "
            "N scales and N angles"
        )
    if not magnification > 0 or bool((scale <= 0).any()):
        raise InputError("a key point without extent: give scales and a magnification above 0")
    angle = torch.zeros_like(xy[:, 0]) if angle is None else angle.to(xy)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)
    shape = magnification * scale.to(xy)[:, None, None] * turn
    return torch.cat([shape, xy[:, :, None]], dim=2)


def frames_from_opencv(
    keypoints: Sequence[Any], magnification: float = MAGNIFICATION, *, upright: bool = False
) -> Tensor:
    """Return square frames around `cv2.KeyPoint`s.

    Args:
        keypoints: N of them. OpenCV's `size` is a diameter and, as SIFT fills it in, twice sigma:
            sigma = size / 2 is read. Other detectors set it otherwise (ORB, say, to the side of its
            own patch, 31 pixels at full size): choose the magnification for what yours means. Its
            `angle` is in degrees, clockwise; -1 stands for none.
        magnification: Half the side of a frame over its sigma.
        upright: Leave the angles out.

    Returns:
        Frames (N, 2, 3), float32.

    Raises:
        InputError: A key point has no size.
    """
    rows = torch.tensor([(*k.pt, k.size, k.angle) for k in keypoints]).reshape(-1, 4)
    angle = torch.where(rows[:, 3] < 0, 0, rows[:, 3]).deg2rad()
    return frames_from_keypoints(
        rows[:, :2], rows[:, 2] / 2, None if upright else angle, magnification
    )


def frames_from_lafs(lafs: Tensor, magnification: float = 1.0) -> Tensor:
    """Return kornia's local affine frames as frames.

    Both conventions agree since kornia 0.9: pixel centres at whole numbers, [-1, 1]^2 to pixels.

    Args:
        lafs: (N, 2, 3), or (1, N, 2, 3) as of one image.
        magnification: Factor of the extent. Kornia's detectors have applied one, `mr_size`.

    Returns:
        Frames (N, 2, 3), in the type of the LAFs.

    Raises:
        InputError: The shape is another one.
    """
    if lafs.ndim == 4 and len(lafs) == 1:
        lafs = lafs[0]
    lafs = checked_frames(lafs)
    return torch.cat([magnification * lafs[:, :, :2], lafs[:, :, 2:]], dim=2)


def frames_through_homography(frames: Tensor, homography: Tensor | NDArray[Any]) -> Tensor:
    """Carry frames from one image of a plane to another.

    The centre goes to H(c) exactly. The shape follows the Jacobian there, A' = J A for
    J = (H[:2, :2] - H(c) H[2, :2]) / w and w = H[2] (c, 1).

    Args:
        frames: (N, 2, 3), pixels of the first image.
        homography: H (3, 3), from pixels of the first to pixels of the second image, any scale.

    Returns:
        Frames in the second image, in the type of the given ones; NaN for a centre on the line
        that H sends to infinity.

    Raises:
        InputError: The shapes are others.
    """
    frames = checked_frames(frames)
    H = torch.as_tensor(homography).to(frames.device, torch.float64)
    if H.shape != (3, 3):
        raise InputError(f"a homography of shape {tuple(H.shape)}: give (3, 3)")
    double = frames.double()
    A, centre = double[:, :, :2], double[:, :, 2]
    mapped = centre @ H[:, :2].mT + H[:, 2]  # (N, 3)
    w = torch.where(mapped[:, 2:] == 0, torch.nan, mapped[:, 2:])
    target = mapped[:, :2] / w
    J = (H[:2, :2] - target[:, :, None] * H[2, :2]) / w[:, :, None]
    return torch.cat([J @ A, target[:, :, None]], dim=2).to(frames.dtype)


def frames_inside(frames: Tensor, height: int, width: int) -> Tensor:
    """Tell which frames have all four corners inside an image.

    Args:
        frames: (N, 2, 3), pixels.
        height: H of the image, which spans y from -0.5 to H - 0.5.
        width: W of the image, which spans x from -0.5 to W - 0.5.

    Returns:
        (N,), bool; False for a frame with NaN.

    Raises:
        InputError: The shape is another one.
    """
    frames = checked_frames(frames)
    # |x - c| is at most the sum of a row of |A|, and reaches it at a corner.
    reach, centre = frames[:, :, :2].abs().sum(2), frames[:, :, 2]
    end = torch.tensor([width, height], dtype=frames.dtype, device=frames.device) - 0.5
    return ((centre - reach >= -0.5) & (centre + reach <= end)).all(dim=1)


def jitter_frames(frames: Tensor, level: Level = "medium", seed: int = 0) -> Tensor:
    """Move frames as an imprecise detector would.

    Medium noise is a rotation N(0, 10 degrees), a log scale N(0, 0.12) along each axis of the patch
    and a shift N(0, 0.06) of the half side along each; easy is half and hard twice as much.

    Args:
        frames: (N, 2, 3).
        level: easy, medium or hard.
        seed: Of the noise, which is the same on all devices.

    Returns:
        Frames of the same shape and type.

    Raises:
        InputError: There is no such level, or the shape is another one.
    """
    if level not in NOISE:
        raise InputError(f"noise {level!r} of frames: give one of {', '.join(NOISE)}")
    frames = checked_frames(frames)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(frames), 5, generator=generator, dtype=torch.float64).to(frames.device)
    noise = NOISE[level] * noise
    cos, sin = (ROTATION * noise[:, 0]).cos(), (ROTATION * noise[:, 0]).sin()
    turn = torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)
    moved = turn * (LOG_SCALE * noise[:, None, 1:3]).exp()  # R diag(scales)
    A = frames[:, :, :2].double()
    centre = frames[:, :, 2:].double() + A @ (SHIFT * noise[:, 3:, None])
    return torch.cat([A @ moved, centre], dim=2).to(frames.dtype)


def checked_frames(frames: Tensor) -> Tensor:
    """Return frames, or refuse what are none.

    Args:
        frames: What should be (N, 2, 3), floating.

    Returns:
        The frames themselves.

    Raises:
        InputError: They are of another shape or type.
    """
    if frames.ndim != 3 or frames.shape[1:] != (2, 3) or not frames.is_floating_point():
        raise InputError(
            f"frames of shape {tuple(frames.shape)} and {frames.dtype}: give (N, 2, 3), floating"
        )
    return frames
