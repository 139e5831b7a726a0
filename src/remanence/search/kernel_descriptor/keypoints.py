"""Key points by OpenCV's SIFT detector, and the orientation of patches."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from remanence.errors import InputError
from remanence.search.kernel_descriptor.grey import grey_image

BINS = 36
TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # that smooth the histogram
WINDOW = 0.3  # sigma of a pixel's weight in half sides: SIFT's 1.5 scales in a frame of 5
PIXELS = 2**21  # of patches at a time


class Keypoints(NamedTuple):
    """N key points, the strongest first; float32 on the CPU.

    Attributes:
        xy: Centres (N, 2), pixels; pixel centres are at whole numbers.
        scale: Sigma of the detector (N,), pixels.
        angle: Orientations (N,), radians from 0 to 2 pi, clockwise as displayed; 0 if upright.
        response: Contrast of the extremum (N,).
    """

    xy: Tensor
    scale: Tensor
    angle: Tensor
    response: Tensor


def detect_keypoints(image: Tensor, most: int = 2000, *, upright: bool = False) -> Keypoints:
    """Find the strongest extrema of differences of Gaussians (Lowe, IJCV 2004).

    OpenCV's `size` is a diameter, 2 sigma; sigma is returned. A difference of two Gaussians, sigma
    and 2^(1/3) sigma, is strongest on a Gaussian blob that is 2^(1/6) sigma wide. A point with
    several orientations comes several times.

    Args:
        image: (H, W), (1, H, W) or (3, H, W): uint8, or floating in [0, 1]; rounded to 8 bits.
        most: Key points that are kept.
        upright: Leave the orientations out, and the repeated points with them.

    Returns:
        The key points: by falling response, then by y, x, scale and angle.

    Raises:
        InputError: The image is of another shape or type, or `most` is below 1.
    """
    if most < 1:
        raise InputError(f"at most {most} key points: give 1 or more, 2000 say")
    levels = (255 * grey_image(image).detach()).round().clamp(0, 255)
    # Without the precise upscale, OpenCV's points lie a quarter of a pixel beside the place.
    detector = cv2.SIFT.create(nfeatures=0, enable_precise_upscale=True)
    found = detector.detect(levels.to("cpu", torch.uint8).numpy(), None)
    rows = np.array(
        [(*k.pt, k.size / 2, 0.0 if upright else k.angle, k.response) for k in found],
        dtype=np.float32,
    ).reshape(-1, 5)
    rows = np.unique(rows, axis=0)
    x, y, scale, angle, response = rows.T
    rows = rows[np.lexsort((angle, scale, x, y, -response))][:most]
    table = torch.from_numpy(rows)
    return Keypoints(table[:, :2], table[:, 2], table[:, 3].deg2rad(), table[:, 4])


def dominant_orientation(patches: Tensor) -> Tensor:
    """Return the direction in which most of a patch grows brighter (Lowe, IJCV 2004, section 5).

    Gradient magnitudes, weighted by a Gaussian around the centre, are counted in 36 smoothed bins
    of their direction; a parabola through the highest and its neighbours gives the angle. For
    upright patches of key points it is the angle that `frames_from_keypoints` takes.

    Args:
        patches: Grey patches (N, s, s), floating, s at least 3.

    Returns:
        Angles (N,), radians from 0 to 2 pi, clockwise as displayed; 0 for a flat patch.

    Raises:
        InputError: The shape or type is another one.
    """
    if patches.ndim != 3 or patches.shape[1] != patches.shape[2] or patches.shape[1] < 3:
        raise InputError(
            f"patches of shape {tuple(patches.shape)} to orient: give (N, s, s), s at least 3"
        )
    if not patches.is_floating_point():
        raise InputError(f"patches of {patches.dtype} to orient: give floating values in [0, 1]")
    size = patches.shape[1]
    # The outermost pixels have no central difference.
    steps = (2 * torch.arange(1, size - 1, device=patches.device, dtype=patches.dtype) + 1) / size
    profile = torch.exp(-0.5 * ((steps - 1) / WINDOW) ** 2)
    window = profile[:, None] * profile
    chunks = torch.split(patches, max(1, PIXELS // size**2))
    return torch.cat([_peak(_histogram(chunk, window)) for chunk in chunks])


def _histogram(patches: Tensor, window: Tensor) -> Tensor:
    """Weights of 36 directions (N, 36), smoothed around the circle."""
    gx = patches[:, 1:-1, 2:] - patches[:, 1:-1, :-2]
    gy = patches[:, 2:, 1:-1] - patches[:, :-2, 1:-1]
    weight = (torch.hypot(gx, gy) * window).flatten(1)
    place = (torch.atan2(gy, gx) * (BINS / (2 * math.pi))).flatten(1)
    low = place.floor()
    histogram = patches.new_zeros(len(patches), BINS)
    # Shared between the two nearest bins, so that a small turn moves little.
    histogram.scatter_add_(1, low.long() % BINS, weight * (1 - (place - low)))
    histogram.scatter_add_(1, (low.long() + 1) % BINS, weight * (place - low))
    around = pad(histogram, (2, 2), mode="circular")
    return sum(
        (tap * around[:, k : k + BINS] for k, tap in enumerate(TAPS)),
        start=torch.zeros_like(histogram),
    )


def _peak(histogram: Tensor) -> Tensor:
    """Angle of the highest bin (N,), by a parabola through it and its neighbours."""
    best = histogram.argmax(dim=1)
    before, at, after = (
        histogram.gather(1, ((best + step) % BINS)[:, None]).squeeze(1) for step in (-1, 0, 1)
    )
    bend = before - 2 * at + after
    offset = torch.where(bend < 0, 0.5 * (before - after) / bend, 0)
    return ((best + offset) * (2 * math.pi / BINS)) % (2 * math.pi)
