"""From cells to one error, and how sure it is: unweighted means, jackknife and bootstrap.

The speakers are the sample: phones and contexts are what is asked about, but other speakers would
have given another error. A speaker counts with the cells in which it says A and B, and with those
in which it says X.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from scipy.stats import t as student

from remanence.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

Aggregate = Literal["librilight", "zerospeech2017", "weighted"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cells:
    """Counts of cells; all arrays have one entry a cell, ordered by the first five.

    Attributes:
        context: Number of the context.
        speaker: Number of the speaker of A and B.
        x_speaker: Number of the speaker of X.
        phone: Number of the phone of A and X.
        other: Number of the phone of B.
        wrong: Errors, a tie counting 1 and an error 2, int64.
        triplets: Triplets (a, b, x), int64; the error of a cell is wrong / (2 triplets).
        contexts: Names of the contexts.
        speakers: Names of the speakers.
        phones: Names of the phones.
    """

    context: Integers
    speaker: Integers
    x_speaker: Integers
    phone: Integers
    other: Integers
    wrong: Integers
    triplets: Integers
    contexts: tuple[str, ...]
    speakers: tuple[str, ...]
    phones: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.wrong)

    @property
    def error(self) -> Floats:
        """The error of each cell, from 0 to 1."""
        return self.wrong / (2 * self.triplets)


def number_rows(*columns: tuple[Integers, int]) -> Integers:
    """Return one number for each row of columns, equal for equal rows and rising with them.

    Args:
        columns: Numbers (n,), and what they are below.
    """
    number, size = columns[0]
    for column, below in columns[1:]:
        if size * below > np.iinfo(np.int64).max:
            found, number = np.unique(number, return_inverse=True)
            size = len(found)
        number, size = number * below + column, size * below
    return number


def cell_keys(parts: list[Cells]) -> list[Integers]:
    """Return a number for each cell of each part: one cell has one number in all; rising."""
    first = parts[0]
    S, P = len(first.speakers), len(first.phones)
    below = {"context": len(first.contexts), "speaker": S, "x_speaker": S, "phone": P, "other": P}
    keys = number_rows(
        *((np.concatenate([getattr(part, name) for part in parts]), n) for name, n in below.items())
    )
    return np.split(keys, np.cumsum([len(part) for part in parts])[:-1])


def add_cells(parts: list[Cells]) -> Cells:
    """Add the counts of shards, which is exact: all counts are whole numbers.

    Raises:
        InputError: The parts are of different items.
    """
    first = parts[0]
    for part in parts:
        if (part.contexts, part.speakers, part.phones) != (
            first.contexts, first.speakers, first.phones,
        ):  # fmt: skip
            raise InputError("the shards are of different items: score the same items in each")
    keys, place, inverse = np.unique(
        np.concatenate(cell_keys(parts)), return_index=True, return_inverse=True
    )
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])[place]
        for name in ("context", "speaker", "x_speaker", "phone", "other")
    }
    counts = {}
    for name in ("wrong", "triplets"):
        counts[name] = np.zeros(len(keys), np.int64)
        np.add.at(counts[name], inverse.ravel(), np.concatenate([getattr(p, name) for p in parts]))
    return Cells(**columns, **counts, contexts=first.contexts, speakers=first.speakers,
                 phones=first.phones)  # fmt: skip


class Mean:
    """The mean over cells, for any weights of the speakers.

    - `librilight` (arXiv 1912.07875; ZeroSpeech 2021): the mean over contexts, across speakers
      jointly over contexts and speakers of X; then over speakers; then over ordered pairs of
      phones.
    - `zerospeech2017`: across speakers the mean over contexts, then over pairs of speakers, then
      over pairs of phones. The same as the other within speakers.
    - `weighted`: over triplets.

    Args:
        cells: The cells.
        values: Values of the cells (n,), such as their errors.
        aggregate: See above.
    """

    def __init__(self, cells: Cells, values: Floats, aggregate: Aggregate) -> None:
        if aggregate not in get_args(Aggregate):
            raise InputError(
                f"aggregate {aggregate!r} is unknown: give one of {get_args(Aggregate)}"
            )
        S, P = len(cells.speakers), len(cells.phones)
        key = number_rows(
            (cells.phone, P), (cells.other, P), (cells.speaker, S), (cells.x_speaker, S)
        )
        found, first, place = np.unique(key, return_index=True, return_inverse=True)
        amount = (
            cells.triplets.astype(np.float64) if aggregate == "weighted" else np.ones(len(cells))
        )
        self.sums = np.bincount(place.ravel(), values * amount, len(found))
        self.counts = np.bincount(place.ravel(), amount, len(found))
        pair = cells.phone[first] * P + cells.other[first]
        self.speaker, self.x_speaker = cells.speaker[first], cells.x_speaker[first]
        self.pair = np.unique(pair, return_inverse=True)[1].ravel()
        # Rows are in order of pair, then speaker: each new one begins a group.
        self.group = np.cumsum(np.diff(self.pair * S + self.speaker, prepend=-1) != 0) - 1
        self.group_pair = self.pair[np.searchsorted(self.group, np.arange(self.group[-1] + 1))]
        self.aggregate = aggregate

    def __call__(self, weights: Floats) -> float:
        """Return the mean for weights of the speakers (S,); NaN where nothing is left."""
        # Within speakers one speaker says all, and weighs once.
        first = weights[self.speaker]
        across = np.where(self.x_speaker == self.speaker, 1.0, weights[self.x_speaker])
        if self.aggregate == "weighted":
            weight = first * across
            return _ratio(float(weight @ self.sums), float(weight @ self.counts))
        if self.aggregate == "zerospeech2017":
            weight = first * across
            sums = np.bincount(self.pair, weight * self.sums / self.counts)
            total = np.bincount(self.pair, weight)
        else:
            above = np.bincount(self.group, across * self.sums)
            below = np.bincount(self.group, across * self.counts)
            own = np.maximum.reduceat(first, np.searchsorted(self.group, np.arange(len(below))))
            own = np.where(below > 0, own, 0)
            sums = np.bincount(self.group_pair, own * above / np.where(below > 0, below, 1))
            total = np.bincount(self.group_pair, own)
        seen = total > 0
        return float(np.mean(sums[seen] / total[seen])) if seen.any() else float("nan")


def _ratio(above: float, below: float) -> float:
    return above / below if below else float("nan")


def speaker_stderr(mean: Mean, speakers: Integers) -> float:
    """Return the standard error over speakers by the jackknife, leaving out one after the other.

    NaN with one speaker, or where without one of them no cell is left.
    """
    n = len(speakers)
    if n < 2:
        return float("nan")
    left = []
    for speaker in speakers:
        weights = np.ones(int(speakers.max()) + 1)
        weights[speaker] = 0
        left.append(mean(weights))
    return float(np.sqrt((n - 1) / n * np.square(np.array(left) - np.mean(left)).sum()))


def speaker_interval(
    mean: Mean, speakers: Integers, stderr: float, bootstrap: int, seed: int
) -> tuple[float, float]:
    """Return a 95 % interval over speakers.

    Of the bootstrap's percentiles, drawing speakers with replacement; with `bootstrap` = 0, of
    Student's t and the jackknife. A drawn speaker is never X to itself.
    """
    n = len(speakers)
    if not bootstrap:
        centre = mean(np.ones(int(speakers.max()) + 1))
        half = float(student.ppf((1 + CONFIDENCE) / 2, n - 1)) * stderr if n > 1 else float("nan")
        return centre - half, centre + half
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(bootstrap):
        weights = np.zeros(int(speakers.max()) + 1)
        np.add.at(weights, rng.choice(speakers, n), 1)
        drawn.append(mean(weights))
    if np.isnan(drawn).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(drawn, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def p_value(difference: float, stderr: float, speakers: int) -> float:
    """Return the two-sided probability of Student's t, of so large a difference by chance."""
    if speakers < 2 or np.isnan(stderr):
        return float("nan")
    if stderr == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * student.sf(abs(difference) / stderr, speakers - 1))
