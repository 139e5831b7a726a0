"""How sure a measured figure is: intervals, paired tests, calibration, many comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from remanence.errors import InputError

_CHUNK = 1 << 21  # resampled values held at once by the bootstrap: about 24 MB


class Interval(NamedTuple):
    """A confidence interval, in the unit of the figure it belongs to."""

    low: float
    high: float


class BootstrapDifference(NamedTuple):
    """Mean of `a - b` with its percentile bootstrap interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """Two models compared on the same images.

    Attributes:
        b: Images that only the first model gets right.
        c: Images that only the second model gets right.
        p_value: Exact two-sided p-value of "both err equally often".
        difference: Accuracy of the first minus accuracy of the second, a fraction in [-1, 1].
        interval: Confidence interval of that difference.
    """

    b: int
    c: int
    p_value: float
    difference: float
    interval: Interval


def proportion_interval(
    successes: int,
    n: int,
    method: Literal["wilson", "clopper-pearson"] = "wilson",
    confidence: float = 0.95,
) -> Interval:
    """Confidence interval of a proportion such as an accuracy.

    Args:
        successes: Number of successes, 0 to `n`.
        n: Number of trials, at least 1.
        method: "wilson" (the score interval: covers `confidence` on average) or
            "clopper-pearson" (the exact interval: covers at least `confidence` everywhere).
        confidence: Coverage, between 0 and 1.

    Returns:
        `(low, high)`, fractions in [0, 1].

    Raises:
        InputError: If the counts, the method or the confidence make no sense.
    """
    _check_confidence(confidence)
    if not 0 <= successes <= n or n < 1:
        raise InputError(
            f"{successes} successes out of {n} is no proportion: give 0 <= successes <= n, n >= 1"
        )
    if method not in ("wilson", "clopper-pearson"):
        raise InputError(f"unknown interval {method!r}: use 'wilson' or 'clopper-pearson'")
    scipy_name = {"wilson": "wilson", "clopper-pearson": "exact"}[method]
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method=scipy_name)
    return Interval(float(interval.low), float(interval.high))


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike, confidence: float = 0.95) -> McNemar:
    """McNemar's exact test: do two models differ in accuracy on the same images?

    Only the images on which the models disagree carry evidence; under the null hypothesis each
    of them is a fair coin, so the p-value is that of a binomial test.

    Args:
        correct_a: (N,) bool, whether the first model is right on each image.
        correct_b: (N,) bool, the same for the second model, in the same order.
        confidence: Coverage of the interval, between 0 and 1.

    Returns:
        Counts, p-value, difference (first minus second) and its interval.

    Raises:
        InputError: If the arrays are not boolean, differ in length or are empty.
    """
    _check_confidence(confidence)
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.dtype != np.bool_ or b.dtype != np.bool_:
        raise InputError(f"correctness is {a.dtype} and {b.dtype}: give two boolean arrays")
    _check_pair(a, b)
    a_only, b_only = int((a & ~b).sum()), int((b & ~a).sum())
    disagreements = a_only + b_only
    p_value = (
        float(stats.binomtest(min(a_only, b_only), disagreements, 0.5).pvalue)
        if disagreements
        else 1.0
    )
    interval = _paired_difference_interval(a_only, b_only, len(a), confidence)
    return McNemar(a_only, b_only, p_value, (a_only - b_only) / len(a), interval)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, draws: int = 10_000, seed: int = 0
) -> BootstrapDifference:
    """Percentile bootstrap, at 95 %, of the mean paired difference `a - b`.

    Args:
        a: (N,) float, a score per image (or per query, per seed, ...) of the first method.
        b: (N,) float, the same of the second method, in the same order.
        draws: Number of resamples.
        seed: Seed of the resampling; equal seeds give equal results.

    Returns:
        `(difference, low, high)` in the unit of the scores.

    Raises:
        InputError: If the arrays differ in length, are empty or hold NaN, or `draws` < 1.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    _check_pair(x, y)
    difference = x - y
    if not np.isfinite(difference).all():
        raise InputError("the scores to compare hold NaN or infinity: drop those items from both")
    if draws < 1:
        raise InputError(f"{draws} bootstrap draws: ask for at least 1, usually 10000")
    n = len(difference)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    rows = max(1, _CHUNK // n)
    for start in range(0, draws, rows):
        size = (min(rows, draws - start), n)
        picks = rng.integers(n, size=size, dtype=np.int32)
        means[start : start + rows] = difference[picks].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return BootstrapDifference(float(difference.mean()), float(low), float(high))


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student-t interval of a mean over a few independent runs, such as seeds.

    Args:
        values: (N,) float, one figure per run, N >= 2.
        confidence: Coverage, between 0 and 1.

    Returns:
        `(low, high)` in the unit of the values.

    Raises:
        InputError: If there are fewer than two values, or one is not finite.
    """
    _check_confidence(confidence)
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise InputError(f"an interval of a mean needs at least two runs, not shape {x.shape}")
    if not np.isfinite(x).all():
        raise InputError("the runs to average hold NaN or infinity: leave the failed ones out")
    half = float(stats.t.ppf(0.5 + confidence / 2, len(x) - 1) * stats.sem(x))
    return Interval(float(x.mean()) - half, float(x.mean()) + half)


