"""Symmetric search of binary codes: by the number of bits in which they differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import faiss
import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from remanence.search.index.ids import Ids
    from remanence.search.index.storage import Storage

CHUNK = 2**18  # codes that faiss compares at a time


def hamming_search(storage: Storage, ids: Ids, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the codes that differ in the fewest bits.

    Args:
        storage: Rows of a binary code.
        ids: Their names.
        queries: Embedded (q, dim), float32.
        k: Number of results.

    Returns:
        Cosines of signs, 1 - 2 bits / dim (q, k), float32, and ids (q, k), int64, padded with -inf
        and -1; of equal scores the smaller id first.
    """
    codes = storage.code.encode(queries).numpy()
    order = None if ids.explicit is None else ids.explicit.argsort()
    best, names = np.empty((len(codes), 0), np.int64), np.empty((len(codes), 0), np.int64)
    for start in range(0, len(storage), CHUNK):
        rows: slice | Tensor = slice(start, min(start + CHUNK, len(storage)))
        rows = rows if order is None else order[rows]
        part = storage.codes(rows).numpy()
        # Of equal distances faiss keeps the first; ids rise within a chunk and from one to the
        # next.
        distances, found = faiss.knn_hamming(codes, part, min(k, len(part)))
        best = np.concatenate([best, distances], axis=1)
        names = np.concatenate([names, ids.at(rows).numpy()[found]], axis=1)
        kept = np.argsort(best, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(best, kept, 1)
        names = np.take_along_axis(names, kept, 1)
    scores, padded = torch.full((len(codes), k), -torch.inf), torch.full((len(codes), k), -1)
    scores[:, : best.shape[1]] = 1 - 2 * torch.from_numpy(best) / storage.code.dim
    padded[:, : best.shape[1]] = torch.from_numpy(names)
    return scores, padded
