"""The counts of a table's cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from remanence.speech.abx.pairs import Sequences, item_distances, mutual_distances
from remanence.speech.abx.statistics import Cells, add_cells

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from remanence.speech.abx.cells import Coded, Speaker, Tile
    from remanence.speech.abx.distances import Distance

    Integers = NDArray[np.int64]

CELLS = 2**18  # speakers of X by speakers by pairs of phones that are counted at a time


def count_cells(
    sequences: Sequences,
    coded: Coded,
    plan: Sequence[Tile],
    distance: Distance,
    speaker: Speaker,
    tell: Callable[[int, int], None] | None = None,
) -> Cells:
    """Return the counts of the cells of all tables in the plan.

    Args:
        sequences: The frames of the items, in the order of `coded`.
        coded: The items.
        plan: The tables; one at a time is held.
        distance: Between frames.
        speaker: `within` or `across`.
        tell: Called with the pairs of items that are done and those there are, after each table.
    """
    tables: list[Integers] = []
    done, total = 0, sum(len(tile.rows) * len(tile.columns) for tile in plan)
    for tile in plan:
        for table, rows, columns in _tables(sequences, tile, distance):
            tables += _count(coded, table, rows, columns, speaker)
        done += len(tile.rows) * len(tile.columns)
        if tell is not None:
            tell(done, total)
    joined = np.concatenate(tables, 1) if tables else np.zeros((7, 0), np.int64)
    context, a, x, p, q, wrong, triplets = joined
    names = coded.contexts, coded.speakers, coded.phones
    return add_cells([Cells(context, a, x, p, q, wrong, triplets, *names)])


def _tables(
    sequences: Sequences, tile: Tile, distance: Distance
) -> Iterator[tuple[NDArray[np.float32], Integers, Integers]]:
    if tile.rows is tile.columns:
        yield mutual_distances(sequences, tile.rows, distance), tile.rows, tile.rows
        return
    ahead, back = item_distances(sequences, tile.rows, tile.columns, distance, both=tile.both)
    yield ahead, tile.rows, tile.columns
    if tile.both:
        yield np.ascontiguousarray(back.T), tile.columns, tile.rows


def _count(
    coded: Coded,
    table: NDArray[np.float32],
    rows: Integers,
    columns: Integers,
    speaker: Speaker,
) -> Iterator[Integers]:
    """Yield the counts of a table (7, cells), if it has any."""
    from remanence.speech.abx.compiled import count  # numba takes time to import

    halves = _halves(coded, rows, columns)
    if halves is not None:
        for upper, left in halves:
            part = np.ascontiguousarray(table[upper, left])
            yield from _count(coded, part, rows[upper], columns[left], speaker)
        return
    x_speakers, x_speaker = np.unique(coded.speaker[rows], return_inverse=True)
    speakers, y_speaker = np.unique(coded.speaker[columns], return_inverse=True)
    phones, y_phone = np.unique(coded.phone[columns], return_inverse=True)
    if rows is columns:
        x_phone = y_phone
    else:
        # A phone that no column has can be in no cell.
        known = np.isin(coded.phone[rows], phones)
        rows, table, x_speaker = rows[known], table[known], x_speaker[known]
        x_phone = np.searchsorted(phones, coded.phone[rows])
    same = x_speakers[:, None] == speakers
    wanted = same if speaker == "within" else ~same
    x_count = np.zeros((len(x_speakers), len(phones)), np.int64)
    y_count = np.zeros((len(speakers), len(phones)), np.int64)
    np.add.at(x_count, (x_speaker, x_phone), 1)
    np.add.at(y_count, (y_speaker, y_phone), 1)
    targets = np.maximum(y_count - (speaker == "within"), 0)
    triplets = x_count[:, None, :, None] * (targets[:, :, None] * y_count[:, None, :])
    triplets *= wanted[:, :, None, None] & ~np.eye(len(phones), dtype=bool)
    found = np.nonzero(triplets)
    if not len(found[0]):
        return
    wrong = count(table, (rows, x_speaker, x_phone), (columns, y_speaker, y_phone), wanted,
                  len(phones))  # fmt: skip
    x, y, p, q = found
    context = np.full(len(x), coded.context[columns[0]])
    yield np.stack(
        (context, speakers[y], x_speakers[x], phones[p], phones[q], wrong[found], triplets[found])
    )


def _halves(
    coded: Coded, rows: Integers, columns: Integers
) -> tuple[tuple[slice, slice], ...] | None:
    """Cut a table of too many speakers and phones between speakers; None for one that is small.

    Most of the cells of such a table would be empty: few speakers say all phones.
    """
    x_speaker, y_speaker = coded.speaker[rows], coded.speaker[columns]
    many_x, many_y = (int((np.diff(s) != 0).sum()) + 1 for s in (x_speaker, y_speaker))
    phones = len(np.unique(coded.phone[columns]))
    if many_x * many_y * phones**2 <= CELLS or many_x == many_y == 1:
        return None
    longer = y_speaker if many_y >= many_x else x_speaker
    edges = np.flatnonzero(np.diff(longer)) + 1
    cut = int(edges[len(edges) // 2])
    every, first, second = slice(None), slice(None, cut), slice(cut, None)
    if longer is y_speaker:
        return (every, first), (every, second)
    return (first, every), (second, every)
