"""Exact nearest neighbours, and how many of them a search finds.

faiss proposes candidates from float32 products, which may order near ties wrongly. Their distances
are then computed again in float64, so that equal rows tie and the smaller number comes first,
whatever the chunks, threads or machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import faiss
import numpy as np

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

Metric = Literal["l2", "cosine", "ip"]
FAISS = {"l2": faiss.METRIC_L2, "cosine": faiss.METRIC_INNER_PRODUCT}
FAISS["ip"] = FAISS["cosine"]
ROWS = 65_536  # base vectors at a time
ENTRIES = 2**22  # float64 entries of differences held at a time: 32 MiB
SPARE = 16  # candidates beyond k, for near ties


def exact_neighbours(
    queries: ArrayLike,
    base: NDArray[Any] | Iterable[NDArray[Any]],
    k: int,
    metric: Metric = "l2",
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the k nearest base vectors of each query, nearest first, ties by smaller number.

    Args:
        queries: (q, d), real numbers.
        base: (n, d), or chunks of it in order, which need not fit into memory together. They are
            used as float32.
        k: Neighbours, 1 to n.
        metric: "l2" (squared Euclidean distance, smaller is nearer), "cosine" (similarity, larger
            is nearer) or "ip" (inner product, larger is nearer).

    Returns:
        Numbers (q, k), int64, and distances or similarities (q, k), float32.

    Raises:
        InputError: Shapes do not match, a row is not finite, a cosine is asked of a zero vector,
            or there are fewer than k base vectors.
    """
    if metric not in FAISS:
        raise InputError(f"metric {metric!r}: give l2, cosine or ip")
    if k < 1:
        raise InputError(f"{k} neighbours: give at least 1")
    asked = _table(queries, "query", 0, metric)
    ids = np.empty((len(asked), 0), np.int64)
    costs = np.empty((len(asked), 0))  # smaller is nearer, in every metric
    seen = 0
    for chunk in _chunks(base):
        rows = _table(chunk, "base", seen, metric)
        if rows.shape[1] != asked.shape[1]:
            raise InputError(
                f"base vectors of dimension {rows.shape[1]} for queries of {asked.shape[1]}: "
                "give vectors of one kind"
            )
        found, cost = _nearest(asked, rows, min(k, len(rows)), metric)
        # Earlier chunks stand first, so that a stable sort leaves ties to the smaller number.
        ids = np.concatenate([ids, found + seen], axis=1)
        costs = np.concatenate([costs, cost], axis=1)
        order = np.argsort(costs, axis=1, kind="stable")[:, :k]
        ids, costs = np.take_along_axis(ids, order, 1), np.take_along_axis(costs, order, 1)
        seen += len(rows)
    if seen < k:
        raise InputError(f"{k} neighbours among {seen} base vectors: ask for at most {seen}")
    return ids, (costs if metric == "l2" else -costs).astype(np.float32)


def recall_hits(
    found: ArrayLike, truth: ArrayLike, ks: Sequence[int] = (1, 10, 100)
) -> dict[int, NDArray[np.bool_]]:
    """Tell for each query whether its true nearest neighbour is among the first R found.

    Args:
        found: Numbers (q, K) that a search gave, best first; -1 where it gave fewer.
        truth: Number of the true nearest neighbour of each query (q,), or a ground truth (q, any),
            of which the first column counts.
        ks: Values of R, each 1 to K.

    Returns:
        (q,) bool for each R, from which intervals and paired tests can be computed.

    Raises:
        InputError: Shapes or types do not match, or an R is out of range.
    """
    ids, right = np.asarray(found), np.asarray(truth)
    right = right[:, 0] if right.ndim == 2 and right.shape[1] else right
    if ids.ndim != 2 or right.shape != ids.shape[:1] or not ids.size:
        raise InputError(
            f"lists of shape {ids.shape} against a truth of {np.shape(truth)}: give (q, K), (q,)"
        )
    if ids.dtype.kind not in "iu" or right.dtype.kind not in "iu":
        raise InputError(f"numbers of {ids.dtype} and {right.dtype}: give integers")
    if right.min() < 0:
        raise InputError(f"query {right.argmin()} has no true neighbour: leave it out")
    for k in ks:
        if not 1 <= k <= ids.shape[1]:
            raise InputError(f"recall at {k} of lists of {ids.shape[1]}: search for at least {k}")
    same = ids == right[:, None]
    return {k: same[:, :k].any(1) for k in ks}


