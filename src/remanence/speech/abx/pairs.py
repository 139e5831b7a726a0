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
COLUMNS = 2**23  # entries of the columns of one row, and of their frames, held by the processor
SPARE = 1.2  # frames padded over frames, from which the padding of distances costs less
FEW = 32  # items of which taking half the pairs saves nothing


@dataclass(frozen=True)
class Sequences:
    """Sequences of frames.

    Attributes:
        frames: All frames (F, D); sequences may share some.
        start: First frame of each (n,).
        length: Number of frames of each (n,), at least 1 for those that are compared.
        norms: Norms of the frames (F,), where the distance needs them.
    """

    frames: Tensor
    start: Integers
    length: Integers
    norms: Tensor | None = None

    def index(self, items: Integers) -> Integers:
        """Return the frames of items, one item after the other."""
        lengths = self.length[items]
        ends = lengths.cumsum()
        return np.repeat(self.start[items] - ends + lengths, lengths) + np.arange(ends[-1])

    def distances(self, rows: Integers, columns: Integers, distance: Distance) -> Tensor:
        """Return the distances of frames at an index to those at another."""
        i = torch.from_numpy(rows).to(self.frames.device)
        j = i if rows is columns else torch.from_numpy(columns).to(self.frames.device)
        x = self.frames[i].double() if self.frames.is_floating_point() else self.frames[i]
        y = x if rows is columns else self.frames[j]
        norms = None if self.norms is None else (self.norms[i], self.norms[j])
        return frame_distances(x, y, distance, norms)


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
    by_column = by_row if rows is columns else np.argsort(sequences.length[columns], kind="stable")
    forward = np.empty((len(rows), len(columns)), np.float32)
    backward = np.empty_like(forward) if both else forward
    for part in _parts(sequences, rows[by_row], columns, len(rows)):
        some = by_row[part]
        longest = int(sequences.length[rows[some[-1]]])
        for piece in _pieces(sequences, columns[by_column], longest):
            place = np.ix_(some, by_column[piece])
            ahead, back = _align(
                sequences, rows[some], columns[by_column[piece]], distance, both=both
            )
            forward[place] = ahead
            if both:
                backward[place] = back
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
        some, rest = order[part], order[part.start :]
        longest = int(sequences.length[items[some[-1]]])
        for piece in _pieces(sequences, items[rest], longest):
            others = rest[piece]
            ahead, back = _align(sequences, items[some], items[others], distance, both=True)
            result[np.ix_(some, others)] = ahead
            result[np.ix_(others, some)] = back.T
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


def _pieces(sequences: Sequences, columns: Integers, longest: int) -> Iterator[slice]:
    """Cut columns, sorted by length, into pieces whose tables with one row fit."""
    lengths = sequences.length[columns]
    processor = sequences.frames.device.type == "cpu"
    room = (COLUMNS if processor else DEVICE_TABLE) // max(longest, sequences.frames.shape[1])
    together = 1
    if processor:
        from remanence.speech.abx.compiled import LANES  # numba takes time to import

        together = LANES
    start = 0
    while start < len(columns):
        rest = lengths[start:]
        frames = rest.cumsum() if processor else rest * np.arange(1, len(rest) + 1)
        size = int(np.searchsorted(frames, room, "right")) // together * together
        stop = min(start + max(size, together), len(columns))
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
    lanes = np.minimum(np.arange(groups * LANES), len(columns) - 1)
    lengths = sequences.length[columns]
    length = lengths[lanes].reshape(groups, LANES)
    widths = length.max(1)
    # Frame j of each sequence of a group beside one another; the last one stands for what lacks.
    place = np.minimum(np.arange(widths.max())[:, None], lengths[lanes] - 1)
    place += (lengths.cumsum() - lengths)[lanes]
    index = np.concatenate(
        [place[: widths[g], g * LANES : (g + 1) * LANES].ravel() for g in range(groups)]
    )
    own = sequences.index(columns)
    theirs = own if np.array_equal(rows, columns) else sequences.index(rows)
    if len(index) > SPARE * len(own):
        table = sequences.distances(theirs, own, distance)
        table = table.index_select(1, torch.from_numpy(index))
    else:
        table = sequences.distances(theirs, own[index], distance)
    first = np.concatenate(([0], sequences.length[rows].cumsum()))
    ahead, back = dtw_strip(table.numpy(), first, widths, lengths[lanes], both=both)
    return ahead[:, : len(columns)], back[:, : len(columns)]


def _align_padded(
    sequences: Sequences, rows: Integers, columns: Integers, distance: Distance, *, both: bool
) -> tuple[Floats, Floats]:
    device = sequences.frames.device
    table = sequences.distances(sequences.index(rows), sequences.index(columns), distance)
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
