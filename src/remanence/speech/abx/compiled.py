"""DTW and counting on the processor, compiled: the same results as in torch, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from remanence.kernels import in_threads, kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float32]
    Integers = NDArray[np.int64]

LANES = 16  # sequences that take a step together, which become vector instructions
SHARE = 2**20  # cells that are worth a thread


def dtw(distance: Tensor, n: Tensor, m: Tensor) -> Tensor:
    """Return the DTW of distances (P, N, M), float32; see `remanence.speech.abx.dtw.dtw`."""
    result = np.empty(len(distance), np.float32)
    given, rows, columns = distance.contiguous().numpy(), n.numpy(), m.numpy()

    def run(start: int, stop: int) -> None:
        _pairs(given[start:stop], rows[start:stop], columns[start:stop], result[start:stop])

    in_threads(run, len(result), given.size // SHARE)
    return torch.from_numpy(result)


def dtw_strip(
    distance: Floats, first: Integers, widths: Integers, lengths: Integers, *, both: bool
) -> tuple[Floats, Floats]:
    """Return the DTW of all sequences along the rows with all along the columns.

    Columns come in groups of LANES sequences, padded to one width: frame j of sequence l of a group
    is its column j * LANES + l.

    Args:
        distance: Distances between frames (rows, columns).
        first: The first row of each of X sequences, and the end (X + 1,).
        widths: Frames of each of G groups (G,).
        lengths: Frames of each sequence of the groups (G * LANES,).
        both: Whether to give the DTW of the transposed matrices too.

    Returns:
        The DTW (X, G * LANES), and that of the transposes.
    """
    forward = np.empty((len(first) - 1, len(lengths)), np.float32)
    backward = np.empty_like(forward) if both else forward

    def run(start: int, stop: int) -> None:
        _strip(
            distance, first[start : stop + 1], widths, lengths, int(widths.max()),
            forward[start:stop], backward[start:stop], both,
        )  # fmt: skip

    in_threads(run, len(forward), distance.size // SHARE)
    return forward, backward


def count(
    distance: Floats,
    x: tuple[Integers, Integers, Integers],
    y: tuple[Integers, Integers, Integers],
    wanted: NDArray[np.bool_],
    phones: int,
) -> Integers:
    """Count errors: d(x, a) > d(x, b) twice, d(x, a) = d(x, b) once.

    Args:
        distance: Distances from X to the candidates for A and B (nx, ny).
        x: Item, speaker and phone of the rows (nx,); speakers and phones are numbered from 0.
        y: Likewise of the columns (ny,), speaker by speaker.
        wanted: Which speakers of X go with which speakers of A and B (sx, sy).
        phones: Number of phones.

    Returns:
        Counts (sx, sy, phone of A and X, phone of B), int64.
    """
    result = np.zeros((*wanted.shape, phones, phones), np.int64)
    edges = np.searchsorted(y[1], np.arange(wanted.shape[1] + 1)).astype(np.int64)
    _count(distance, *x, y[0], y[2], edges, wanted, result)
    return result


@kernel
def _align(
    distance: Floats,
    row: int,
    column: int,
    n: Integers,
    m: Integers,
    columns: int,
    cost: Floats,
    length: Floats,
    left: Floats,
    left_length: Floats,
    diagonal: Floats,
    diagonal_length: Floats,
    tied: Floats,
    left_first: bool,
    result: Floats,
) -> None:
    """Align LANES pairs at once; `cost` and `length` (M, LANES) hold the row above, then this."""
    lanes = len(n)
    one, none = np.float32(1), np.float32(0)
    rows = 0
    for k in range(lanes):
        rows = max(rows, n[k])
    for j in range(columns):
        for k in range(lanes):
            cost[j, k], length[j, k] = np.inf, 0
    for i in range(rows):
        for k in range(lanes):
            left[k], left_length[k] = np.inf, 0
            # Before (0, 0) lies a path of no length and no cost.
            diagonal[k], diagonal_length[k] = np.inf if i else 0, 0
        for j in range(columns):
            start = column + j * lanes
            # An array for each thing and one place in each: only so does it become vector code.
            for k in range(lanes):
                up, beside, across = cost[j, k], left[k], diagonal[k]
                up_length, beside_length = length[j, k], left_length[k]
                turn = beside <= up if left_first else beside < up
                best = beside if turn else up
                best_length = beside_length if turn else up_length
                straight = across <= best
                total = (across if straight else best) + distance[row + i, start + k]
                steps = (diagonal_length[k] if straight else best_length) + one
                tied[k] = max(tied[k], one if (beside == up) & (across > beside) else none)
                diagonal[k], diagonal_length[k] = up, up_length
                left[k], left_length[k] = total, steps
                cost[j, k], length[j, k] = total, steps
        for k in range(lanes):
            if n[k] == i + 1:
                result[k] = cost[m[k] - 1, k] / length[m[k] - 1, k]


@kernel
def _strip(
    distance: Floats,
    first: Integers,
    widths: Integers,
    lengths: Integers,
    columns: int,
    forward: Floats,
    backward: Floats,
    both: bool,
) -> None:
    cost = np.empty((columns, LANES), np.float32)
    length = np.empty_like(cost)
    left, left_length = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    diagonal, diagonal_length = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    tied = np.zeros(LANES, np.float32)
    found = np.empty(LANES, np.float32)
    n = np.empty(LANES, np.int64)
    for x in range(len(first) - 1):
        for k in range(LANES):
            n[k] = first[x + 1] - first[x]
        column = 0
        for g in range(len(widths)):
            start, stop = g * LANES, (g + 1) * LANES
            for k in range(LANES):
                tied[k] = 0
            for way in range(2 if both else 1):
                # Backwards, left and above change places: that makes a difference only where they
                # were equal.
                again = way == 0
                for k in range(LANES):
                    again |= tied[k] > 0
                if again:
                    _align(
                        distance, first[x], column, n, lengths[start:stop], widths[g], cost,
                        length, left, left_length, diagonal, diagonal_length, tied, way == 0, found,
                    )  # fmt: skip
                for k in range(LANES):
                    if way == 0:
                        forward[x, start + k] = found[k]
                    else:
                        backward[x, start + k] = found[k]
            column += widths[g] * LANES


@kernel
def _pairs(distance: Floats, n: Integers, m: Integers, result: Floats) -> None:
    P, N, M = distance.shape
    lanes = np.zeros((N, M * LANES), np.float32)
    cost = np.empty((M, LANES), np.float32)
    length = np.empty_like(cost)
    left, left_length = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    diagonal, diagonal_length = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    tied = np.zeros(LANES, np.float32)
    rows, columns = np.ones(LANES, np.int64), np.ones(LANES, np.int64)
    found = np.empty(LANES, np.float32)
    for start in range(0, P, LANES):
        size = min(LANES, P - start)
        for k in range(size):
            rows[k], columns[k] = n[start + k], m[start + k]
            for i in range(rows[k]):
                for j in range(columns[k]):
                    lanes[i, j * LANES + k] = distance[start + k, i, j]
        _align(
            lanes, 0, 0, rows, columns, M, cost, length, left, left_length, diagonal,
            diagonal_length, tied, True, found,
        )  # fmt: skip
        for k in range(size):
            result[start + k] = found[k]


@kernel
def _count(
    distance: Floats,
    x_item: Integers,
    x_speaker: Integers,
    x_phone: Integers,
    y_item: Integers,
    y_phone: Integers,
    edges: Integers,
    wanted: NDArray[np.bool_],
    result: Integers,
) -> None:
    phones = result.shape[2]
    nearer = np.zeros(phones, np.int64)
    for x in range(len(x_item)):
        p = x_phone[x]
        for s in range(len(edges) - 1):
            if not wanted[x_speaker[x], s]:
                continue
            begin, end = edges[s], edges[s + 1]
            d = distance[x, begin:end]
            order = np.argsort(d)
            nearer[:] = 0
            # From the nearest on, one set of equally near candidates after the other.
            low = 0
            while low < len(d):
                targets = 0
                high = low
                while high < len(d) and d[order[high]] == d[order[low]]:
                    y = begin + order[high]
                    targets += y_phone[y] == p and y_item[y] != x_item[x]
                    high += 1
                if targets:
                    for q in range(phones):
                        result[x_speaker[x], s, p, q] += 2 * targets * nearer[q]
                for i in range(low, high):
                    q = y_phone[begin + order[i]]
                    if q != p:
                        result[x_speaker[x], s, p, q] += targets
                        nearer[q] += 1
                low = high
