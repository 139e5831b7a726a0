"""Distances between items: frames against frames by one product, then DTW over all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from remanence.speech.abx.distances import SYMMETRIC, Distance, frame_distances
from remanence.speech.abx.dtw import dtw_both_ways, wavefront

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float32]
    Integers = NDArray[np.int64]

TABLE = 2**19  # distances between frames held at a time by the processor, to stay in its cache
DEVICE_TABLE = 2**25  # entries of padded matrices held at a time by another device
FEW = 32  # items of which taking half the pairs saves nothing


@dataclass(frozen=True)
class Sequences:
    """Sequences of frames.

    Attributes:
        frames: All frames (F, D); sequences may share some.
        start: First frame of each (n,).
        length: Number of frames of each, at least 1 (n,).
    """

    frames: Tensor
    start: Integers
    length: Integers

    def index(self, items: Integers) -> Integers:
        """Return the frames of items, one item after the other."""
        lengths = self.length[items]
        ends = lengths.cumsum()
        return np.repeat(self.start[items] - ends + lengths, lengths) + np.arange(ends[-1])

    def take(self, index: Integers) -> Tensor:
        """Return frames at an index."""
        return self.frames[torch.from_numpy(index).to(self.frames.device)]


def item_distances(
    sequences: Sequences, rows: Integers, columns: Integers, distance: Distance, *, both: bool
) -> tuple[Floats, Floats]:
    """Return the distances, called (row, column), of all rows to all columns.

    Args:
        sequences: The items' frames.
        rows: Items (X,).
        columns: Items (Y,).
        distance: Between frames.
        both: Whether to give the distances called (column, row) too, for symmetric `distance`.

    Returns:
        Distances (X, Y), float32, and those called the other way (X, Y).
    """
    by_row = np.argsort(sequences.length[rows], kind="stable")
    by_column = np.argsort(sequences.length[columns], kind="stable")
    forward = np.empty((len(rows), len(columns)), np.float32)
    backward = np.empty_like(forward) if both else forward
    for part in _parts(sequences, rows[by_row], columns, len(rows)):
        ahead, back = _align(sequences, rows[by_row[part]], columns[by_column], distance, both=both)
        forward[np.ix_(by_row[part], by_column)] = ahead
        if both:
            backward[np.ix_(by_row[part], by_column)] = back
    return forward, backward


def mutual_distances(sequences: Sequences, items: Integers, distance: Distance) -> Floats:
    """Return the distances, called (row, column), of items to one another (n, n), float32.

    Those of a symmetric distance are taken once for each pair of items.
    """
    if distance not in SYMMETRIC or len(items) <= FEW:
        return item_distances(sequences, items, items, distance, both=False)[0]
    order = np.argsort(sequences.length[items], kind="stable")
    ordered = items[order]
    result = np.empty((len(items), len(items)), np.float32)
    for part in _parts(sequences, ordered, ordered, -(-len(items) // 8)):
        ahead, back = _align(sequences, ordered[part], ordered[part.start :], distance, both=True)
        result[np.ix_(order[part], order[part.start :])] = ahead
        result[np.ix_(order[part.stop :], order[part])] = back[:, part.stop - part.start :].T
    return result


def _parts(sequences: Sequences, rows: Integers, columns: Integers, most: int) -> Iterator[slice]:
    """Cut rows, sorted by length, into parts whose tables fit, of at most so many rows."""
    lengths = sequences.length
    start = 0
    while start < len(rows):
        stop = min(start + most, len(rows))
        longest = int(lengths[rows[stop - 1]])
        if sequences.frames.device.type == "cpu":
            size = TABLE // (int(lengths[columns].sum()) * longest)
        else:
            size = DEVICE_TABLE // (len(columns) * int(lengths[columns].max()) * longest)
        stop = min(start + max(size, 1), stop)
        yield slice(start, stop)
        start = stop


def _align(
    sequences: Sequences, rows: Integers, columns: Integers, distance: Distance, *, both: bool
) -> tuple[Floats, Floats]:
    """Align all rows with all columns, each sorted by length."""
    if sequences.frames.device.type == "cpu":
        return _align_compiled(sequences, rows, columns, distance, both=both)
    return _align_padded(sequences, rows, columns, distance, both=both)


def _align_compiled(
    sequences: Sequences, rows: Integers, columns: Integers, distance: Distance, *, both: bool
) -> tuple[Floats, Floats]:
    from remanence.speech.abx.compiled import LANES, dtw_strip  # numba takes time to import

    groups = -(-len(columns) // LANES)
    lanes = np.minimum(np.arange(groups * LANES), len(columns) - 1).reshape(groups, LANES)
    start, length = sequences.start[columns][lanes], sequences.length[columns][lanes]
    widths = length.max(1)
    index = [
        (start[g] + np.minimum(np.arange(widths[g])[:, None], length[g] - 1)).ravel()
        for g in range(groups)
    ]
    table = frame_distances(
        sequences.take(sequences.index(rows)), sequences.take(np.concatenate(index)), distance
    )
    first = np.concatenate(([0], sequences.length[rows].cumsum()))
    ahead, back = dtw_strip(table.numpy(), first, widths, length.ravel(), both=both)
    return ahead[:, : len(columns)], back[:, : len(columns)]


def _align_padded(
    sequences: Sequences, rows: Integers, columns: Integers, distance: Distance, *, both: bool
) -> tuple[Floats, Floats]:
    device = sequences.frames.device
    table = frame_distances(
        sequences.take(sequences.index(rows)), sequences.take(sequences.index(columns)), distance
    )
    n, m = (torch.from_numpy(sequences.length[items]).to(device) for items in (rows, columns))
    i, j = (
        (lengths.cumsum(0) - lengths)[:, None]
        + torch.minimum(torch.arange(int(lengths.max()), device=device), lengths[:, None] - 1)
        for lengths in (n, m)
    )
    pairs = table[i[:, None, :, None], j[None, :, None, :]].flatten(0, 1)  # (X Y, N, M)
    n, m = n.repeat_interleave(len(columns)), m.repeat(len(rows))
    if both:
        ahead, back = dtw_both_ways(pairs, n, m)
    else:
        ahead = back = wavefront(pairs, n, m)[0]
    shape = (len(rows), len(columns))
    return ahead.view(shape).cpu().numpy(), back.view(shape).cpu().numpy()
