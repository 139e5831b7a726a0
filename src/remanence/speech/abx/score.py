"""The ABX error of features: how often a token of a phone is nearer to another phone.

X and A are tokens of one phone, B is one of another: x is told apart where d(x, a) < d(x, b).
Equal distances count half. No classifier is trained. Cells, means and slicing are those of
Libri-light (arXiv 1912.07875) as computed by fastabx (arXiv 2505.02692).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from remanence.errors import InputError
from remanence.speech.abx.cells import Context, Speaker, encode, no_cells, tiles
from remanence.speech.abx.counting import count_cells
from remanence.speech.abx.distances import (
    ANGLES,
    SYMMETRIC,
    Distance,
    check_features,
    frame_norms,
)
from remanence.speech.abx.items import most_common
from remanence.speech.abx.pairs import Sequences
from remanence.speech.abx.slicing import Slicing, slice_frames
from remanence.speech.abx.statistics import (
    Aggregate,
    Cells,
    Mean,
    add_cells,
    cell_keys,
    p_value,
    speaker_interval,
    speaker_stderr,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from fractions import Fraction

    from numpy.typing import NDArray
    from torch import Tensor

    from remanence.speech.abx.items import Items

    Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Comparison:
    """The difference of two errors on the same cells.

    Attributes:
        difference: First error less second; below 0 where the first is better.
        stderr: Standard error over speakers, by the jackknife of the paired differences.
        interval: 95 % interval of Student's t.
        p_value: Two-sided, of no difference.
        cells: Number of cells in both.
        speakers: Number of speakers in them.
    """

    difference: float
    stderr: float
    interval: tuple[float, float]
    p_value: float
    cells: int
    speakers: int


@dataclass(frozen=True)
class AbxResult:
    """An ABX error.

    Attributes:
        error: From 0 to 1, chance being 0.5.
        stderr: Standard error over speakers, by the jackknife; NaN where there are too few.
        interval: 95 % interval over speakers, of the bootstrap or of Student's t.
        cells: The counts.
        aggregate: The mean taken.
        slicing: Which frames items had.
        dropped: Items without frames that were left out.
    """

    error: float
    stderr: float
    interval: tuple[float, float]
    cells: Cells
    aggregate: Aggregate
    slicing: Slicing
    dropped: int

    def table(self, by: str = "pair") -> dict[tuple[str, ...], float]:
        """Return errors by `pair` of phones, by `phone` of A and X, or by `speaker` of A and B.

        Each is the mean over its own cells that `aggregate` names.

        Raises:
            InputError: `by` is unknown.
        """
        cells = self.cells
        columns = {
            "pair": (cells.phone, cells.other),
            "phone": (cells.phone,),
            "speaker": (cells.speaker,),
        }
        if by not in columns:
            raise InputError(f"table by {by!r} is unknown: give one of {tuple(columns)}")
        names = cells.speakers if by == "speaker" else cells.phones
        rows, place = np.unique(np.stack(columns[by], 1), axis=0, return_inverse=True)
        order = np.argsort(place.ravel(), kind="stable")
        edges = np.searchsorted(place.ravel()[order], np.arange(1, len(rows)))
        result = {}
        for row, own in zip(rows.tolist(), np.split(order, edges), strict=True):
            part = _pick(cells, own)
            mean = Mean(part, part.error, self.aggregate)(np.ones(len(cells.speakers)))
            result[tuple(names[i] for i in row)] = mean
        return result

    def compare(self, other: AbxResult) -> Comparison:
        """Test whether the error of other features on the same cells is another.

        Cells that only one has, for want of frames in items, are left out. What is drawn, by
        `max_group` and `max_x_speakers`, is the same for both if the seed is.

        Raises:
            InputError: The results are of other items or means, or have no cell in common.
        """
        mine, theirs = self.cells, other.cells
        if (mine.contexts, mine.speakers, mine.phones, self.aggregate) != (
            theirs.contexts, theirs.speakers, theirs.phones, other.aggregate,
        ):  # fmt: skip
            raise InputError("the results are of different items or means: score both alike")
        keys = cell_keys([mine, theirs])
        common, first, second = np.intersect1d(
            keys[0], keys[1], assume_unique=True, return_indices=True
        )
        if not len(common):
            raise InputError("the results have no cell in common: score both alike")
        cells = _pick(mine, first)
        mean = Mean(cells, cells.error - theirs.error[second], self.aggregate)
        speakers = _speakers(cells)
        difference, stderr = mean(np.ones(len(cells.speakers))), speaker_stderr(mean, speakers)
        return Comparison(
            difference,
            stderr,
            speaker_interval(mean, speakers, stderr, 0, 0),
            p_value(difference, stderr, len(speakers)),
            len(common),
            len(speakers),
        )


def run(
    features: Mapping[str, Tensor],
    items: Items,
    *,
    frame_rate: float | Fraction | None = None,
    times: Mapping[str, Tensor] | None = None,
    distance: Distance = "angular",
    speaker: Speaker = "within",
    context: Context = "within",
    slicing: Slicing = "inclusive",
    aggregate: Aggregate = "librilight",
    max_group: int | None = None,
    max_x_speakers: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    bootstrap: int = 0,
    drop_empty: bool = False,
    shard: tuple[int, int] = (0, 1),
    tell: Callable[[int, int], None] | None = None,
) -> AbxResult:
    """Return the ABX error of features.

    Args:
        features: Features (T, D) of each file; a single column (T,) may stand for (T, 1).
        items: Which stretch of which file is which phone.
        frame_rate: Frames a second; or else
        times: Centres of the frames of each file in seconds (T,).
        distance: Between frames; see `frame_distances`.
        speaker: `within` one speaker, or `across`: X from another speaker than A and B.
        context: `within` the same neighbouring phones, or `any`.
        slicing: Which frames an item has; see `slice_frames`.
        aggregate: The mean over cells; see `Mean`.
        max_group: At most so many drawn items of each context, speaker and phone; None for all.
        max_x_speakers: Across, at most so many drawn speakers of X for each context, speaker and
            phone; None for all.
        seed: For what is drawn, the bootstrap included.
        device: Where to compute, with float64; the processor if None.
        bootstrap: Number of resamples of speakers for the interval; 0 for Student's t.
        drop_empty: Leave out items without a frame, as the official codes do, and count them.
        shard: Number of this shard and of all shards; `merge` adds them.
        tell: Called with the pairs of items that are done and those there are, after each table.

    Returns:
        The error, its standard error, and the counts of all cells.

    Raises:
        InputError: Features and items do not fit together, features are bad, an item has no frame,
            there is no cell, or an option is out of range.
    """
    if bootstrap < 0 or not 0 <= shard[0] < shard[1]:
        raise InputError(f"bootstrap {bootstrap}, shard {shard}: give 0 or more, and (i, n), i < n")
    matrices = {}
    for file in dict.fromkeys(items.file):
        if file in features:
            matrix = features[file].detach()
            matrices[file] = matrix.unsqueeze(1) if matrix.ndim == 1 else matrix
    check_features(matrices, distance)
    start, stop = slice_frames(
        items,
        {file: len(matrix) for file, matrix in matrices.items()},
        frame_rate=frame_rate,
        times=times,
        slicing=slicing,
    )
    empty = start == stop
    if empty.any() and not drop_empty:
        which = most_common(items.describe(i) for i in np.flatnonzero(empty).tolist())
        raise InputError(
            f"{int(empty.sum())} items have no frame: {which}; drop_empty leaves them out"
        )
    if empty.all():
        raise InputError("no item has a frame: check frame_rate against the items' times")
    dropped = int(empty.sum())
    sequences = _pack(matrices, items, start, stop, distance, device)
    # All items have numbers and are drawn from, and those without frames are dropped afterwards:
    # other features of the same items then have the same numbers and draws.
    coded = encode(items, context, max_group, seed)
    sequences = replace(
        sequences, start=sequences.start[coded.item], length=sequences.length[coded.item]
    )
    plan = tiles(coded, speaker, max_x_speakers, seed, symmetric=distance in SYMMETRIC)
    own = list(islice(plan, shard[0], None, shard[1]))
    if dropped:
        full = ~empty[coded.item]
        own = [tile.only(full) for tile in own]
        own = [tile for tile in own if len(tile.rows) and len(tile.columns)]
    cells = count_cells(sequences, coded, own, distance, speaker, tell)
    if not len(cells):
        if shard[1] == 1:
            raise no_cells(items[~empty], speaker, context)
        return AbxResult(np.nan, np.nan, (np.nan, np.nan), cells, aggregate, slicing, dropped)
    return _result(cells, aggregate, slicing, dropped, bootstrap, seed)


def merge(shards: list[AbxResult], *, bootstrap: int = 0, seed: int = 0) -> AbxResult:
    """Return the result of all shards, which equals that of one run in every bit.

    Raises:
        InputError: The shards differ in items or options, or hold no cell.
    """
    if not shards or len({(s.aggregate, s.slicing, s.dropped) for s in shards}) > 1:
        raise InputError("no shards, or shards with other options: score the same way in each")
    cells = add_cells([shard.cells for shard in shards])
    if not len(cells):
        raise InputError("the shards hold no cell: check the items")
    first = shards[0]
    return _result(cells, first.aggregate, first.slicing, first.dropped, bootstrap, seed)


def _result(
    cells: Cells, aggregate: Aggregate, slicing: Slicing, dropped: int, bootstrap: int, seed: int
) -> AbxResult:
    mean = Mean(cells, cells.error, aggregate)
    speakers = _speakers(cells)
    stderr = speaker_stderr(mean, speakers)
    interval = speaker_interval(mean, speakers, stderr, bootstrap, seed)
    error = mean(np.ones(len(cells.speakers)))
    return AbxResult(error, stderr, interval, cells, aggregate, slicing, dropped)


def _pack(
    matrices: Mapping[str, Tensor],
    items: Items,
    start: Integers,
    stop: Integers,
    distance: Distance,
    device: str | torch.device | None,
) -> Sequences:
    """Put the features of all files that have items with frames one after the other."""
    used = list(dict.fromkeys(items.file[start < stop]))
    widths = {(matrices[file].shape[1], matrices[file].dtype) for file in used}
    if len(widths) > 1:
        raise InputError(f"features differ in dimension or type, {widths}: use one encoder for all")
    place = torch.device("cpu" if device is None else device)
    if place.type == "mps":
        raise InputError("device 'mps' has no float64: use 'cpu' or 'cuda'")
    frames = matrices[used[0]].new_empty(
        (sum(len(matrices[file]) for file in used), matrices[used[0]].shape[1]), device=place
    )
    begins, end = {}, 0
    for file in used:
        begins[file], end = end, end + len(matrices[file])
        frames[begins[file] : end] = matrices[file]
    first = start + np.array([begins.get(file, 0) for file in items.file])
    norms = frame_norms(frames) if distance in ANGLES else None
    return Sequences(frames, first, stop - start, norms)


def _pick(cells: Cells, index: Integers) -> Cells:
    columns = {
        field.name: getattr(cells, field.name)[index]
        for field in fields(cells)
        if field.name not in {"contexts", "speakers", "phones"}
    }
    return replace(cells, **columns)


def _speakers(cells: Cells) -> Integers:
    return np.union1d(cells.speaker, cells.x_speaker)
