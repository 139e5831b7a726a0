"""The spherical lattice: integer points of one norm (arXiv 1806.03198, section 4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.search.lattice.code import ENTRIES, SphericalCode, signed
from remanence.search.lattice.counting import LARGEST, radius_for_bits
from remanence.search.lattice.leaders import leaders
from remanence.search.lattice.ranking import Ranking

if TYPE_CHECKING:
    from remanence.search.lattice.compiled import Nearest


class SphereLattice(SphericalCode):
    """The shell {c in Z^dim : |c|^2 = r2}.

    Sizes of coordinates are rounded to about 2^-47 of the largest in a row, so that float64 holds
    their products and sums with points exactly; of points equally near then, the one with the first
    leader is taken. On the processor the search is compiled.

    Args:
        dim: Dimension, at least 2.
        r2: Squared radius, 1 to 127^2.

    Attributes:
        leaders: Points up to order and signs (n, dim), int8: the paper's atoms.

    Raises:
        InputError: An argument is out of range, or the shell is empty or has too many leaders.
    """

    def __init__(self, dim: int, r2: int) -> None:
        if dim < 2 or not 1 <= r2 <= LARGEST:
            raise InputError(
                f"dimension {dim} and squared radius {r2}: give at least 2 and 1 to {LARGEST}"
            )
        self.leaders = leaders(dim, r2)
        most = math.isqrt(r2)
        letters = [0, *(signed for size in range(1, most + 1) for signed in (size, -size))]

        def step(rest: int, letter: int) -> int | None:
            return rest - letter**2 if letter**2 <= rest else None

        super().__init__(dim, r2, Ranking(dim, letters, r2, step, lambda rest: rest == 0))
        self._atoms = self.leaders.double()
        # The sum of a leader is at most sqrt(dim r2): no score of 53 bits is rounded, in whatever
        # order it is summed. A size and its place are one integer in the compiled search.
        self._size_bits = min(53 - math.isqrt(dim * r2).bit_length(), 62 - dim.bit_length())
        self._compiled: Nearest | None = None

    @classmethod
    def from_bits(cls, dim: int, bits: int) -> Self:
        """Return the largest shell that codes of so many bits can name."""
        return cls(dim, radius_for_bits(dim, bits))

    def _nearest(self, x: Tensor) -> Tensor:
        # In fewer than five dimensions not every number is a sum of squares: leaders are few, and
        # the compiled search would often end in nothing.
        if x.device.type != "cpu" or self.dim < 5:
            rows = max(ENTRIES // (len(self.leaders) + self.dim), 1)
            parts = [self._match(x[start : start + rows]) for start in range(0, len(x), rows)]
            return torch.cat([x.new_empty(0, self.dim, dtype=torch.int8), *parts])
        if self._compiled is None:
            from remanence.search.lattice.compiled import Nearest  # numba takes time to import

            self._compiled = Nearest(self.dim, self.r2, self._size_bits)
        return self._compiled(x)

    def _match(self, x: Tensor) -> Tensor:
        """Match sorted coordinates: exact by the rearrangement inequality."""
        if self._atoms.device != x.device:
            self._atoms, self.leaders = self._atoms.to(x.device), self.leaders.to(x.device)
        sizes, order = self._whole_sizes(x).sort(dim=1, descending=True, stable=True)
        best = (sizes @ self._atoms.T).argmax(1)
        points = torch.empty_like(order, dtype=torch.int8).scatter_(1, order, self.leaders[best])
        return signed(points, x)

    def _whole_sizes(self, x: Tensor) -> Tensor:
        """Scale sizes by a power of two for each row, and round them to integers, in float64."""
        sizes = x.double().abs()
        power = self._size_bits - sizes.amax(1, keepdim=True).frexp().exponent.long()
        half = power >> 1  # a double may not hold the whole power
        return (sizes * _power_of_two(half) * _power_of_two(power - half)).round()


def _power_of_two(exponents: Tensor) -> Tensor:
    return ((exponents + 1023) << 52).view(torch.float64)
