"""Inverted lists: each vector belongs to a centroid, and a search looks at the nearest few."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Numbers = NDArray[np.unsignedinteger[Any]]


class InvertedLists:
    """The list of each row. Lists hold no residuals: a code means the same in any of them.

    In memory a row takes 2 bytes for the number of its list, or 4 where there are more than 65,536
    lists, and 8 once lists are searched; in a file 2 or 4.

    Args:
        centroids: Unit vectors (nlist, dim), float32.
        numbers: List of each row (n,), uint16 or uint32, where there are rows.
    """

    def __init__(self, centroids: Tensor, numbers: Numbers | None = None) -> None:
        self.centroids = centroids
        self.number_type = np.uint16 if len(centroids) <= 2**16 else np.uint32
        self.numbers = np.empty(0, self.number_type) if numbers is None else numbers
        self._coarse = faiss.IndexFlatIP(centroids.shape[1])
        self._coarse.add(centroids.numpy())
        self._sorted: tuple[Tensor, list[int]] | None = None

    @classmethod
    def train(cls, embedded: Tensor, nlist: int, seed: int) -> InvertedLists:
        """Find centroids (nlist, dim) of unit vectors (n, dim) by spherical k-means."""
        if len(embedded) < nlist:
            raise InputError(
                f"{len(embedded)} vectors to train {nlist} lists: give at least {nlist}"
            )
        kmeans = faiss.Kmeans(
            embedded.shape[1], nlist, spherical=True, seed=seed, min_points_per_centroid=1
        )
        kmeans.train(embedded.numpy())
        return cls(torch.from_numpy(kmeans.centroids))

    def __len__(self) -> int:
        return len(self.centroids)

    def assign(self, units: Tensor) -> Numbers:
        """Return the lists (n,) of decoded vectors (n, dim): a function of the code alone."""
        nearest = self._coarse.search(units.numpy(), 1)[1][:, 0]
        numbers: Numbers = nearest.astype(self.number_type)
        return numbers

    def append(self, numbers: Numbers) -> None:
        """Put new rows in lists."""
        joined: Numbers = np.concatenate([self.numbers, numbers])
        self.numbers, self._sorted = joined, None

    def keep(self, kept: Tensor) -> None:
        """Drop the rows where a mask (n,) is False."""
        self.numbers, self._sorted = self.numbers[kept.numpy()], None

    def probes(self, nprobe: int | None) -> int:
        """Check a number of lists to search; None is the square root of all, rounded up."""
        if nprobe is None:
            return math.isqrt(len(self) - 1) + 1
        if not 1 <= nprobe <= len(self):
            raise InputError(f"nprobe {nprobe}: give 1 to {len(self)}, the number of lists")
        return nprobe

    def rows(self) -> tuple[Tensor, list[int]]:
        """Return the rows list by list (n,), int64, in order, and the ends of lists, from 0."""
        if self._sorted is None:
            order = np.argsort(self.numbers, kind="stable")
            counts = np.bincount(self.numbers, minlength=len(self))
            self._sorted = torch.from_numpy(order), [0, *np.cumsum(counts).tolist()]
        return self._sorted

    def visits(self, queries: Tensor, nprobe: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows (m,) and the queries (p,) that look at them, each pair once.

        Lists that the same queries look at come together, so that a single query looks at all its
        rows at a time, and each row is decoded once for a batch, whatever its size.
        """
        nearest = self._coarse.search(queries.numpy(), nprobe)[1]
        visitors: dict[int, list[int]] = {}
        for query, lists in enumerate(nearest):
            for number in lists.tolist():
                visitors.setdefault(number, []).append(query)
        together: dict[tuple[int, ...], list[int]] = {}
        for number, some in visitors.items():
            together.setdefault(tuple(some), []).append(number)
        order, ends = self.rows()
        for visiting, numbers in together.items():
            parts = [order[ends[number] : ends[number + 1]] for number in sorted(numbers)]
            yield torch.cat(parts), torch.tensor(visiting)
