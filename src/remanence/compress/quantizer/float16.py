"""A codebook in float16, whatever the size of its values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from remanence.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 65_520.0  # rounds to infinity in float16
SMALLEST = 2.0**-8  # below, float16's smallest step would be more than 2^-16 of the largest value


def round_to_float16(codebook: Tensor) -> tuple[Tensor, int]:
    """Round codewords to values that float16 holds.

    Codebooks that float16 cannot hold, or not well, are scaled by a power of two first, so that the
    largest magnitude lies in [0.5, 1).

    Args:
        codebook: (K, d), finite.

    Returns:
        Rounded codebook (K, d), float32, and an exponent: the codebook times 2**-exponent is exact
        in float16. The exponent is 0 where the largest magnitude lies in [2^-8, 65520).

    Raises:
        InputError: The codebook holds NaN or infinity.
    """
    largest = codebook.abs().max().item()
    if not math.isfinite(largest):
        raise InputError("the codebook holds NaN or infinity: check the weights")
    exponent = 0
    if largest >= LARGEST or 0 < largest < SMALLEST:
        exponent = math.frexp(largest)[1]
    rounded = (codebook.double() * 2.0**-exponent).half().double() * 2.0**exponent
    return rounded.float(), exponent
