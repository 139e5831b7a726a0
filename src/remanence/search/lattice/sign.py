"""The binary code: the signs of coordinates (arXiv 1806.03198, section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from remanence.errors import InputError
from remanence.search.lattice.code import SphericalCode, signed
from remanence.search.lattice.ranking import Ranking

if TYPE_CHECKING:
    from torch import Tensor


class SignCode(SphericalCode):
    """The points {1, -1}^dim: a bit a coordinate, set where it is negative, the first the highest.

    Two codes differ in as many bits as their points in signs.

    Args:
        dim: Dimension, at least 1; also the bits of a code.

    Raises:
        InputError: dim is below 1.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise InputError(f"dimension {dim}: give at least 1")
        super().__init__(dim, dim, Ranking(dim, [1, -1], 0, lambda state, _: state, lambda _: True))

    def _nearest(self, x: Tensor) -> Tensor:
        return signed(torch.ones_like(x, dtype=torch.int8), x)
