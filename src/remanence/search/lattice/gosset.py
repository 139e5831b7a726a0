"""Shells of the Gosset lattice E8, the code of the first version of arXiv 1806.03198."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.search.lattice.code import ENTRIES, SphericalCode, signed
from remanence.search.lattice.counting import LARGEST
from remanence.search.lattice.leaders import leaders
from remanence.search.lattice.ranking import Ranking


class E8Shell(SphericalCode):
    """The points of E8 with squared norm 2m, doubled so that they are integers.

    E8 holds the vectors of R^8 whose coordinates are all integers or all halves of odd integers,
    with an even sum. Doubled: all even or all odd, with a sum divisible by 4; r2 is 8m.

    Args:
        m: Half the squared norm, 1 to 2016. The shell has 240 sigma_3(m) points.

    Raises:
        InputError: m is out of range.
    """

    def __init__(self, m: int) -> None:
        if not 1 <= m <= LARGEST // 8:
            raise InputError(f"m {m}: give 1 to {LARGEST // 8}")
        most = math.isqrt(8 * m)
        letters = [0, *(signed for size in range(1, most + 1) for signed in (size, -size))]

        # What is left of the squared norm, the parity (-1 before the first), and the sum modulo 4.
        def step(state: tuple[int, int, int], letter: int) -> tuple[int, int, int] | None:
            rest, parity, total = state
            if letter**2 > rest or parity not in {-1, letter % 2}:
                return None
            return rest - letter**2, letter % 2, (total + letter) % 4

        start = (8 * m, -1, 0)
        ranking = Ranking(8, letters, start, step, lambda end: end[0] == end[2] == 0)
        super().__init__(8, 8 * m, ranking)
        every = leaders(8, 8 * m)
        parities = every % 2
        self._even = every[(parities == 0).all(1)].double()
        self._odd = every[(parities == 1).all(1)].double()

    def _nearest(self, x: Tensor) -> Tensor:
        even, odd = self._even.to(x.device), self._odd.to(x.device)
        sizes, order = x.abs().sort(dim=1, descending=True, stable=True)
        sizes = sizes.double()
        negative = (x < 0).sum(1, keepdim=True)
        # The norm is divisible by 8, so that the sum of even points is divisible by 4 whatever the
        # signs; the sum of odd ones changes by 2 modulo 4 with each sign.
        wrong = (odd.long().sum(1) + 2 * negative) % 4 != 0  # (n, atoms)
        scores = sizes @ odd.T - wrong * (2 * sizes[:, -1:] * odd[:, -1])
        best = scores.argmax(1)
        points = odd[best]
        flipped = wrong.gather(1, best.unsqueeze(1)).squeeze(1)
        # The least coordinate of the least size pays for a wrong sum.
        points[:, -1] = torch.where(flipped, -points[:, -1], points[:, -1])
        plain = sizes @ even.T
        closer = plain.amax(1) >= scores.amax(1)
        points = torch.where(closer.unsqueeze(1), even[plain.argmax(1)], points)
        return signed(torch.empty_like(points).scatter_(1, order, points), x).to(torch.int8)

    def _rows(self) -> int:
        return max(ENTRIES // (len(self._even) + 2 * len(self._odd) + 8), 1)
