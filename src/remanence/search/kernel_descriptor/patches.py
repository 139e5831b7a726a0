"""Patches cut from an image through affine frames (arXiv 1811.11147, sections 5 and 6).

A patch that shows a large frame takes few samples of it: sampled from the image itself, it would
hold moire. So each is sampled from that level of a Gaussian pyramid where samples lie about one
pixel apart.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import affine_grid, grid_sample

from remanence.errors import InputError
from remanence.search.kernel_descriptor.frames import checked_frames, frames_inside
from remanence.search.kernel_descriptor.grey import grey_image

if TYPE_CHECKING:
    from torch import Tensor

PIXELS = 2**20  # of patches at a time, whose sampling points take 8 MB in float32


class Patches(NamedTuple):
    """Patches of N frames.

    Attributes:
        patches: Grey values in [0, 1] (N, s, s), float32, or float64 where the image was; rows
            along the frame's y. Beyond the image, its border is repeated; a frame that is not
            finite gives zeros.
        inside: (N,), bool: the frame's corners are inside the image.
    """

    patches: Tensor
    inside: Tensor


def extract_patches(
    image: Tensor, frames: Tensor, size: int = 32, *, antialias: bool = True
) -> Patches:
    """Cut patches.

    Sample k of s along an axis is at (2k + 1) / s - 1 of the frame's [-1, 1]: a patch shows the
    whole square. Values are bilinear in the level L = round(log2(2 sqrt|det A| / s)) of the
    pyramid, at least 0. It is the frame's area that decides, so that a frame stretched by a ratio r
    is sampled too coarsely by sqrt(r) along its long axis, and blurred by as much along its short.

    Args:
        image: (H, W), (1, H, W) or (3, H, W): uint8, or floating in [0, 1].
        frames: (N, 2, 3), pixels; moved to the image's device.
        size: Side s of the patches, pixels.
        antialias: Use the pyramid. Without it all patches are sampled from the image.

    Returns:
        The patches, on the image's device.

    Raises:
        InputError: The image or the frames are of another shape or type, or the size is below 1.
    """
    if size < 1:
        raise InputError(f"patches of {size} pixels a side: give 1 or more, 32 say")
    level_image = grey_image(image)
    height, width = level_image.shape
    # In float64, in which a place in a large image is far finer than a sample.
    frames = checked_frames(frames).to(level_image.device, torch.float64)
    levels = _levels(frames, size, min(height, width)) if antialias else torch.zeros(len(frames))
    levels = levels.to(frames.device)
    finite = frames.isfinite().flatten(1).all(dim=1)
    patches = level_image.new_zeros(len(frames), size, size)
    for level in range(int(levels.max()) + 1 if len(frames) else 0):
        if level:
            level_image = halve(level_image)
        chosen = torch.nonzero(finite & (levels == level)).squeeze(1)
        if len(chosen):
            for chunk in torch.split(chosen, max(1, PIXELS // size**2)):
                patches[chunk] = _sample(level_image, frames[chunk], level, size)
    return Patches(patches, frames_inside(frames, height, width))


def halve(image: Tensor) -> Tensor:
    """Return the next level of the pyramid.

    The taps (1, 3, 3, 1) / 8 add a variance of 3/4 pixels, which takes a blur of sigma 1/2 to 1
    and so back to 1/2 of the new pixels. They lie between two pixels: the new pixel i is at
    2 i + 1/2, and x_L = (x + 1/2) / 2^L - 1/2 after L levels, without a drift.

    Args:
        image: (H, W), floating; beyond it, its border is repeated.

    Returns:
        (ceil(H / 2), ceil(W / 2)).
    """
    for axis in (0, 1):
        length = image.shape[axis]
        start = torch.arange(0, length, 2, device=image.device)
        before, first, second, after = (
            image.index_select(axis, (start + step).clamp(0, length - 1)) for step in (-1, 0, 1, 2)
        )
        image = (before + 3 * (first + second) + after) / 8
    return image


def _levels(frames: Tensor, size: int, side: int) -> Tensor:
    """The level of each frame (N,), float64; 0 for one that is not finite."""
    area: Tensor = torch.linalg.det(frames[:, :, :2].nan_to_num(0, 0, 0)).abs()
    return (2 * area.sqrt() / size).log2().round().clamp(0, math.floor(math.log2(side)))


def _sample(image: Tensor, frames: Tensor, level: int, size: int) -> Tensor:
    """Bilinear samples of one level (n, s, s)."""
    height, width = image.shape
    # Where the level's own pixels span [-1, 1], x is at (2 x_L + 1) / W_L - 1.
    span = 2.0**level * torch.tensor([[width], [height]], device=image.device, dtype=frames.dtype)
    shape, centre = 2 * frames[:, :, :2] / span, (2 * frames[:, :, 2:] + 1) / span - 1
    count = len(frames)
    grid = affine_grid(
        torch.cat([shape, centre], dim=2), [count, 1, size, size], align_corners=False
    )
    grid = grid.reshape(1, count * size, size, 2).to(image)
    sampled = grid_sample(image[None, None], grid, padding_mode="border", align_corners=False)
    return sampled.reshape(count, size, size)
