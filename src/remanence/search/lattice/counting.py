"""How many points a shell of Z^d has: the coefficients of theta_3(q)^d, exact at any size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from remanence.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST = 127**2  # squared radius up to which coordinates surely fit in int8


def shell_sizes(dim: int, largest: int) -> list[int]:
    """Count the integer vectors of each squared norm.

    Args:
        dim: Dimension d, at least 1.
        largest: Largest squared norm.

    Returns:
        The number of v in Z^d with |v|^2 = t for t = 0..largest, exact.
    """
    series: NDArray[np.object_] = np.array([1] + [0] * largest, dtype=object)
    for _ in range(dim):
        longer = series.copy()
        for value in range(1, math.isqrt(largest) + 1):
            longer[value**2 :] += 2 * series[: largest + 1 - value**2]
        series = longer
    return [int(size) for size in series]


def radius_for_bits(dim: int, bits: int) -> int:
    """Return the squared radius whose shell is the largest that a code of so many bits can name.

    Shells of few dimensions do not always grow with the radius; all radii are looked at.

    Args:
        dim: Dimension, at least 2.
        bits: Size of a code, at least 1.

    Returns:
        The squared radius, up to 127^2; of shells of one size the first.

    Raises:
        InputError: No shell is so small.
    """
    if dim < 2 or bits < 1:
        raise InputError(f"{bits} bits in dimension {dim}: give at least 1 bit and 2 dimensions")
    if 2 * dim > 2**bits:
        raise InputError(
            f"{bits} bits cannot name the {2 * dim} points of the smallest shell in dimension "
            f"{dim}: give at least {(2 * dim - 1).bit_length()} bits"
        )
    largest = 64
    while True:
        sizes = shell_sizes(dim, largest)
        # Sizes grow as the power dim / 2 - 1 of the squared radius from dimension 5 on, so that a
        # whole upper half beyond the budget is never followed by a shell within it.
        if largest == LARGEST or (dim > 4 and min(sizes[largest // 2 :]) > 2**bits):
            break
        largest = min(2 * largest, LARGEST)
    return max(range(1, largest + 1), key=lambda r2: sizes[r2] if sizes[r2] <= 2**bits else 0)
