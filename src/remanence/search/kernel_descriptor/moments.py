"""Running moments of descriptors and of matching pairs; no vector is kept."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from remanence.errors import InputError

CHUNK = 16384  # rows at a time in float64


class Moments:
    """Sums over vectors and over pairs, in float64: all that a whitening is learned from.

    Zero vectors, which flat patches have, are left out, and pairs with one.

    Attributes:
        dim: Length E of the vectors.
        count: Single vectors seen.
        pairs: Pairs seen.
        total: Sum of the single vectors (E,).
        second: Sum of x x^T over them (E, E).
        first_total: Sum of the first vectors of the pairs (E,).
        pair_total: Sum of both vectors of the pairs (E,).
        pair_second: Sum of x x^T over both vectors of the pairs (E, E).
        differences: Sum of (q - p)(q - p)^T over the pairs (E, E).
    """

    def __init__(self, dim: int, device: str | torch.device = "cpu") -> None:
        """Start from nothing.

        Args:
            dim: Length E of the vectors.
            device: Where the sums are kept; vectors are moved there.
        """
        self.dim = dim
        self.count = 0
        self.pairs = 0
        self.total, self.first_total, self.pair_total = torch.zeros(
            3, dim, dtype=torch.float64, device=device
        )
        self.second, self.pair_second, self.differences = torch.zeros(
            3, dim, dim, dtype=torch.float64, device=device
        )

    def add(self, vectors: Tensor) -> None:
        """Add single vectors.

        Args:
            vectors: (N, E), any floating type.

        Raises:
            InputError: The shape does not fit, or a value is not finite.
        """
        self._check(vectors)
        for chunk in torch.split(vectors.detach(), CHUNK):
            x = chunk.to(self.total)
            x = x[x.any(dim=1)]
            self.count += len(x)
            self.total += x.sum(0)
            self.second += x.mT @ x

    def add_pairs(self, first: Tensor, second: Tensor) -> None:
        """Add matching pairs: descriptors of the same thing, seen twice.

        Args:
            first: q (N, E), any floating type.
            second: p (N, E).

        Raises:
            InputError: The shapes do not fit, or a value is not finite.
        """
        if len(first) != len(second):
            raise InputError(
                f"pairs of {len(first)} and {len(second)} vectors: give as many first as second"
            )
        self._check(first)
        self._check(second)
        firsts, seconds = (torch.split(v.detach(), CHUNK) for v in (first, second))
        for first_chunk, second_chunk in zip(firsts, seconds, strict=True):
            q, p = first_chunk.to(self.total), second_chunk.to(self.total)
            kept = q.any(dim=1) & p.any(dim=1)
            q, p = q[kept], p[kept]
            self.pairs += len(q)
            self.first_total += q.sum(0)
            self.pair_total += q.sum(0) + p.sum(0)
            self.pair_second += q.mT @ q + p.mT @ p
            self.differences += (q - p).mT @ (q - p)

    def scatter(self, mean: Tensor) -> Tensor:
        """Return the mean of (x - m)(x - m)^T over the single vectors.

        Args:
            mean: m (E,).

        Returns:
            (E, E), float64.
        """
        return _scatter(self.second, self.total, mean, self.count)

    def pair_scatter(self, mean: Tensor) -> Tensor:
        """Return the mean of (x - m)(x - m)^T over both vectors of the pairs.

        Args:
            mean: m (E,).

        Returns:
            (E, E), float64.
        """
        return _scatter(self.pair_second, self.pair_total, mean, 2 * self.pairs)

    def merge(self, other: Moments) -> None:
        """Add what another one saw.

        Args:
            other: Moments of vectors of the same length.

        Raises:
            InputError: The lengths differ.
        """
        if other.dim != self.dim:
            raise InputError(f"moments of length {other.dim} cannot be merged into {self.dim}")
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.add_(theirs.to(mine.device))
        self.count += other.count
        self.pairs += other.pairs

    def all_reduce(self) -> None:
        """Sum over the processes of `torch.distributed`, where it runs."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        seen = torch.tensor([self.count, self.pairs], device=self.total.device)
        for tensor in (seen, *self._tensors()):
            dist.all_reduce(tensor)
        self.count, self.pairs = (int(n) for n in seen)

    def _tensors(self) -> tuple[Tensor, ...]:
        return (
            self.total,
            self.second,
            self.first_total,
            self.pair_total,
            self.pair_second,
            self.differences,
        )

    def _check(self, vectors: Tensor) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(
                f"vectors of shape {tuple(vectors.shape)} for moments of length {self.dim}: give "
                f"(N, {self.dim})"
            )
        if not bool(vectors.isfinite().all()):
            raise InputError("a vector holds NaN or infinity: leave it out")


def _scatter(second: Tensor, total: Tensor, mean: Tensor, count: int) -> Tensor:
    cross = torch.outer(total, mean)
    return (second - cross - cross.mT) / count + torch.outer(mean, mean)
