"""Smoothed gradients of patches as harmonics of their direction (arXiv 1811.11147)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor

LAST_OF_FIVE = 65  # side of the largest patch that 5 x 5 taps blur
FAINT = 1e-24  # squared gradient below which a weight fades faster, so that derivatives stay finite


def smooth(images: Tensor, size: int | None = None) -> Tensor:
    """Blur patches by a Gaussian of sigma = 1.4 s / 64 pixels, with replicated borders.

    The window has 5 x 5 taps up to s = 65, the largest patches that the published codes were used
    with; above it reaches 3 sigma.

    Args:
        images: (N, h, w), float32 or float64, N at least 1.
        size: s; by default h, as of patches (N, s, s).

    Returns:
        The same shape and type. What is constant stays so to the last bit.
    """
    height, width = images.shape[-2:]
    size = size or height
    sigma = 1.4 * size / 64
    radius = 2 if size <= LAST_OF_FIVE else math.ceil(3 * sigma)
    taps = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(radius + 1)]
    total = taps[0] + 2 * math.fsum(taps[1:])
    image = pad(images.unsqueeze(1), (radius,) * 4, mode="replicate").squeeze(1)
    for axis, length in ((1, height), (2, width)):
        # A sum of shifted copies, not a convolution: every pixel is rounded alike, so that a flat
        # region has no gradient, where rounding noise would give it a weight and a direction.
        blurred = taps[0] / total * image.narrow(axis, radius, length)
        for step in range(1, radius + 1):
            both = image.narrow(axis, radius - step, length) + image.narrow(
                axis, radius + step, length
            )
            blurred += both.mul_(taps[step] / total)
        image = blurred
    return image


def gradient_fields(patches: Tensor, order: int) -> Tensor:
    """Return each pixel's weight times the harmonics of its gradient direction.

    For m and theta the magnitude and direction of the central difference (I(x-1) - I(x+1),
    I(y-1) - I(y+1)), the weight is sqrt(m). The harmonics follow from cos theta and sin theta by
    Chebyshev's recurrence: no trigonometric function is called.

    Args:
        patches: Smoothed patches (N, h, w), N at least 1.
        order: Number n of frequencies.

    Returns:
        sqrt(m), sqrt(m) cos(k theta) for k = 1..n, then sqrt(m) sin(k theta): (2n + 1, N, h, w).
        All are 0 where there is no gradient.
    """
    count = 2 * order + 1
    shape = patches.shape
    differentiable = patches.requires_grad and torch.is_grad_enabled()
    patches = pad(patches.unsqueeze(1), (1, 1, 1, 1), mode="replicate").squeeze(1)
    gx = patches[:, 1:-1, :-2] - patches[:, 1:-1, 2:]
    gy = patches[:, :-2, 1:-1] - patches[:, 2:, 1:-1]
    del patches
    # Where no derivative is wanted, a field is written where it will stand: stacking finished ones
    # would read and write them all once more.
    stacked = None if differentiable else gx.new_empty(count, *shape)
    places = [None] * count if stacked is None else [*stacked]
    squared = torch.addcmul(torch.mul(gx, gx, out=places[0]), gy, gy, out=places[0])
    inverse = squared.clamp(min=FAINT).rsqrt_()  # 1 / m
    root = inverse.sqrt()
    magnitude = torch.mul(squared, inverse, out=places[0])
    cosines, sines = [torch.mul(magnitude, root, out=places[0])], []
    if order:
        cosines.append(torch.mul(gx, root, out=places[1]))
        sines.append(torch.mul(gy, root, out=places[order + 1]))
    del gy, root
    twice = (gx * inverse).mul_(2)  # 2 cos theta; h_k = 2 cos theta h_(k-1) - h_(k-2)
    for k in range(2, order + 1):
        place = places[k]
        cosine = torch.mul(twice, cosines[-1], out=place)
        cosines.append(torch.sub(cosine, cosines[-2], out=place))
        place = places[order + k]
        sine = torch.mul(twice, sines[-1], out=place)
        sines.append(sine if k == 2 else torch.sub(sine, sines[-2], out=place))
    return torch.stack(cosines + sines) if stacked is None else stacked
