"""Exact neighbours for triplets: of each vector among the others, never itself."""

from __future__ import annotations

import faiss
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.modes import exact_products

ROWS = 4096  # queries at a time
TABLE = 2**26  # products held at a time on a GPU


def nearest_others(queries: Tensor, own: Tensor, base: Tensor, k: int) -> Tensor:
    """Return the k nearest vectors of each query, by Euclidean distance, without itself.

    A query is left out by its number, not by its distance: an exact duplicate of it stays.

    Args:
        queries: Vectors (n, d), floating.
        own: Each query's row in `base` (n,), int64; -1 where it has none.
        base: Vectors (m, d).
        k: Neighbours, at most m - 1.

    Returns:
        Rows of `base` (n, k), int64, the nearest first.

    Raises:
        InputError: There are not so many others, or a value is not finite.
    """
    if not 1 <= k < len(base):
        raise InputError(f"{k} neighbours among {len(base) - 1} others: give more vectors")
    if not bool(queries.isfinite().all() & base.isfinite().all()):
        raise InputError("vectors that hold NaN or infinity have no neighbours: leave them out")
    # Distances come of products, which lose the digits of vectors far from the origin.
    centre = base.float().mean(0)
    queries, base = queries.float() - centre, base.float() - centre
    nearest = _nearest_on_cpu if queries.device.type == "cpu" else _nearest_by_products
    found = []
    for start in range(0, len(queries), ROWS):
        rows, mine = queries[start : start + ROWS], own[start : start + ROWS]
        every = nearest(rows, base, k + 1)
        itself = every == mine.unsqueeze(1)
        # Without itself among them, as with more duplicates than k, the farthest goes.
        itself[:, -1] |= ~itself.any(1)
        found.append(every[~itself].view(-1, k))
    return torch.cat(found) if found else own.new_zeros(0, k)


def _nearest_on_cpu(queries: Tensor, base: Tensor, k: int) -> Tensor:
    _, found = faiss.knn(queries.numpy(), base.numpy(), k)
    return torch.from_numpy(found)


def _nearest_by_products(queries: Tensor, base: Tensor, k: int) -> Tensor:
    rows = max(TABLE // len(base), 1)
    norms = base.square().sum(1)
    with exact_products():
        parts = [
            (norms - 2 * part @ base.mT).topk(k, largest=False).indices
            for part in torch.split(queries, rows)
        ]
    return torch.cat(parts)
