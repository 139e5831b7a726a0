"""Cells: the sets A, B and X of items that are compared, and the tables of distances they need.

Within speakers, A and X are all items of one phone, context and speaker, B those of another phone.
Across speakers, A and B are one speaker's and X is another's, of the phone and context of A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from remanence.errors import InputError
from remanence.speech.abx.statistics import number_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from remanence.speech.abx.items import Items

    Integers = NDArray[np.int64]

Speaker = Literal["within", "across"]
Context = Literal["within", "any"]

BIN = 512  # items of a table's side, where speakers can be taken together
SIZES = (
    None,
    100,
    64,
    48,
    32,
    24,
    16,
    12,
    8,
    6,
    5,
    4,
    3,
    2,
)  # tokens that thinning leaves, in turn
SPREAD = 0.75  # share of the speakers that a subsample should hold
SIDE = 4096  # items above which a table is cut


@dataclass(frozen=True)
class Coded:
    """Items as numbers, ordered by context, speaker, phone, file and onset.

    Attributes:
        item: Which item each is (n,).
        context: Number of its context (n,).
        speaker: Number of its speaker (n,).
        phone: Number of its phone (n,).
        contexts: Names of the contexts; see `context_names`.
        speakers: Names of the speakers.
        phones: Names of the phones.
    """

    item: Integers
    context: Integers
    speaker: Integers
    phone: Integers
    contexts: tuple[str, ...]
    speakers: tuple[str, ...]
    phones: tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """A table of distances: rows as X, columns as A and B; with `both`, also the reverse.

    Rows and columns are places in `Coded`, each ordered by speaker. Where they are the same array,
    the table holds all its items as X, A and B.
    """

    rows: Integers
    columns: Integers
    both: bool = False

    def only(self, kept: NDArray[np.bool_]) -> Tile:
        """Return the table of the items that are kept, a mask of those in `Coded`."""
        rows = self.rows[kept[self.rows]]
        if self.rows is self.columns:
            return Tile(rows, rows, self.both)
        return Tile(rows, self.columns[kept[self.columns]], self.both)


def context_names(items: Items, context: Context) -> list[str]:
    """Name the context of each item: the phones before and after with a tab between, or "any"."""
    if context == "any":
        return ["any"] * len(items)
    return [f"{a}\t{b}" for a, b in zip(items.prev, items.next, strict=True)]


def encode(items: Items, context: Context, max_group: int | None, seed: int) -> Coded:
    """Number the items, and take at most `max_group` of each context, speaker and phone.

    Raises:
        InputError: An option is out of range.
    """
    if context not in get_args(Context):
        raise InputError(f"context {context!r} is unknown: give one of {get_args(Context)}")
    if max_group is not None and max_group < 2:
        raise InputError(f"max_group {max_group}: give at least 2 items, or None for all")
    names, codes = [], []
    for column in (context_names(items, context), items.speaker, items.phone):
        unique, inverse = np.unique(np.asarray(column, dtype=str), return_inverse=True)
        names.append(tuple(unique.tolist()))
        codes.append(inverse.astype(np.int64).ravel())
    files = np.unique(np.asarray(items.file, dtype=str), return_inverse=True)[1].ravel()
    order = np.lexsort((items.offset, items.onset, files, codes[2], codes[1], codes[0]))
    if max_group is not None:
        rng = np.random.default_rng(seed)
        groups = number_rows(
            *((code[order], len(name)) for code, name in zip(codes, names, strict=True))
        )
        drawn = np.lexsort((rng.random(len(order)), groups))
        first = np.searchsorted(groups, groups)  # the place where an item's group begins
        order = order[np.sort(drawn[np.arange(len(order)) - first < max_group])]
    numbers = [code[order] for code in codes]
    return Coded(order, numbers[0], numbers[1], numbers[2], names[0], names[1], names[2])


def tiles(
    coded: Coded, speaker: Speaker, max_x_speakers: int | None, seed: int, *, symmetric: bool
) -> Iterator[Tile]:
    """Yield tables that hold each cell's distances once.

    Args:
        coded: The items.
        speaker: `within` or `across`.
        max_x_speakers: Across, at most so many drawn speakers of X for each context, speaker and
            phone.
        seed: For the draw.
        symmetric: Whether one table can serve both directions.

    Raises:
        InputError: An option is out of range.
    """
    if speaker not in get_args(Speaker):
        raise InputError(f"speaker {speaker!r} is unknown: give one of {get_args(Speaker)}")
    if max_x_speakers is not None and max_x_speakers < 1:
        raise InputError(f"max_x_speakers {max_x_speakers}: give at least 1, or None for all")
    for places in _runs(coded.context, np.arange(len(coded.item))):
        people = _runs(coded.speaker, places)
        plan: Iterator[Tile]
        if speaker == "within":
            plan = (Tile(own, own) for own in people if _has_cells(coded, own))
        elif max_x_speakers is not None:
            plan = _drawn(coded, people, max_x_speakers, seed)
        else:
            plan = _all_across(coded, people, symmetric=symmetric)
        for tile in plan:
            yield from _cut(tile)


def _runs(values: Integers, places: Integers) -> list[Integers]:
    """Split places where values change."""
    return np.split(places, np.flatnonzero(np.diff(values[places])) + 1)


def _has_cells(coded: Coded, own: Integers) -> bool:
    """Tell whether one speaker's items of a context hold two phones, one of them twice."""
    phones = coded.phone[own]
    return len(own) > 2 and phones[0] != phones[-1] and bool((phones[1:] == phones[:-1]).any())


