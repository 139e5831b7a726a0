"""Which utterances are learned from and which are tested on; and few labels, in nested sets.

Each choice depends on the names and the seed alone, not on the order in which names come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Mapping


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """Return names in an order that depends on them and the seed alone."""
    ordered = sorted(names)
    return [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]


def hold_out(
    names: Collection[str],
    fraction: float,
    *,
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
) -> tuple[list[str], list[str]]:
    """Divide utterances into those to learn from and those to test on.

    Args:
        names: Of the utterances.
        fraction: Of utterances to test on, or of groups where they are given; at least one.
        groups: Group of each utterance, such as its speaker; groups are not divided.
        seed: For the choice.

    Returns:
        Names to learn from and names to test on, sorted.

    Raises:
        InputError: The fraction is not between 0 and 1, or there are fewer than two to divide.
    """
    if not 0 < fraction < 1:
        raise InputError(f"test fraction {fraction:g}: give more than 0 and less than 1, as 0.2")
    owner = {name: name if groups is None else groups[name] for name in names}
    units = shuffled(set(owner.values()), seed)
    if len(units) < 2:
        what = "utterances" if groups is None else "speakers"
        raise InputError(f"{len(units)} {what}: there must be two to learn from one and test on")
    count = min(len(units) - 1, max(1, round(fraction * len(units))))
    test = set(units[:count])
    return (
        sorted(name for name in names if owner[name] not in test),
        sorted(name for name in names if owner[name] in test),
    )


def per_class(classes: Mapping[str, Collection[Hashable]], k: int, *, seed: int = 0) -> list[str]:
    """Choose k utterances of each class: for every class the first k, in one order, that have it.

    Args:
        classes: Classes that occur in each utterance, those to learn from only.
        k: Utterances a class; a class that occurs in fewer gets all of them, and a class often gets
            more, by utterances chosen for others.
        seed: For the order. Of two choices with one seed the smaller lies in the larger.

    Returns:
        Names, sorted.

    Raises:
        InputError: k is below 1.
    """
    if k < 1:
        raise InputError(f"{k} utterances a class: give at least 1")
    counts: dict[Hashable, int] = {}
    chosen = []
    for name in shuffled(classes, seed):
        own = set(classes[name])
        if any(counts.get(label, 0) < k for label in own):
            chosen.append(name)
            for label in own:
                counts[label] = counts.get(label, 0) + 1
    return sorted(chosen)


def by_minutes(
    seconds: Mapping[str, float],
    minutes: float,
    *,
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[str]:
    """Choose utterances that last so many minutes together, or a little less.

    Args:
        seconds: Duration of each utterance, those to learn from only.
        minutes: How much to choose.
        groups: Group of each utterance, such as its speaker; they take turns.
        seed: For the order. Of two choices with one seed the smaller lies in the larger.

    Returns:
        Names, sorted: as many as fit, in one order, up to the first that does not.

    Raises:
        InputError: There is less than that, or the first utterance is longer already.
    """
    total = sum(seconds.values()) / 60
    if not 0 < minutes <= total + 1e-9:
        raise InputError(
            f"{minutes:g} minutes of labels: give more than 0, at most the {total:.2f} there are"
        )
    order = shuffled(seconds, seed)
    if groups is not None:
        turn: dict[str, int] = {}
        rounds = {}
        for name in order:
            rounds[name] = turn.get(groups[name], 0)
            turn[groups[name]] = rounds[name] + 1
        order.sort(key=rounds.__getitem__)  # stable: the turns keep the order of the first
    ends = np.cumsum([seconds[name] for name in order])
    count = int(np.searchsorted(ends, 60 * minutes * (1 + 1e-9), side="right"))
    if not count:
        raise InputError(
            f"{minutes:g} minutes of labels: the first utterance alone lasts {ends[0]:.1f} s; give "
            "more"
        )
    return sorted(order[:count])
