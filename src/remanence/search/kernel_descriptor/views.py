"""Matching patches without labelled data: one image, seen through known homographies."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial import KDTree
from torch import Tensor

from remanence.errors import InputError
from remanence.search.kernel_descriptor.frames import (
    Level,
    frames_from_keypoints,
    frames_inside,
    frames_through_homography,
    jitter_frames,
)
from remanence.search.kernel_descriptor.grey import grey_image
from remanence.search.kernel_descriptor.keypoints import Keypoints, detect_keypoints
from remanence.search.kernel_descriptor.patches import extract_patches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

CORNER_SHIFT = 0.12  # of the sides, largest
GAMMAS = (1.0, 0.7, 1.4, 0.8, 1.25)
BLURS = (0.0, 1.5, 0.0, 1.5, 0.0)  # sigma in pixels
NOISE = 0.02
SMALLEST = 2.0  # sigma of a key point; a frame of 5 sigma then spans 20 pixels
SPACING = 1.5  # sigmas between key points of a similar scale
SIMILAR = 1.5  # factor between similar scales


class View(NamedTuple):
    """One more image of a flat scene.

    Attributes:
        image: (H, W), as `extract_patches` takes it.
        homography: From pixels of the reference to pixels of this image (3, 3), float64.
    """

    image: Tensor
    homography: Tensor


class PatchGroups(NamedTuple):
    """N places, seen in a reference image and in V views.

    Attributes:
        patches: (V + 1, N, s, s), float32; those of the reference first.
        valid: The patch lies inside its image (V + 1, N), bool; all True for the reference.
    """

    patches: Tensor
    valid: Tensor


def synthetic_views(image: Tensor, *, views: int = 5, seed: int = 0) -> list[View]:
    """Make views of an image.

    Each corner moves by up to 12 % of the sides; then come blur (sigma 1.5 on the second and fourth
    of five), a gamma of 1, 0.7, 1.4, 0.8 or 1.25, and noise of 0.02. Later views take their turn
    again.

    Args:
        image: (H, W), (1, H, W) or (3, H, W): uint8, or floating in [0, 1].
        views: V.
        seed: Of corners and noise.

    Returns:
        V views of the size of the image, grey in [0, 1]. Beyond the image, it is mirrored.

    Raises:
        InputError: The image has another shape or type, or there are no views.
    """
    if views < 1:
        raise InputError(f"{views} views: give at least 1")
    grey = grey_image(image).detach().cpu().float().numpy()
    height, width = grey.shape
    generator = np.random.default_rng(seed)
    made = []
    for view in range(views):
        homography = _random_homography(height, width, generator)
        warped = cv2.warpPerspective(
            grey, homography, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
        )
        kind = view % len(GAMMAS)
        blurred = gaussian_filter(warped, BLURS[kind]) if BLURS[kind] else warped
        seen = np.clip(blurred, 0, 1) ** GAMMAS[kind] + generator.normal(0, NOISE, grey.shape)
        shown = torch.from_numpy(np.clip(seen, 0, 1).astype(np.float32))
        made.append(View(shown, torch.from_numpy(homography)))
    return made


def patch_pairs(
    image: Tensor,
    views: Sequence[View],
    *,
    keypoints: Keypoints | None = None,
    most: int = 500,
    size: int = 32,
    jitter: Level | None = "medium",
    seed: int = 0,
) -> PatchGroups:
    """Cut the same places out of an image and its views, as a detector would have found them.

    Upright frames of key points of the reference go through the homographies, and there get a
    detector's noise. Key points too near to a stronger one are left out, so that other places are
    other things.

    Args:
        image: The reference, (H, W), (1, H, W) or (3, H, W): uint8, or floating in [0, 1].
        views: Others of the same flat scene, from `synthetic_views` say.
        keypoints: Of the reference, the strongest first; None finds them by `detect_keypoints`,
            with a sigma of at least 2.
        most: Places N at most, the strongest.
        size: Side s of the patches, pixels.
        jitter: Noise of the frames in the views; None for none.
        seed: Of that noise.

    Returns:
        The patches. Row i shows the same place in all of them.

    Raises:
        InputError: The image or a view is not one, or a setting is out of range.
    """
    if most < 1:
        raise InputError(f"at most {most} places: give 1 or more, 500 say")
    grey = grey_image(image).detach()
    height, width = grey.shape
    if keypoints is None:
        keypoints = detect_keypoints(grey, height * width, upright=True)
        keypoints = Keypoints(*(values[keypoints.scale >= SMALLEST] for values in keypoints))
    chosen = spaced(keypoints)
    frames = frames_from_keypoints(keypoints.xy[chosen].double(), keypoints.scale[chosen].double())
    frames = frames[frames_inside(frames, height, width)][:most]
    cut = [extract_patches(grey, frames, size)]
    for number, view in enumerate(views):
        there = frames_through_homography(frames, view.homography)
        if jitter is not None:
            # A detector errs anew in each image.
            there = jitter_frames(there, jitter, seed=seed * len(views) + number)
        cut.append(extract_patches(view.image, there, size))
    patches = torch.stack([one.patches.float() for one in cut])
    return PatchGroups(patches, torch.stack([one.inside for one in cut]))


def spaced(keypoints: Keypoints) -> Tensor:
    """Choose key points that show different things.

    Args:
        keypoints: The strongest first, as `detect_keypoints` gives them.

    Returns:
        Indices, ascending, of those that lie at least 1.5 sigma (the larger of both) from each
        stronger chosen one whose scale differs by less than a factor of 1.5.
    """
    xy, scale = keypoints.xy.double().numpy(), keypoints.scale.double().numpy()
    free = np.ones(len(xy), dtype=bool)
    chosen: list[int] = []
    if len(xy) == 0:
        return torch.tensor(chosen, dtype=torch.int64)
    # A point of a similar scale keeps others at most this far away.
    around = KDTree(xy).query_ball_point(xy, SPACING * SIMILAR * scale)
    for i, beside in enumerate(around):
        if not free[i]:
            continue
        chosen.append(i)
        ratio = scale[beside] / scale[i]
        near = np.hypot(*(xy[beside] - xy[i]).T) < SPACING * scale[i] * np.maximum(ratio, 1)
        similar = np.maximum(ratio, 1 / ratio) < SIMILAR
        free[np.asarray(beside)[near & similar]] = False
    return torch.tensor(chosen, dtype=torch.int64)


def _random_homography(
    height: int, width: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]]) - 0.5
    shift = generator.uniform(-CORNER_SHIFT, CORNER_SHIFT, (4, 2)) * (width, height)
    found: NDArray[np.float64] = cv2.getPerspectiveTransform(
        corners.astype(np.float32), (corners + shift).astype(np.float32)
    )
    return found