def _drawn(coded: Coded, people: list[Integers], most: int, seed: int) -> Iterator[Tile]:
    """Yield for each speaker of A and B the items of the drawn speakers of X."""
    by_phone: dict[int, list[tuple[int, Integers]]] = {}
    for own in people:
        for group in _runs(coded.phone, own):
            by_phone.setdefault(int(coded.phone[group[0]]), []).append(
                (int(coded.speaker[own[0]]), group)
            )
    for own in people:
        phones = np.unique(coded.phone[own])
        if len(phones) < 2:
            continue
        speaker = int(coded.speaker[own[0]])
        rng = np.random.default_rng((seed, int(coded.context[own[0]]), speaker))
        rows = []
        for phone in phones.tolist():
            others = [group for who, group in by_phone[phone] if who != speaker]
            if len(others) > most:
                others = [others[i] for i in rng.choice(len(others), most, replace=False)]
            rows += others
        if rows:
            yield Tile(np.sort(np.concatenate(rows)), own)


def _all_across(coded: Coded, people: list[Integers], *, symmetric: bool) -> Iterator[Tile]:
    places = np.concatenate(people)
    if len(places) <= BIN:
        able = [own for own in people if coded.phone[own[0]] != coded.phone[own[-1]]]
        if len(people) < 2 or not able:
            return
        columns = np.concatenate(able)
        rows = places[np.isin(coded.phone[places], coded.phone[columns])]
        if symmetric and len(places) ** 2 < 2 * len(rows) * len(columns):
            yield Tile(places, places)
        else:
            yield Tile(rows, columns)
        return
    for i, first in enumerate(people):
        for second in people[i + 1 :]:
            if symmetric:
                yield Tile(first, second, both=True)
            else:
                yield Tile(first, second)
                yield Tile(second, first)