def recall_at(
    found: ArrayLike, truth: ArrayLike, ks: Sequence[int] = (1, 10, 100)
) -> dict[int, float]:
    """Return the share of queries whose true nearest neighbour is among the first R: 1-recall@R.

    Arguments and errors as `recall_hits`.
    """
    return {k: float(hits.mean()) for k, hits in recall_hits(found, truth, ks).items()}


def _chunks(base: NDArray[Any] | Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    for part in [base] if isinstance(base, np.ndarray) else base:
        if part.ndim != 2:
            raise InputError(f"base vectors of shape {part.shape}: give (n, d)")
        for start in range(0, len(part), ROWS):
            yield part[start : start + ROWS]


def _table(values: ArrayLike, what: str, first: int, metric: str) -> NDArray[np.float32]:
    rows = np.ascontiguousarray(values, np.float32)
    if rows.ndim != 2 or not rows.size:
        raise InputError(f"{what} vectors of shape {rows.shape}: give (n, d), at least one")
    finite = np.isfinite(rows).all(1)
    if not finite.all():
        raise InputError(f"{what} row {first + finite.argmin()} holds NaN or infinity")
    if metric == "cosine" and not rows.any(1).all():
        number = first + rows.any(1).argmin()
        raise InputError(f"{what} row {number} is zero: leave it out, it has no direction")
    return rows


def _nearest(
    queries: NDArray[np.float32], rows: NDArray[np.float32], k: int, metric: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the k nearest rows (q, k) in exact order, and their costs."""
    wide = min(k + SPARE, len(rows))
    compared = (_unit(queries), _unit(rows)) if metric == "cosine" else (queries, rows)
    candidates: NDArray[np.int64]
    _, candidates = faiss.knn(*compared, wide, metric=FAISS[metric])
    candidates.sort(axis=1)  # so that a stable sort by cost leaves ties to the smaller number
    costs = np.empty(candidates.shape)
    part = max(ENTRIES // (wide * rows.shape[1]), 1)
    for start in range(0, len(queries), part):
        some = slice(start, start + part)
        costs[some] = _cost(queries[some, None], rows[candidates[some]], metric)
    order = np.argsort(costs, axis=1, kind="stable")
    ids, costs = np.take_along_axis(candidates, order, 1), np.take_along_axis(costs, order, 1)
    if wide < len(rows):
        # A row left out might be as near as the k-th where the candidates' costs are within the
        # error of faiss's float32 sums; then every row is looked at.
        asked, given = (np.einsum("nd,nd->n", x, x, dtype=np.float64) for x in compared)
        error = (2 * rows.shape[1] + 8) * 2.0**-24 * (asked + given.max())
        for query in np.flatnonzero(costs[:, -1] - costs[:, k - 1] <= 2 * error):
            ids[query, :k], costs[query, :k] = _look_at_all(queries[query], rows, k, metric)
    return ids[:, :k], costs[:, :k]


def _look_at_all(
    query: NDArray[np.float32], rows: NDArray[np.float32], k: int, metric: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    part = max(ENTRIES // rows.shape[1], 1)
    costs = np.concatenate(
        [_cost(query, rows[start : start + part], metric) for start in range(0, len(rows), part)]
    )
    best = np.argsort(costs, kind="stable")[:k]
    return best, costs[best]


def _cost(
    queries: NDArray[np.float32], rows: NDArray[np.float32], metric: str
) -> NDArray[np.float64]:
    """Return what to minimise, in float64, along the last axis."""
    if metric == "l2":
        gaps = np.subtract(queries, rows, dtype=np.float64)
        return np.asarray(np.square(gaps, out=gaps).sum(-1))
    products = np.asarray(np.multiply(queries, rows, dtype=np.float64).sum(-1))
    return -products / (_length(queries) * _length(rows)) if metric == "cosine" else -products


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return (rows / _length(rows)[..., None]).astype(np.float32)


def _length(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return lengths along the last axis; in float64, no square of a float32 overflows."""
    return np.asarray(np.sqrt(np.square(rows, dtype=np.float64).sum(-1)))
