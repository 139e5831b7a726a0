"""Group membership: all samples of a person, patient or document are in or out together.

The question is then asked per group. A group's score is the mean of its samples' scores; the
intervals count groups, because samples of one group say much the same.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from remanence.audit.evidence import Estimate
from remanence.audit.membership.roc import Bools, Floats, auc_estimate, checked
from remanence.errors import InputError

Combination = Literal["mean", "sum", "max"]


@dataclass(frozen=True, eq=False)
class GroupScores:
    """One score a group, ready for `roc.evaluate`.

    Attributes:
        names: (G,) the group labels, sorted.
        scores: (G,) float64, higher = more member-like.
        member: (G,) bool.
        sizes: (G,) int64, samples in each group.
    """

    names: NDArray[Any]
    scores: Floats
    member: Bools
    sizes: NDArray[np.int64]


def combine(
    scores: ArrayLike, member: ArrayLike, groups: ArrayLike, how: Combination = "mean"
) -> GroupScores:
    """Turn scores of samples into scores of groups.

    Args:
        scores: (N,) float, finite, higher = more member-like.
        member: (N,) bool, equal within a group.
        groups: (N,) labels.
        how: "mean", which does not reward a group for its size; "sum", the log-likelihood ratio of
            the group where scores are log-likelihood ratios of independent samples; or "max", for
            groups of which only some samples are remembered. Sum and maximum mistake a difference
            in group sizes between members and non-members for a leak.

    Returns:
        The groups' scores.

    Raises:
        InputError: Shapes differ, a score is not finite, a group holds members and non-members, or
            `how` is unknown.
    """
    if how not in get_args(Combination):
        raise InputError(f"combination {how!r} is unknown: give one of {get_args(Combination)}")
    s, m = checked(scores, member, smallest=1)
    names, ids, inside, sizes = _grouped(m, groups)
    if how == "max":
        combined = np.full(len(names), -np.inf)
        np.maximum.at(combined, ids, s)
    else:
        combined = np.bincount(ids, s)
        combined = combined / sizes if how == "mean" else combined
    return GroupScores(names, combined, inside, sizes)


def clustered_auc(
    scores: ArrayLike, member: ArrayLike, groups: ArrayLike, confidence: float = 0.95
) -> Estimate:
    """AUC of single samples with an interval that counts groups, not samples.

    Obuchowski (Biometrics 53, 1997): DeLong's placements summed within groups. Samples of a group
    taken as independent would give too narrow an interval.

    Args:
        scores: (N,) float, finite.
        member: (N,) bool, equal within a group.
        groups: (N,) labels, at least 2 groups on each side.
        confidence: Level, in (0, 1).

    Returns:
        The same AUC as `roc.evaluate`, with a wider interval.

    Raises:
        InputError: As `combine`, or a side has a single group.
    """
    s, m = checked(scores, member, smallest=1)
    _, ids, inside, _ = _grouped(m, groups)
    fewest = int(min(inside.sum(), (~inside).sum()))
    if fewest < 2:
        raise InputError("give at least 2 groups of members and 2 of non-members")
    n, k = int(m.sum()), int((~m).sum())
    ranks = stats.rankdata(s)
    # Share of the other side below each sample, ties counted half.
    placement = np.empty(len(s))
    placement[m] = (ranks[m] - stats.rankdata(s[m])) / k
    placement[~m] = (ranks[~m] - stats.rankdata(s[~m])) / n
    auc = float(placement[m].mean())
    deviation = np.where(m, (placement - auc) / n, (placement - (1 - auc)) / k)
    sums = np.bincount(ids, deviation)
    variance = sum(
        float((side**2).sum()) * len(side) / (len(side) - 1)
        for side in (sums[inside], sums[~inside])
    )
    return auc_estimate(auc, variance, fewest, confidence)


def _grouped(
    member: Bools, groups: ArrayLike
) -> tuple[NDArray[Any], NDArray[np.int64], Bools, NDArray[np.int64]]:
    """Names (G,), group of each sample (N,), membership (G,) and size (G,) of each group."""
    labels = np.asarray(groups)
    if labels.shape != member.shape:
        raise InputError(
            f"{len(member)} samples, group labels of shape {labels.shape}: give one group each"
        )
    names, ids, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    members = np.bincount(ids, member)
    mixed = np.flatnonzero((members > 0) & (members < sizes))
    if len(mixed):
        raise InputError(
            f"group {names[mixed[0]]} holds both members and non-members: a group is in or out as "
            "a whole"
        )
    return names, ids.astype(np.int64), members > 0, sizes.astype(np.int64)
