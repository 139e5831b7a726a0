"""A kernel on angles as an inner product of short vectors (arXiv 1811.11147).

The normalised von Mises kernel of an angle difference D,

    k(D) = (exp(kappa cos D) - exp(-kappa)) / (2 sinh kappa),    k(0) = 1, k(pi) = 0,

is cut after n terms of its cosine series, sum_i c_i cos(i D). The cut series is the inner product
of the feature maps of the two angles.
"""

from __future__ import annotations

import math

import scipy.special
import torch
from torch import Tensor

from remanence.errors import InputError


def von_mises_coefficients(kappa: float, order: int) -> Tensor:
    """Return the first coefficients of the kernel's cosine series.

    c_0 = (I_0 - exp(-kappa)) / (2 sinh kappa) and c_i = I_i / sinh kappa, for I the modified Bessel
    functions at kappa.

    Args:
        kappa: Selectivity, above 0: the larger, the narrower the kernel.
        order: Number n of frequencies kept, 0 or more.

    Returns:
        c_0 to c_n (n + 1,), float64, all above 0.

    Raises:
        InputError: kappa or the order is out of range, or a coefficient underflows to 0.
    """
    if not (math.isfinite(kappa) and kappa > 0):
        raise InputError(f"kappa {kappa} of a von Mises kernel: give a number above 0, 8 say")
    if order < 0:
        raise InputError(f"order {order} of a von Mises kernel: give 0 or more frequencies")
    # Scaled Bessel functions exp(-kappa) I_i, so that a large kappa does not overflow.
    scaled = torch.from_numpy(scipy.special.ive(range(order + 1), kappa))
    low = math.exp(-2 * kappa)
    coefficients = 2 * scaled / (1 - low)
    coefficients[0] = (scaled[0] - low) / (1 - low)
    if not bool((coefficients > 0).all()):
        raise InputError(f"order {order} is beyond float64 for kappa {kappa}: give a lower order")
    return coefficients


def feature_map(angle: Tensor, coefficients: Tensor) -> Tensor:
    """Map angles to vectors whose inner product is the truncated kernel of their difference.

    Args:
        angle: Angles of any shape, radians, floating.
        coefficients: c_0 to c_n (n + 1,), none below 0.

    Returns:
        sqrt(c_0), sqrt(c_i) cos(i a) for i = 1..n, then sqrt(c_i) sin(i a): (2n + 1, *angle.shape),
        in the type of the angles.
    """
    roots = coefficients.to(angle).sqrt().reshape(-1, *(1,) * angle.ndim)
    frequencies = torch.arange(len(roots), dtype=angle.dtype, device=angle.device)
    turns = frequencies.reshape(roots.shape) * angle
    return torch.cat([roots * turns.cos(), roots[1:] * turns[1:].sin()])
