"""The spherical lattice: integer points of one norm (arXiv 1806.03198, section 4)."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.search.lattice.code import ENTRIES, SphericalCode, signed
from remanence.search.lattice.counting import LARGEST, radius_for_bits
from remanence.search.lattice.leaders import leaders
from remanence.search.lattice.ranking import Ranking


class SphereLattice(SphericalCode):
    """The shell {c in Z^dim : |c|^2 = r2}.

    Args:
        dim: Dimension, at least 2.
        r2: Squared radius, 1 to 127^2.

    Attributes:
        leaders: Points up to order and signs (n, dim), int8: the paper's atoms. A search costs
            2 n dim operations a vector.

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

    @classmethod
    def from_bits(cls, dim: int, bits: int) -> Self:
        """Return the largest shell that codes of so many bits can name."""
        return cls(dim, radius_for_bits(dim, bits))

    def _nearest(self, x: Tensor) -> Tensor:
        """Match sorted coordinates: exact by the rearrangement inequality."""
        if self._atoms.device != x.device:
            self._atoms, self.leaders = self._atoms.to(x.device), self.leaders.to(x.device)
        sizes, order = x.abs().sort(dim=1, descending=True, stable=True)
        best = (sizes.double() @ self._atoms.T).argmax(1)
        points = torch.empty_like(order, dtype=torch.int8).scatter_(1, order, self.leaders[best])
        return signed(points, x)

    def _rows(self) -> int:
        return max(ENTRIES // (len(self.leaders) + self.dim), 1)