def expected_calibration_error(probability: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error over equal-width bins (arXiv 1706.04599, equation 3).

    Args:
        probability: (N,) float in [0, 1], the confidence of each prediction.
        correct: (N,) bool, whether the prediction is right.
        bins: Number of bins M; bin m is ((m - 1) / M, m / M], the first one includes 0.

    Returns:
        Mean over predictions of |accuracy - confidence| of their bin, in [0, 1].

    Raises:
        InputError: If the arrays differ in length or are empty, or a value is out of range.
    """
    p, hit = np.asarray(probability, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    _check_pair(p, hit)
    _check_unit(p, "probabilities")
    if bins < 1:
        raise InputError(f"{bins} calibration bins: use at least 1, usually 15")
    inner_edges = np.arange(1, bins) / bins
    index = np.searchsorted(inner_edges, p, side="left")
    # A bin's share times its gap is |sum of hits - sum of confidences| / N.
    return float(np.abs(np.bincount(index, hit - p, minlength=bins)).sum() / len(p))


def holm(p_values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's step-down adjustment, for several tests read together.

    Args:
        p_values: (M,) float in [0, 1].

    Returns:
        (M,) adjusted p-values in the same order: rejecting those <= alpha keeps the chance of
        even one false rejection under alpha, whatever the dependence between the tests.

    Raises:
        InputError: If a value is not in [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    _check_unit(p, "p-values")
    order = np.argsort(p, kind="stable")
    stepped = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted


def _paired_difference_interval(b: int, c: int, n: int, confidence: float) -> Interval:
    """Bonett and Price's adjusted Wald interval (J. Educ. Behav. Stat. 37(4), 2012).

    One pseudo-image per kind of disagreement keeps the coverage near nominal in small samples,
    where the plain Wald interval collapses to a point for b = c = 0.
    """
    p_b, p_c = (b + 1) / (n + 2), (c + 1) / (n + 2)
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    half = z * float(np.sqrt((p_b + p_c - (p_b - p_c) ** 2) / (n + 2)))
    return Interval(max(-1.0, p_b - p_c - half), min(1.0, p_b - p_c + half))


def _check_pair(a: NDArray[np.generic], b: NDArray[np.generic]) -> None:
    if a.ndim != 1 or b.ndim != 1:
        raise InputError(f"shapes {a.shape} and {b.shape}: give two arrays of shape (N,)")
    if len(a) != len(b):
        raise InputError(f"{len(a)} against {len(b)} items: give both for the same images")
    if len(a) == 0:
        raise InputError("no images to compare: give at least one")


def _check_unit(values: NDArray[np.float64], name: str) -> None:
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise InputError(f"{name} must be one list of numbers between 0 and 1, without NaN")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence {confidence} is no fraction between 0 and 1: use 0.95")
