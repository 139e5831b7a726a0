"""Search through all rows, or through the rows of a few lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.modes import exact_products
from remanence.search.index.storage import CHUNK, Points
from remanence.search.index.topk import TopK, padded

if TYPE_CHECKING:
    from remanence.search.index.ids import Ids
    from remanence.search.index.inverted import InvertedLists
    from remanence.search.index.storage import Storage

# On int8, up to so many queries faiss' scan is quicker than float32 products of blocks: for a
# million points of dimension 24, 4 ms of one core for each query, against 10 to 15 ms for 1 to 4 of
# them together. Its vector instructions need a dimension divisible by 8.
FEW = 3
SPARE = 16  # results that faiss is asked for beyond k, to see whether the k are certain


def scan(storage: Storage, ids: Ids, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Look at all rows.

    Args:
        storage: The rows.
        ids: Their names.
        queries: Embedded (q, dim), float32.
        k: Number of results.

    Returns:
        Cosines (q, k), float32, and ids (q, k), int64, padded with -inf and -1.
    """
    top = _top(storage, queries, k)
    open_queries = torch.arange(len(queries))
    quick = len(queries) <= FEW and storage.code.dim % 8 == 0 and len(storage) > k + SPARE
    if quick and isinstance(storage, Points):
        open_queries = _scan_by_faiss(storage, ids, queries, k, top)
    if len(open_queries):
        with exact_products():
            for rows in storage.chunks():
                top.offer(storage.points(rows), ids.at(rows), open_queries)
    return top.result(k)


def scan_lists(
    storage: Storage, ids: Ids, lists: InvertedLists, queries: Tensor, k: int, nprobe: int
) -> tuple[Tensor, Tensor]:
    """Look at the rows of the `nprobe` lists nearest to each query; as `scan` otherwise."""
    top = _top(storage, queries, k)
    with exact_products():
        for rows, some in lists.visits(queries, nprobe):
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                top.offer(storage.points(part), ids.at(part), some)
    return top.result(k)


def _top(storage: Storage, queries: Tensor, k: int) -> TopK:
    return TopK(queries, max(min(k, len(storage)), 1), storage.code.r2**0.5)


def _scan_by_faiss(storage: Points, ids: Ids, queries: Tensor, k: int, top: TopK) -> Tensor:
    """Offer what faiss finds; return the queries whose k best may not all be among it."""
    scores, found = storage.faiss.search(queries.numpy(), k + SPARE)
    # Whatever faiss left out scores no more than its last result. Its error, decoding included, is
    # below four times the margin, which is for sums of exact products and not divided by r.
    certain = scores[:, k - 1] - scores[:, -1] > 8 * top.margin / storage.code.r2**0.5
    for i in certain.nonzero()[0]:
        rows = torch.from_numpy(found[i])
        candidates = torch.full((1, padded(len(rows))), torch.inf)
        top.offer_scored(candidates, storage.points(rows), ids.at(rows), torch.tensor([i]))
    return torch.from_numpy(~certain).nonzero()[:, 0]
