"""What all codes of this folder share: points on the sphere, their numbers and unit vectors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.errors import InputError

if TYPE_CHECKING:
    from remanence.search.lattice.ranking import Ranking

ENTRIES = 2**21  # float64 entries of a table held at a time: 16 MiB


class SphericalCode(ABC):
    """A finite set of integer points, all of one norm, that unit vectors are rounded to.

    Attributes:
        dim: Dimension of the vectors.
        r2: Squared norm of the points.
        nv: Number of points, exact.
        bits: Bits that number them.
        nbytes: Bytes of a code: that many bits, rounded up.
    """

    def __init__(self, dim: int, r2: int, ranking: Ranking) -> None:
        self.dim, self.r2, self._ranking = dim, r2, ranking
        self.nv, self.bits, self.nbytes = ranking.size, ranking.bits, ranking.nbytes

    def quantize(self, x: Tensor) -> Tensor:
        """Return the point that makes the smallest angle with each vector.

        The result does not depend on the batch or the device; how finely a comparison is made, the
        class says. A coordinate of 0 counts as positive.

        Args:
            x: Vectors (n, dim) of any length and any real type.

        Returns:
            Points (n, dim), int8.

        Raises:
            InputError: The shape or type is wrong, or a value is NaN or infinite.
        """
        self._check(x)
        if x.dtype == torch.bool or x.is_complex():
            raise InputError(f"vectors of {x.dtype}: give real numbers")
        # The sum of finite numbers may be infinite, but not the other way round.
        if not math.isfinite(x.detach().sum()) and not bool((finite := x.isfinite().all(1)).all()):
            raise InputError(f"row {int((~finite).int().argmax())} holds NaN or infinity")
        x = x if x.is_floating_point() else x.double()
        points = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        rows = self._rows()
        with torch.no_grad():
            for start in range(0, len(x), rows):
                points[start : start + rows] = self._nearest(x[start : start + rows])
        return points

    def rank(self, points: Tensor) -> Tensor:
        """Return the codes (n, nbytes), uint8, lowest byte first, of points (n, dim), integers.

        Raises:
            InputError: The shape or type is wrong, or a row is no point of the code.
        """
        self._check(points)
        if points.is_floating_point() or points.is_complex() or points.dtype == torch.bool:
            raise InputError(f"points of {points.dtype}: give integers")
        return self._ranking.rank(points)

    def unrank(self, codes: Tensor) -> Tensor:
        """Return the points (n, dim), int8, of codes (n, nbytes), uint8.

        Raises:
            InputError: The shape or type is wrong, or a code is not below `nv`.
        """
        return self._ranking.unrank(codes)

    def dequantize(self, points: Tensor) -> Tensor:
        """Return points (n, dim) as unit vectors, float32."""
        self._check(points)
        return points.float() / math.sqrt(self.r2)

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes (n, nbytes), uint8, of vectors (n, dim); errors as `quantize`."""
        return self.rank(self.quantize(x))

    def decode(self, codes: Tensor) -> Tensor:
        """Return the unit vectors (n, dim), float32, of codes (n, nbytes); errors as `unrank`."""
        return self.dequantize(self.unrank(codes))

    def straight_through(self, x: Tensor) -> Tensor:
        """Return the quantised vectors (n, dim), in the type of x, with the gradient of x itself.

        The paper's section 4: training goes on as if the rounding were the identity.
        """
        quantised = self.dequantize(self.quantize(x)).to(x.dtype)
        return quantised + (x - x.detach())  # exactly `quantised`: the bracket is 0

    @abstractmethod
    def _nearest(self, x: Tensor) -> Tensor:
        """Return the nearest points of a few finite vectors."""

    def _rows(self) -> int:
        """Return how many vectors are rounded at a time."""
        return max(ENTRIES // self.dim, 1)

    def _check(self, rows: Tensor) -> None:
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise InputError(f"vectors {tuple(rows.shape)}: give (n, {self.dim}), a vector a row")


def signed(sizes: Tensor, x: Tensor) -> Tensor:
    """Give sizes the signs of x; 0 counts as positive."""
    return torch.where(x < 0, -sizes, sizes)
