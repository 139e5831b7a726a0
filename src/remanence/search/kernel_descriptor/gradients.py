"""Smoothed gradients of patches as harmonics of their direction (arXiv 1811.11147)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor

LAST_OF_FIVE = 65  # side of the largest patch that 5 x 5 taps blur


def smooth(patches: Tensor) -> Tensor:
    """Blur patches by a Gaussian of sigma = 1.4 s / 64 pixels, with replicated borders.

    The window has 5 x 5 taps up to s = 65, the largest patches that the published codes were used
    with; above it reaches 3 sigma.

    Args:
        patches: (N, s, s), float32 or float64, N at least 1.

    Returns:
        The same shape and type. What is constant stays so to the last bit.
    """
    size = patches.shape[-1]
    sigma = 1.4 * size / 64
    radius = 2 if size <= LAST_OF_FIVE else math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    weights = (taps / taps.sum()).tolist()
    image = patches.unsqueeze(1)
    for axis, margins in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded = pad(image, margins, mode="replicate")
        # A sum of shifted copies, not a convolution: every pixel is rounded alike, so that a flat
        # region has no gradient, where rounding noise would give it a weight and a direction.
        image = weights[radius] * padded.narrow(axis, radius, size)
        for step in range(1, radius + 1):
            before = padded.narrow(axis, radius - step, size)
            image = image + weights[radius + step] * (
                before + padded.narrow(axis, radius + step, size)
            )
    return image.squeeze(1)


def gradient_fields(patches: Tensor, order: int) -> Tensor:
    """Return each pixel's weight times the harmonics of its gradient direction.

    For m and theta the magnitude and direction of the central difference (I(x-1) - I(x+1),
    I(y-1) - I(y+1)), the weight is sqrt(m). The harmonics follow from cos theta and sin theta by
    products: no trigonometric function is called.

    Args:
        patches: Smoothed patches (N, s, s), N at least 1.
        order: Number n of frequencies.

    Returns:
        sqrt(m), sqrt(m) cos(k theta) for k = 1..n, then sqrt(m) sin(k theta): (2n + 1, N, s, s).
        All are 0 where there is no gradient.
    """
    padded = pad(patches.unsqueeze(1), (1, 1, 1, 1), mode="replicate").squeeze(1)
    gx = padded[:, 1:-1, :-2] - padded[:, 1:-1, 2:]
    gy = padded[:, :-2, 1:-1] - padded[:, 2:, 1:-1]
    squared = gx * gx + gy * gy
    slope = squared > 0
    inverse = torch.where(slope, squared, 1).rsqrt()  # 1 / m; the 1 keeps derivatives finite
    cos, sin = gx * inverse, gy * inverse
    weight = torch.where(slope, inverse, torch.inf).rsqrt()  # sqrt(m)
    cosines, sines = [weight], [torch.zeros_like(weight)]
    for _ in range(order):
        last_cos, last_sin = cosines[-1], sines[-1]
        cosines.append(last_cos * cos - last_sin * sin)
        sines.append(last_sin * cos + last_cos * sin)
    return torch.stack(cosines + sines[1:])