def _cut(tile: Tile) -> Iterator[Tile]:
    """Cut the rows of a table that is too large."""
    if max(len(tile.rows), len(tile.columns)) <= SIDE:
        yield tile
        return
    ways = [(tile.rows, tile.columns), (tile.columns, tile.rows)]
    for rows, columns in ways if tile.both else ways[:1]:
        size = max(SIDE**2 // len(columns), 1)
        for start in range(0, len(rows), size):
            yield Tile(rows[start : start + size], columns)


def fixed_subsample(
    items: Items,
    max_items: int = 2000,
    *,
    speaker: Speaker = "within",
    context: Context = "within",
    seed: int = 0,
) -> Items:
    """Choose few items that hold many cells, to be scored again and again during training.

    Contexts (within speakers, each speaker's own) are drawn whole, in random order, until the items
    are enough. Where that would leave most speakers out, each speaker's tokens of a phone are
    thinned first, to two at the least: if these are still too many, within speakers fewer speakers
    are drawn, and across, where a context has them all, more than `max_items` stay.

    Args:
        items: The items.
        max_items: At most so many, but for what is said above; the time of a score grows with
            their square at worst.
        speaker: What will be scored.
        context: Likewise.
        seed: For the draw; one seed always gives the same items.

    Returns:
        The items chosen.

    Raises:
        InputError: An option is out of range, or the items hold no cell.
    """
    if max_items < 4:
        raise InputError(f"max_items {max_items}: give at least 4")
    coded = encode(items, context, None, seed)
    blocks = _blocks(coded, speaker)
    if not blocks:
        raise no_cells(items, speaker, context)
    wanted = SPREAD * len(np.unique(coded.speaker[np.concatenate(blocks)]))
    best, most = None, 0
    for size in SIZES:
        coded = encode(items, context, size, seed)
        blocks = _blocks(coded, speaker)
        chosen = _draw(blocks, max_items, seed)
        said = len(np.unique(coded.speaker[chosen]))
        if said > most:
            best, most = coded.item[chosen], said
        if said >= wanted:
            break
    if best is not None:
        return items[np.sort(best)]
    # Not even one context fits.
    own = items[np.sort(coded.item[blocks[int(np.random.default_rng(seed).integers(len(blocks)))]])]
    return own[np.sort(encode(own, context, 2, seed).item)]


def _draw(blocks: list[Integers], max_items: int, seed: int) -> Integers:
    """Return the places of as many whole blocks, in random order, as fit."""
    chosen: list[Integers] = [np.zeros(0, np.int64)]
    for i in np.random.default_rng(seed).permutation(len(blocks)).tolist():
        if sum(map(len, chosen)) + len(blocks[i]) <= max_items:
            chosen.append(blocks[i])
    return np.concatenate(chosen)


def _blocks(coded: Coded, speaker: Speaker) -> list[Integers]:
    """List sets of items that hold cells of their own."""
    blocks = []
    for places in _runs(coded.context, np.arange(len(coded.item))):
        people = _runs(coded.speaker, places)
        if speaker == "within":
            blocks += [own for own in people if _has_cells(coded, own)]
        elif any(True for _ in _all_across(coded, people, symmetric=True)):
            blocks.append(places)
    return blocks


def check_cells(items: Items, speaker: Speaker, context: Context) -> None:
    """Refuse items that hold no cell, before any distance is taken.

    Raises:
        InputError: Says what the items lack.
    """
    coded = encode(items, context, None, 0)
    table, count = np.unique(
        np.stack((coded.context, coded.speaker, coded.phone), 1), axis=0, return_counts=True
    )
    _, own, phones = np.unique(table[:, :2], axis=0, return_inverse=True, return_counts=True)
    _, said, speakers = np.unique(table[:, ::2], axis=0, return_inverse=True, return_counts=True)
    again = count > 1 if speaker == "within" else speakers[said.ravel()] > 1
    if not (again & (phones[own.ravel()] > 1)).any():
        raise no_cells(items, speaker, context)


def no_cells(items: Items, speaker: Speaker, context: Context) -> InputError:
    """Return the error for items that hold no cell."""
    if speaker == "across" and len(set(items.speaker)) < 2:
        return InputError("across speakers with one speaker: score 'within' alone, or add speakers")
    if len(set(items.phone)) < 2:
        return InputError(f"all items are {items.phone[0]!r}: give at least two phones")
    twice = (
        "a phone twice beside another phone"
        if speaker == "within"
        else "two phones, one of which another speaker says too"
    )
    where, mend = ", in one context", "add items, or take context 'any'"
    if context == "any":
        where, mend = "", "add items"
    return InputError(f"no valid cell: no speaker says {twice}{where}; {mend}")
