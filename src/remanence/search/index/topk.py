"""The k largest inner products, exact and in one order whatever the blocks they are found in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from remanence.kernels import kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SCORES = 2**19  # float32 scores held at a time: 2 MiB, so that they stay in a core's cache
FEWEST, MOST = 2**13, 2**14  # points of a block
STRIP = 64  # scores that are compared together; blocks are filled up to a multiple of it
NONE = np.iinfo(np.int64).max  # the id of a place that is still empty


class TopK:
    """The best k points of each query so far.

    Inner products in float32 only choose candidates, with a margin above their rounding error.
    Candidates are compared by their inner product in float64, summed in the order of coordinates,
    and then by id, the smaller first: the result depends on nothing but the query and the points.

    Args:
        queries: (q, dim), float32.
        k: How many.
        radius: Norm of the points.
    """

    def __init__(self, queries: Tensor, k: int, radius: float) -> None:
        self._queries, self._k, self._radius = queries.contiguous(), k, radius
        # Heaps: the worst first.
        self._scores = np.full((len(queries), k), -np.inf)
        self._ids = np.full((len(queries), k), NONE)
        dim = queries.shape[1]
        # Each of the float32 sums is off by at most dim 2^-24 |q| |c|, to first order, in any
        # order of summation; twice that covers the rest.
        self.margin = (queries.double().norm(dim=1) * radius * max(dim, 2) * 2**-23).numpy()

    def offer(self, points: Tensor, ids: Tensor, chosen: Tensor | None = None) -> None:
        """Compare points with the queries, in blocks of `SCORES` scores.

        Call it within `modes.exact_products`: the margin is for products in float32.

        Args:
            points: (n, dim), int8.
            ids: (n,), int64.
            chosen: Rows of the queries that are compared, int64; None for all.
        """
        if chosen is None:
            chosen = torch.arange(len(self._queries))
        block = min(max(SCORES // max(len(chosen), 1), FEWEST), MOST)
        for start in range(0, len(points), block):
            self._offer(points[start : start + block], ids[start : start + block], chosen)

    def _offer(self, points: Tensor, ids: Tensor, chosen: Tensor) -> None:
        plain = points.float().T
        width = padded(len(points))
        rows = max(SCORES // width, 1)
        buffer = torch.empty(min(rows, len(chosen)), width)
        buffer[:, len(points) :] = -torch.inf
        for start in range(0, len(chosen), rows):
            some = chosen[start : start + rows]
            scores = buffer[: len(some)]
            torch.mm(self._queries[some], plain, out=scores[:, : len(points)])
            self.offer_scored(scores, points, ids, some)

    def offer_scored(self, scores: Tensor, points: Tensor, ids: Tensor, chosen: Tensor) -> None:
        """Compare points whose float32 products are known.

        Args:
            scores: (m, width), float32; width is n filled up to a multiple of `STRIP` with -inf.
            points: (n, dim), int8.
            ids: (n,), int64.
            chosen: (m,), int64: rows of the queries.
        """
        _push(
            scores.numpy(),
            points.numpy(),
            ids.numpy(),
            chosen.numpy(),
            self._queries.numpy(),
            self.margin,
            self._scores,
            self._ids,
        )

    def result(self, k: int) -> tuple[Tensor, Tensor]:
        """Return cosines (q, k), float32, and ids (q, k), int64, the best first.

        Places beyond those found hold -inf and -1.
        """
        order = np.lexsort((self._ids, -self._scores), axis=-1)
        scores = np.full((len(order), k), -np.inf, dtype=np.float32)
        ids = np.full((len(order), k), -1)
        scores[:, : self._k] = np.take_along_axis(self._scores, order, 1) / self._radius
        found = np.take_along_axis(self._ids, order, 1)
        ids[:, : self._k] = np.where(found == NONE, -1, found)
        return torch.from_numpy(scores), torch.from_numpy(ids)


@kernel
def _push(
    scores: NDArray[np.float32],
    points: NDArray[np.int8],
    ids: NDArray[np.int64],
    chosen: NDArray[np.int64],
    queries: NDArray[np.float32],
    margin: NDArray[np.float64],
    best: NDArray[np.float64],
    best_ids: NDArray[np.int64],
) -> None:
    """Put points into the heaps of their queries."""
    k = best.shape[1]
    for i in range(scores.shape[0]):
        query = chosen[i]
        heap, heap_ids = best[query], best_ids[query]
        floor = np.float32(heap[0] - margin[query])
        for strip in range(scores.shape[1] // 64):
            row = scores[i, strip * 64 : strip * 64 + 64]
            hits = np.int32(0)
            for j in range(64):  # a loop of fixed length, which compiles to vector instructions
                hits += np.int32(1) if row[j] >= floor else np.int32(0)
            if hits == 0:
                continue
            for j in range(strip * 64, min(strip * 64 + 64, points.shape[0])):
                if scores[i, j] < floor:
                    continue
                score = 0.0
                for t in range(points.shape[1]):
                    score += np.float64(queries[query, t]) * np.float64(points[j, t])
                name = ids[j]
                if score < heap[0] or (score == heap[0] and name > heap_ids[0]):
                    continue
                place = 0  # where the worst was: what is better than the new one moves down
                while 2 * place + 1 < k:
                    child = 2 * place + 1
                    if child + 1 < k and (
                        heap[child + 1] < heap[child]
                        or (
                            heap[child + 1] == heap[child] and heap_ids[child + 1] > heap_ids[child]
                        )
                    ):
                        child += 1
                    if heap[child] > score or (heap[child] == score and heap_ids[child] < name):
                        break
                    heap[place], heap_ids[place] = heap[child], heap_ids[child]
                    place = child
                heap[place], heap_ids[place] = score, name
                floor = np.float32(heap[0] - margin[query])


def padded(columns: int) -> int:
    """Return the width of a row of scores."""
    return math.ceil(columns / STRIP) * STRIP
