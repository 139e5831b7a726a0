"""What an attack proves about differential privacy: a lower bound of epsilon.

An (epsilon, delta)-private mechanism obeys, for every attack,

    TPR <= e^epsilon FPR + delta    and    1 - FPR <= e^epsilon (1 - TPR) + delta,

so that rates which break both for some epsilon prove that the true one is larger (Kairouz, Oh and
Viswanath, arXiv 1311.0776; section 4 of arXiv 1908.11229 for the posterior).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from remanence.audit.evidence import Estimate
from remanence.audit.membership.roc import MIN_SIDE, checked, proportion
from remanence.errors import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class EpsilonBound:
    """A lower bound of epsilon.

    Attributes:
        epsilon: The bound, >= 0; 0 means that nothing was shown.
        delta: The delta it goes with.
        confidence: Chance that the bound holds.
        inequality: Which of the two gave it: "members" (TPR against FPR) or "nonmembers" (TNR
            against FNR).
        threshold: A sample was called a member when its score was at least this.
        tpr: Share of members called members among the samples tested, with its interval.
        fpr: The same of non-members.
        tests: Thresholds among which the level was shared.
    """

    epsilon: float
    delta: float
    confidence: float
    inequality: Literal["members", "nonmembers"]
    threshold: float
    tpr: Estimate
    fpr: Estimate
    tests: int


def epsilon_lower_bound(
    scores: ArrayLike,
    member: ArrayLike,
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
    thresholds: ArrayLike | None = None,
    seed: int = 0,
) -> EpsilonBound:
    """Bound epsilon from below by an attack's scores.

    Without `thresholds`, the best one is chosen on a random half of the samples and tested once on
    the other half. With them, all are tested on all samples and share the level (Bonferroni); they
    must have been fixed before these scores were seen, on references for example. The lower end of
    TPR and the upper end of FPR, each at half the level, serve both inequalities.

    The bound is rigorous where scores are independent given the memberships, as with one canary
    per trained model. Scores of many samples under one model are not quite: there, read it as an
    estimate (arXiv 2305.08846 treats that case).

    Args:
        scores: (N,) float, finite, higher = more member-like.
        member: (N,) bool, at least 60 on each side (30 where `thresholds` are given).
        delta: In [0, 1).
        confidence: Chance that the bound holds, in (0, 1).
        thresholds: (T,) float, fixed beforehand, or None.
        seed: Of the split.

    Returns:
        The bound and the rates behind it.

    Raises:
        InputError: Shapes differ, a score is not finite, a side has too few samples, or an option
            is out of range.
    """
    s, m = checked(scores, member)
    if not 0 <= delta < 1:
        raise InputError(f"delta {delta} is out of range: give a number in [0, 1)")
    if not 0 < confidence < 1:
        raise InputError(f"confidence {confidence} is out of range: give a number in (0, 1)")
    if thresholds is not None:
        tried = np.atleast_1d(np.asarray(thresholds, dtype=np.float64))
        if tried.ndim != 1 or not len(tried) or np.isnan(tried).any():
            raise InputError("thresholds are empty or hold NaN: give at least one number")
        tests = len(tried)
        inside, outside = np.sort(s[m]), np.sort(s[~m])
    else:
        if min(m.sum(), (~m).sum()) < 2 * MIN_SIDE:
            raise InputError(f"give at least {2 * MIN_SIDE} members and as many non-members")
        rng = np.random.default_rng(seed)
        choosing, inside = map(np.sort, np.array_split(rng.permutation(s[m]), 2))
        choosing_out, outside = map(np.sort, np.array_split(rng.permutation(s[~m]), 2))
        tried, tests = _best_threshold(choosing, choosing_out, delta, confidence), 1

    level = (1 - confidence) / tests
    n, k = len(inside), len(outside)
    hits, alarms = _called(inside, tried), _called(outside, tried)
    # One-sided Clopper-Pearson ends at half the level each; exact zeros where nothing is known.
    tpr_low = np.where(
        hits > 0, special.betaincinv(np.maximum(hits, 1), n - hits + 1, level / 2), 0
    )
    fpr_high = np.where(
        alarms < k, special.betaincinv(alarms + 1, np.maximum(k - alarms, 1), 1 - level / 2), 1
    )
    bounds = _log_ratios(tpr_low, fpr_high, delta)
    row, best = np.unravel_index(np.argmax(bounds), bounds.shape)
    return EpsilonBound(
        epsilon=max(0.0, float(bounds[row, best])),
        delta=delta,
        confidence=confidence,
        inequality="members" if row == 0 else "nonmembers",
        threshold=float(tried[best]),
        tpr=proportion("TPR", int(hits[best]), n, 1 - level),
        fpr=proportion("FPR", int(alarms[best]), k, 1 - level),
        tests=tests,
    )


def _called(ordered: Floats, thresholds: Floats) -> NDArray[np.int64]:
    """How many scores, given in rising order, are at least each threshold."""
    return len(ordered) - np.searchsorted(ordered, thresholds, side="left").astype(np.int64)


def _log_ratios(tpr: Floats, fpr: Floats, delta: float) -> Floats:
    """The epsilon that each inequality (rows) asks for at each threshold; -inf where none."""
    tops, bottoms = np.stack([tpr, 1 - fpr]) - delta, np.stack([fpr, 1 - tpr])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(tops > 0, np.log(tops / bottoms), -np.inf)


def _best_threshold(inside: Floats, outside: Floats, delta: float, confidence: float) -> Floats:
    """The distinct score (1,) that looks best by Wilson ends, which are closed and close enough."""
    tried = np.unique(np.concatenate([inside, outside]))
    z = float(special.ndtri((1 + confidence) / 2))

    def end(hits: NDArray[np.int64], n: int, side: int) -> Floats:
        p = hits / n
        spread = np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        return np.asarray((p + z * z / (2 * n) + side * z * spread) / (1 + z * z / n))

    low = end(_called(inside, tried), len(inside), -1)
    high = end(_called(outside, tried), len(outside), 1)
    best = int(np.argmax(_log_ratios(low, high, delta).max(axis=0)))
    return tried[best : best + 1]
