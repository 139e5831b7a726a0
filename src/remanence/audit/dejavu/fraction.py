"""The fraction of a candidate set that was trained on, where some training images are known.

In the mixture F_c = (1 - f) F_out + f F_in every expectation is a mixture too, so f follows from
any of them: of the score itself (mean shift), or of its exceeding a threshold, in which case the
known rates of true and false positives remove the bias (the estimator of DUCI).
"""

import math
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from remanence.audit.dejavu.kolmogorov_smirnov import ks_two_sample
from remanence.audit.dejavu.scores import CHUNK_CELLS, Floats, as_scores, cluster_ids
from remanence.audit.evidence import Check, Estimate, Evidence
from remanence.errors import InputError

FractionMethod = Literal["mean_shift", "threshold"]
ThreeGroups = tuple[ArrayLike | None, ArrayLike | None, ArrayLike | None]

# Above this many clusters a resampled mean is drawn from its normal limit.
NORMAL_LIMIT = 20_000


def leaked_fraction(
    candidate: ArrayLike,
    reference: ArrayLike,
    members: ArrayLike,
    *,
    method: FractionMethod = "mean_shift",
    groups: ThreeGroups = (None, None, None),
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate the fraction of the candidates that was trained on.

    `mean_shift`: f = (mean_c - mean_out) / (mean_in - mean_out). `threshold`: f = (P_c(t > tau) -
    FPR) / (TPR - FPR), where tau maximises TPR - FPR on one half of the members and references,
    and both rates come from the other half. The interval is a percentile bootstrap over all three
    sets.

    Args:
        candidate: Scores (m,), higher = more member-like.
        reference: Scores of held-out images (n,).
        members: Scores of known training images (k,), of the source of the other two.
        method: The estimator.
        groups: Cluster names of the three sets, each of its set's length or None.
        confidence: Level of the interval.
        resamples: Bootstrap resamples.
        seed: For the bootstrap and the split.

    Returns:
        The fraction, not clipped to [0, 1], which would bias it: `displayed` clips.

    Raises:
        InputError: Scores are empty or not finite, or the members do not score above the reference.
    """
    value, draws = _bootstrap(candidate, reference, members, method, groups, resamples, seed)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate("leaked fraction", value, float(low), float(high), confidence)


def displayed(fraction: Estimate) -> Estimate:
    """Clip a fraction and its interval to [0, 1], for a reader."""
    value, low, high = np.clip([fraction.value, fraction.low, fraction.high], 0, 1).tolist()
    return replace(fraction, value=value, low=low, high=high)


def fraction_equivalence(
    candidate: ArrayLike,
    reference: ArrayLike,
    members: ArrayLike,
    *,
    margin: float = 0.05,
    level: float = 0.05,
    method: FractionMethod = "mean_shift",
    groups: ThreeGroups = (None, None, None),
    checks: tuple[Check, ...] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> Evidence:
    """Test whether the leaked fraction is as good as zero, for example after unlearning.

    Two one-sided tests, of f <= -margin and of f >= margin, both of which must reject; f is taken
    as normal with the bootstrap's standard deviation. "Detected" here means that absence was shown.

    Args:
        candidate: Scores (m,) of the images that should be forgotten.
        reference: Scores of held-out images (n,).
        members: Scores of images that the model was trained on and keeps (k,).
        margin: Largest fraction that counts as none, in (0, 1).
        level: Significance level.
        method: As in `leaked_fraction`.
        groups: As in `leaked_fraction`.
        checks: The assumptions that were looked at.
        resamples: Bootstrap resamples.
        seed: For the bootstrap and the split.

    Returns:
        The evidence, with the interval of level 1 - 2 level that lies within the margin exactly
        where both tests reject.

    Raises:
        InputError: As in `leaked_fraction`, or the margin is out of range.
    """
    if not 0 < margin < 1:
        raise InputError(f"margin {margin} is out of range: give a fraction between 0 and 1")
    value, draws = _bootstrap(candidate, reference, members, method, groups, resamples, seed)
    deviation = float(draws.std(ddof=1))
    z = (margin - abs(value)) / deviation
    half = -float(special.ndtri(level)) * deviation
    return Evidence(
        question=f"Is the leaked fraction of the candidates below {margin:.1%}?",
        statistic="leaked fraction",
        value=value,
        null=f"at least {margin:.1%} of the candidates left a trace (or less than -{margin:.1%})",
        log10_p=float(special.log_ndtr(-z)) / math.log(10),
        method="two one-sided tests",
        would_change="More images of any of the three sets, or a wider margin, make absence easier "
        "to show; a margin chosen after the data makes it worthless.",
        level=level,
        estimates=(Estimate("leaked fraction", value, value - half, value + half, 1 - 2 * level),),
        checks=checks,
    )


def _bootstrap(
    candidate: ArrayLike,
    reference: ArrayLike,
    members: ArrayLike,
    method: FractionMethod,
    groups: ThreeGroups,
    resamples: int,
    seed: int,
) -> tuple[float, Floats]:
    """The fraction and its bootstrap draws (resamples,)."""
    if method not in get_args(FractionMethod):
        raise InputError(f"method {method!r} is unknown: give one of {get_args(FractionMethod)}")
    names = ("candidate", "reference", "member")
    given = (candidate, reference, members)
    sets = [as_scores(s, name) for s, name in zip(given, names, strict=True)]
    ids = [cluster_ids(g, len(s), name) for g, s, name in zip(groups, sets, names, strict=True)]
    _check_members(sets[2], sets[1])
    generator = np.random.default_rng(seed)
    if method == "threshold":
        halves = [_half(ids[i], generator) for i in (1, 2)]
        choose_out, choose_in = sets[1][halves[0]], sets[2][halves[1]]
        tau = ks_two_sample(choose_in, choose_out, "greater", "asymptotic").location
        keep = [np.ones(len(sets[0]), np.bool_), ~halves[0], ~halves[1]]
        sets = [(s[k] > tau).astype(np.float64) for s, k in zip(sets, keep, strict=True)]
        ids = [cluster_ids(i[k], int(k.sum()), "") for i, k in zip(ids, keep, strict=True)]
        _check_members(sets[2], sets[1])
    c, out, inside = (float(s.mean()) for s in sets)
    draws_c, draws_out, draws_in = (
        _resampled_means(s, i, resamples, generator) for s, i in zip(sets, ids, strict=True)
    )
    # The gap is known to be positive: a resample that says otherwise must not flip the sign.
    gaps = np.maximum(draws_in - draws_out, 0.01 * (inside - out))
    return (c - out) / (inside - out), (draws_c - draws_out) / gaps


def _check_members(members: Floats, reference: Floats) -> None:
    if min(len(members), len(reference)) < 4:
        raise InputError("a fraction needs at least 4 members and 4 references")
    error = math.sqrt(members.var() / len(members) + reference.var() / len(reference))
    if members.mean() - reference.mean() <= 3 * error:
        raise InputError(
            "the known members score no higher than the reference: this signal cannot tell a leak, "
            "use a stronger one or more members"
        )


def _half(ids: NDArray[np.intp], generator: np.random.Generator) -> NDArray[np.bool_]:
    """Choose every second cluster at random; returns a mask over images (N,)."""
    clusters = int(ids.max()) + 1
    if clusters < 2:
        raise InputError("members or references form one group: give at least 2 groups of each")
    chosen: NDArray[np.bool_] = (generator.permutation(clusters) % 2 == 0)[ids]
    return chosen


def _resampled_means(
    values: Floats, ids: NDArray[np.intp], resamples: int, generator: np.random.Generator
) -> Floats:
    """Means of `values` over clusters drawn with replacement, (resamples,)."""
    sums, sizes = np.bincount(ids, values), np.bincount(ids).astype(np.float64)
    clusters = len(sums)
    if clusters > NORMAL_LIMIT:
        mean = values.mean()
        error = np.sqrt(((sums - mean * sizes) ** 2).sum()) / sizes.sum()
        limit: Floats = mean + error * generator.standard_normal(resamples)
        return limit
    means = []
    rows = max(1, CHUNK_CELLS // clusters)
    for start in range(0, resamples, rows):
        picks = generator.integers(clusters, size=(min(rows, resamples - start), clusters))
        weight = sizes[picks].sum(1) if clusters < len(values) else float(clusters)
        means.append(sums[picks].sum(1) / weight)
    return np.concatenate(means)
