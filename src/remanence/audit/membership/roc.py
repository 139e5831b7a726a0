"""How well scores tell members from non-members: ROC curve, rates, rank test.

Scores are higher for members. Section 5 of arXiv 1908.11229 measures attacks by accuracy; the true
positive rate at a low false positive rate is the measure of arXiv 2112.03570.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from remanence.audit.evidence import Check, Estimate
from remanence.errors import InputError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MIN_SIDE = 30  # below, the normal law under DeLong's interval is not to be trusted


@dataclass(frozen=True)
class RateAt:
    """The best rate whose error stays within a limit: TPR at an FPR, or TNR at an FNR.

    Attributes:
        limit: The error rate allowed, in [0, 1].
        value: The rate reached at a vertex of the ROC curve, in [0, 1]; nothing is interpolated.
        low: Lower Clopper-Pearson end, for the threshold used.
        high: Upper end.
        error: Error rate at that vertex, with its Clopper-Pearson interval.
        threshold: A sample is called a member when its score is at least this; +-inf where
            everything falls on one side.
        resolved: False where the limit allows less than one error among the samples: `value` is
            then the rate at zero errors, and more samples are needed to measure the rate asked for.
    """

    limit: float
    value: float
    low: float
    high: float
    error: Estimate
    threshold: float
    resolved: bool


@dataclass(frozen=True)
class Decision:
    """Calling a sample a member when its score is at least a threshold.

    Attributes:
        threshold: That threshold.
        balanced_accuracy: Mean of TPR and TNR; its interval joins theirs (MOVER, Zou and Donner
            2008, doi 10.1002/sim.3095).
        accuracy: Share of right decisions; read it only beside `prior`.
        prior: Accuracy of always naming the larger class.
        tpr: Share of members called members.
        fpr: Share of non-members called members.
    """

    threshold: float
    balanced_accuracy: Estimate
    accuracy: Estimate
    prior: float
    tpr: Estimate
    fpr: Estimate


@dataclass(frozen=True, eq=False)
class GroupRow:
    """One row of the table per group; `roc` is None with fewer than 30 samples on a side."""

    group: str
    n_member: int
    n_nonmember: int
    roc: "Roc | None"


@dataclass(frozen=True, eq=False)
class Roc:
    """Everything measured on one set of scores.

    Attributes:
        n_member: Number of members.
        n_nonmember: Number of non-members.
        auc: P(member > non-member) + P(equal) / 2, with its DeLong interval.
        tpr_at: TPR at each FPR asked for.
        tnr_at: TNR at each FNR of the same sizes. For loss or margin scores it ranks models by
            risk without any reference model (arXiv 2510.19773).
        oracle: The decision with the best balanced accuracy ON THESE SAMPLES: flattering, an upper
            bound of what an attacker reaches.
        transfer: The decision at a threshold that was fixed elsewhere: the honest accuracy, or
            None where no threshold was given.
        ap_member: Average precision of finding members, ties merged, in [0, 1].
        ap_nonmember: Average precision of finding non-members.
        fpr: (V,) float64, false positive rates of the vertices, from 0 to 1.
        tpr: (V,) float64, true positive rates.
        thresholds: (V,) float64, falling from +inf to -inf, between distinct scores.
        groups: Table per group; its intervals are not corrected for the number of groups.
    """

    n_member: int
    n_nonmember: int
    auc: Estimate
    tpr_at: tuple[RateAt, ...]
    tnr_at: tuple[RateAt, ...]
    oracle: Decision
    transfer: Decision | None
    ap_member: float
    ap_nonmember: float
    fpr: Floats
    tpr: Floats
    thresholds: Floats
    groups: tuple[GroupRow, ...] = ()

    @property
    def sign(self) -> Check:
        """Whether members score higher, as every attack here promises."""
        return Check(
            assumption="Members score higher than non-members.",
            holds=None if self.auc.low < 0.5 <= self.auc.high else self.auc.low >= 0.5,
            finding=str(self.auc),
        )


def evaluate(
    scores: ArrayLike,
    member: ArrayLike,
    fprs: Sequence[float] = (1e-3, 1e-2, 1e-1),
    confidence: float = 0.95,
    *,
    threshold: float | None = None,
    group_by: ArrayLike | None = None,
) -> Roc:
    """Measure how well scores tell members from non-members.

    Args:
        scores: (N,) float, finite, higher = more member-like; samples are taken as independent.
        member: (N,) bool.
        fprs: Error rates at which to report, each in [0, 1].
        confidence: Level of every interval, in (0, 1).
        threshold: From references or a calibration split, never from these scores.
        group_by: (N,) labels, such as classes, for a table per group.

    Returns:
        The measurements.

    Raises:
        InputError: Shapes differ, a score is not finite, a side has fewer than 30 samples, or a
            rate, a threshold or the confidence is out of range.
    """
    s, m = checked(scores, member)
    _check_level("confidence", confidence)
    tp, fp, thresholds = _vertices(s, m)
    n, k = int(tp[-1]), int(fp[-1])
    auc, variance = _delong(tp, fp)
    fn, tn = (n - tp)[::-1], (k - fp)[::-1]
    best = int(np.argmax(tp / n - fp / k))
    rows = []
    if group_by is not None:
        names = np.asarray(group_by)
        if names.shape != s.shape:
            raise InputError(f"{len(s)} scores, group labels {names.shape}: give one group each")
        for name in np.unique(names):
            own = names == name
            n_own, k_own = int((own & m).sum()), int((own & ~m).sum())
            enough = min(n_own, k_own) >= MIN_SIDE
            roc = (
                evaluate(s[own], m[own], fprs, confidence, threshold=threshold) if enough else None
            )
            rows.append(GroupRow(str(name), n_own, k_own, roc))
    return Roc(
        n_member=n,
        n_nonmember=k,
        auc=auc_estimate(auc, variance, min(n, k), confidence),
        tpr_at=tuple(_rate_at(tp, fp, thresholds, fpr, confidence) for fpr in fprs),
        tnr_at=tuple(_rate_at(tn, fn, thresholds[::-1], fnr, confidence) for fnr in fprs),
        oracle=decide(s, m, float(thresholds[best]), confidence),
        transfer=None if threshold is None else decide(s, m, threshold, confidence),
        ap_member=_average_precision(tp, fp),
        ap_nonmember=_average_precision(tn, fn),
        fpr=fp / k,
        tpr=tp / n,
        thresholds=thresholds,
        groups=tuple(rows),
    )


def tpr_at(scores: ArrayLike, member: ArrayLike, fpr: float, confidence: float = 0.95) -> RateAt:
    """Largest TPR among the ROC vertices with at most this FPR; see `evaluate`."""
    tp, fp, thresholds = _vertices(*checked(scores, member))
    return _rate_at(tp, fp, thresholds, fpr, confidence)


def decide(
    scores: ArrayLike, member: ArrayLike, threshold: float, confidence: float = 0.95
) -> Decision:
    """Accuracy of one threshold that came from elsewhere; see `evaluate`."""
    s, m = checked(scores, member)
    if math.isnan(threshold):
        raise InputError("the threshold is NaN: give a number, or inf to call nothing a member")
    called = s >= threshold
    n, k = int(m.sum()), int((~m).sum())
    hits, alarms = int((called & m).sum()), int((called & ~m).sum())
    tpr = proportion("TPR", hits, n, confidence)
    fpr = proportion("FPR", alarms, k, confidence)
    balanced = (tpr.value + 1 - fpr.value) / 2
    below = math.hypot(tpr.value - tpr.low, fpr.high - fpr.value) / 2
    above = math.hypot(tpr.high - tpr.value, fpr.value - fpr.low) / 2
    return Decision(
        threshold=threshold,
        balanced_accuracy=Estimate(
            "balanced accuracy", balanced, balanced - below, balanced + above, confidence
        ),
        accuracy=proportion("accuracy", hits + k - alarms, n + k, confidence),
        prior=max(n, k) / (n + k),
        tpr=tpr,
        fpr=fpr,
    )


def delong(scores: ArrayLike, member: ArrayLike) -> tuple[float, float]:
    """Area under the ROC curve and the variance of its estimate, from one sort.

    DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988). All samples of a tie block have the
    same placement, so that the variance over pairs is one over blocks (compare the midranks of Sun
    and Xu, IEEE Signal Processing Letters 21, 2014).

    Args:
        scores: (N,) float, finite.
        member: (N,) bool, at least two on each side.

    Returns:
        AUC in [0, 1] with ties counted half, and its variance (0 where the sides do not mix).
    """
    return _delong(*_vertices(*checked(scores, member, smallest=2))[:2])


def _delong(tp: Floats, fp: Floats) -> tuple[float, float]:
    n, k = tp[-1], fp[-1]
    # Of each block: the share of non-members below its members, of members above its non-members.
    below, above = 1 - (fp[1:] + fp[:-1]) / (2 * k), (tp[1:] + tp[:-1]) / (2 * n)
    members, others = np.diff(tp), np.diff(fp)
    auc = float(members @ below / n)
    variance = members @ (below - auc) ** 2 / (n * max(n - 1, 1))
    variance += others @ (above - auc) ** 2 / (k * max(k - 1, 1))
    return auc, float(variance)


def auc_estimate(auc: float, variance: float, fewest: int, confidence: float) -> Estimate:
    """AUC with its interval on the logit scale, which keeps it inside [0, 1].

    Where the variance was estimated as 0, the interval is Wilson's for a share `auc` of `fewest`
    trials: auc (1 - auc) / fewest bounds the variance of any AUC (Birnbaum and Klose 1957).

    Args:
        auc: In [0, 1].
        variance: Of the estimate, >= 0.
        fewest: Independent units on the smaller side.
        confidence: Level, in (0, 1).
    """
    z = float(special.ndtri((1 + confidence) / 2))
    if variance <= 0 or not 0 < auc < 1:
        centre = (auc + z * z / (2 * fewest)) / (1 + z * z / fewest)
        half = math.hypot(math.sqrt(auc * (1 - auc) / fewest), z / (2 * fewest))
        half *= z / (1 + z * z / fewest)
        low, high = max(0.0, centre - half), min(1.0, centre + half)
    else:
        step = z * math.sqrt(variance) / (auc * (1 - auc))
        low, high = (float(special.expit(special.logit(auc) + s)) for s in (-step, step))
    return Estimate("AUC", auc, low, high, confidence)


def mann_whitney_log10_p(scores: ArrayLike, member: ArrayLike) -> float:
    """One-sided rank test of "members do not score higher", in log space.

    Exact by enumeration up to 5,000 splits, exact by recursion up to 10,000 pairs without ties,
    else normal with tie and continuity correction. Far in the tail the normal law overstates p.

    Args:
        scores: (N,) float, finite.
        member: (N,) bool, at least one on each side.

    Returns:
        Decimal logarithm of the p-value, <= 0 and never -inf.

    Raises:
        InputError: Shapes differ, a score is not finite, or a side is empty.
    """
    s, m = checked(scores, member, smallest=1)
    n, k = int(m.sum()), int((~m).sum())
    tp, fp, _ = _vertices(s, m)
    ties = np.diff(tp + fp)
    exact: Any = "exact"
    if special.binom(n + k, n) <= 5000:
        exact = stats.PermutationMethod(n_resamples=math.inf)
    elif n * k > 10_000 or len(ties) < n + k:
        spread = n * k / 12 * (n + k + 1 - (ties**3 - ties).sum() / ((n + k) * (n + k - 1)))
        if spread <= 0:
            return 0.0
        excess = (_delong(tp, fp)[0] - 0.5) * n * k - 0.5
        return float(stats.norm.logsf(excess / math.sqrt(spread))) / math.log(10)
    p = stats.mannwhitneyu(s[m], s[~m], alternative="greater", method=exact).pvalue
    return min(0.0, math.log10(p))


def proportion(name: str, successes: int, trials: int, confidence: float) -> Estimate:
    """A share with its Clopper-Pearson interval."""
    tail, misses = (1 - confidence) / 2, trials - successes
    low = float(special.betaincinv(successes, misses + 1, tail)) if successes else 0.0
    high = float(special.betaincinv(successes + 1, misses, 1 - tail)) if misses else 1.0
    return Estimate(name, successes / trials, low, high, confidence)


def checked(scores: ArrayLike, member: ArrayLike, smallest: int = MIN_SIDE) -> tuple[Floats, Bools]:
    """Scores as float64 (N,) and memberships as bool (N,), or an `InputError` that says why not."""
    s, m = np.asarray(scores, dtype=np.float64), np.asarray(member)
    if s.ndim != 1:
        raise InputError(f"scores have shape {s.shape}: give one number a sample, shape (N,)")
    if m.shape != s.shape:
        raise InputError(f"{len(s)} scores, memberships of shape {m.shape}: give one bool each")
    if not np.isin(m, (0, 1)).all():
        raise InputError("memberships must be True or False (or 1 and 0), one a sample")
    if not np.isfinite(s).all():
        raise InputError(f"{int((~np.isfinite(s)).sum())} scores are not finite: leave them out")
    m = m.astype(np.bool_)
    fewest = min(int(m.sum()), int((~m).sum()))
    if fewest < smallest:
        raise InputError(f"give at least {smallest} members and non-members; there are {fewest}")
    return s, m


def _vertices(scores: Floats, member: Bools) -> tuple[Floats, Floats, Floats]:
    """Counts of true and false positives at every vertex, and thresholds, highest first."""
    order = np.argsort(-scores, kind="stable")
    s, m = scores[order], member[order]
    ends = np.flatnonzero(np.r_[s[1:] != s[:-1], True])
    tp = np.cumsum(m, dtype=np.float64)[ends]
    fp = ends + 1 - tp
    upper, lower = s[ends[:-1]], s[ends[:-1] + 1]
    middle = upper / 2 + lower / 2
    # Between neighbouring floats there is no middle: the upper one separates them too.
    between = np.where(middle > lower, middle, upper)
    return np.r_[0, tp], np.r_[0, fp], np.r_[np.inf, between, -np.inf]


def _rate_at(
    hits: Floats, errors: Floats, thresholds: Floats, limit: float, confidence: float
) -> RateAt:
    """The last vertex whose errors stay within the limit; counts rise along the curve."""
    check_rate(limit)
    n, k = int(hits[-1]), int(errors[-1])
    allowed = allowed_errors(limit, k)
    at = int(np.searchsorted(errors, allowed, side="right")) - 1
    rate = proportion("rate", int(hits[at]), n, confidence)
    return RateAt(
        limit=limit,
        value=rate.value,
        low=rate.low,
        high=rate.high,
        error=proportion("error rate", int(errors[at]), k, confidence),
        threshold=float(thresholds[at]),
        resolved=allowed >= 1,
    )


def allowed_errors(limit: float, trials: int) -> int:
    """Errors that a rate allows; 0.29 x 100 is 28.999... in floating point and means 29."""
    return math.floor(limit * trials + 1e-9)


def _average_precision(hits: Floats, errors: Floats) -> float:
    precision = hits[1:] / (hits[1:] + errors[1:])
    return float((np.diff(hits) * precision).sum() / hits[-1])


def check_rate(rate: float) -> None:
    """Refuse what is no false positive rate."""
    if not 0 <= rate <= 1:
        raise InputError(f"false-positive rate {rate} is out of range: give a number in [0, 1]")


def _check_level(name: str, level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"{name} {level} is out of range: give a number between 0 and 1")
