"""Intervals and tests against closed forms, exhaustive enumeration and exact coverage."""

import itertools
import tracemalloc
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from remanence.errors import InputError
from remanence.kit import statistics
from remanence.kit.statistics import (
    expected_calibration_error,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    proportion_interval,
)

Z95 = NormalDist().inv_cdf(0.975)


def binomial(k: int, n: int, p: float) -> float:
    return comb(n, k) * p**k * (1 - p) ** (n - k)


def outcomes(a_only: int, b_only: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Correctness of two models with the given 2 x 2 table, in a shuffled order."""
    a = np.repeat([True, False, True, False], [a_only, b_only, both, neither])
    b = np.repeat([False, True, True, False], [a_only, b_only, both, neither])
    order = np.random.default_rng(0).permutation(len(a))
    return a[order], b[order]


# Proportions


@pytest.mark.parametrize(("n", "accuracy", "points"), [(50_000, 0.85, 0.31), (10_000, 0.75, 0.85)])
@pytest.mark.parametrize("method", ["wilson", "clopper-pearson"])
def test_published_half_widths(n: int, accuracy: float, points: float, method: str) -> None:
    low, high = proportion_interval(round(accuracy * n), n, method)  # type: ignore[arg-type]  # a parametrised literal
    assert (high - low) / 2 * 100 == pytest.approx(points, abs=0.005)
    assert low < accuracy < high


@given(st.integers(1, 400), st.data(), st.floats(0.5, 0.999))
def test_wilson_is_its_closed_form(n: int, data: st.DataObject, confidence: float) -> None:
    k = data.draw(st.integers(0, n))
    z, p = NormalDist().inv_cdf(0.5 + confidence / 2), k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = proportion_interval(k, n, confidence=confidence)
    assert low == pytest.approx(centre - half, abs=1e-9)
    assert high == pytest.approx(centre + half, abs=1e-9)
    assert 0 <= low <= p <= high <= 1


@pytest.mark.parametrize(("k", "n"), [(0, 12), (1, 12), (7, 12), (12, 12), (33, 60)])
def test_clopper_pearson_puts_half_of_alpha_in_each_tail(k: int, n: int) -> None:
    low, high = proportion_interval(k, n, "clopper-pearson", confidence=0.9)
    if k > 0:
        assert sum(binomial(i, n, low) for i in range(k, n + 1)) == pytest.approx(0.05, abs=1e-8)
    else:
        assert low == 0
    if k < n:
        assert sum(binomial(i, n, high) for i in range(k + 1)) == pytest.approx(0.05, abs=1e-8)
    else:
        assert high == 1


def test_exact_coverage_of_proportion_intervals() -> None:
    n, grid = 40, np.linspace(0.02, 0.98, 97)
    coverage = {}
    for method in ("wilson", "clopper-pearson"):
        intervals = [proportion_interval(k, n, method) for k in range(n + 1)]
        coverage[method] = np.array(
            [
                sum(
                    binomial(k, n, p) for k, (low, high) in enumerate(intervals) if low <= p <= high
                )
                for p in grid
            ]
        )
    assert coverage["clopper-pearson"].min() >= 0.95
    assert coverage["wilson"].mean() == pytest.approx(0.95, abs=0.008)
    assert coverage["wilson"].min() > 0.88  # the normal approximation falls under 0.6 here


def test_proportion_rejects_nonsense() -> None:
    with pytest.raises(InputError, match="3 successes out of 2"):
        proportion_interval(3, 2)
    with pytest.raises(InputError, match="0 successes out of 0"):
        proportion_interval(0, 0)
    with pytest.raises(InputError, match="confidence"):
        proportion_interval(1, 2, confidence=95)
    with pytest.raises(InputError, match="jeffreys"):
        proportion_interval(1, 2, "jeffreys")  # type: ignore[arg-type]  # the wrong value under test


# Paired comparisons


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(1, 60))
def test_mcnemar_is_the_exact_sign_test(b: int, c: int, both: int, neither: int) -> None:
    result = mcnemar(*outcomes(b, c, both, neither))
    tail = 2 * sum(comb(b + c, k) for k in range(min(b, c) + 1))
    assert (result.b, result.c) == (b, c)
    assert result.p_value == pytest.approx(min(1, tail / 2 ** (b + c)), rel=1e-9)
    if b + c:
        assert result.p_value == pytest.approx(stats.binomtest(min(b, c), b + c, 0.5).pvalue)
    assert result.difference == pytest.approx((b - c) / (b + c + both + neither))
    assert -1 <= result.interval.low <= result.difference <= result.interval.high <= 1


def test_mcnemar_swapped_is_mirrored() -> None:
    a, b = outcomes(31, 12, 800, 157)
    forward, backward = mcnemar(a, b), mcnemar(b, a)
    assert forward.difference == pytest.approx(0.019)
    assert backward.difference == -forward.difference
    assert backward.p_value == forward.p_value
    assert backward.interval.low == pytest.approx(-forward.interval.high)


def test_mcnemar_uses_the_pairing() -> None:
    # Two models at about 85 % that disagree on 1.2 % of the images: the interval is far narrower
    # than that of two independent samples, so 0.2 point on 50,000 images can be told from zero.
    result = mcnemar(*outcomes(350, 250, 42_150, 7_250))
    half = (result.interval.high - result.interval.low) / 2
    paired = Z95 * sqrt(600 / 50_000 - 0.002**2) / sqrt(50_000)
    independent = Z95 * sqrt(2 * 0.85 * 0.15 / 50_000)
    assert half == pytest.approx(paired, rel=0.01)
    assert half < independent / 4
    assert result.p_value < 1e-4
    assert result.interval.low > 0


@pytest.mark.parametrize("p", [(0.05, 0.05), (0.1, 0.02), (0.3, 0.1), (0.4, 0.4), (0.15, 0.0)])
def test_exact_coverage_of_the_paired_interval(p: tuple[float, float]) -> None:
    n, (p_b, p_c) = 30, p
    coverage = 0.0
    for b in range(n + 1):
        for c in range(n - b + 1):
            interval = statistics._paired_difference_interval(b, c, n, 0.95)
            if interval.low <= p_b - p_c <= interval.high:
                ways = comb(n, b) * comb(n - b, c)
                coverage += ways * p_b**b * p_c**c * (1 - p_b - p_c) ** (n - b - c)
    assert 0.93 < coverage < 0.995


def test_bootstrap_matches_every_possible_resample() -> None:
    a, b = np.array([1.0, 0.4, 0.9, 0.0, 0.7]), np.array([0.2, 0.6, 0.1, 0.3, 0.65])
    every = np.array([np.mean(d) for d in itertools.product(a - b, repeat=5)])
    difference, low, high = paired_bootstrap(a, b, draws=200_000, seed=3)
    assert difference == pytest.approx((a - b).mean())
    assert low == pytest.approx(np.quantile(every, 0.025), abs=0.006)
    assert high == pytest.approx(np.quantile(every, 0.975), abs=0.006)


def test_bootstrap_agrees_with_the_paired_normal_interval() -> None:
    rng = np.random.default_rng(1)
    common = rng.normal(size=4000)  # shared difficulty: cancels only if the pairing is kept
    a, b = common + 0.1 * rng.normal(size=4000) + 0.01, common + 0.1 * rng.normal(size=4000)
    _, low, high = paired_bootstrap(a, b, draws=4000)
    assert (high - low) / 2 == pytest.approx(Z95 * np.std(a - b) / sqrt(4000), rel=0.06)


def test_bootstrap_is_seeded_and_does_not_depend_on_its_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random(53), rng.random(53)
    whole = paired_bootstrap(a, b, draws=1001, seed=5)
    assert whole == paired_bootstrap(a, b, draws=1001, seed=5)
    assert whole != paired_bootstrap(a, b, draws=1001, seed=6)
    monkeypatch.setattr(statistics, "_CHUNK", 53 * 7)
    assert whole == paired_bootstrap(a, b, draws=1001, seed=5)


def test_bootstrap_memory_is_bounded() -> None:
    a = np.random.default_rng(0).random(50_000)
    tracemalloc.start()
    paired_bootstrap(a, np.zeros_like(a), draws=400)  # 400 x 50,000 float64 would take 160 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_paired_inputs_are_checked() -> None:
    with pytest.raises(InputError, match="3 against 2"):
        mcnemar(np.ones(3, bool), np.ones(2, bool))
    with pytest.raises(InputError, match="no images"):
        mcnemar(np.ones(0, bool), np.ones(0, bool))
    with pytest.raises(InputError, match="boolean"):
        mcnemar(np.array([0, 3]), np.array([1, 2]))
    with pytest.raises(InputError, match="NaN"):
        paired_bootstrap(np.array([1.0, np.nan]), np.zeros(2))
    with pytest.raises(InputError, match="3 against 2"):
        paired_bootstrap(np.ones(3), np.ones(2))


# Means over seeds


def test_mean_interval_is_the_textbook_t_interval() -> None:
    # 2.776445 is the 97.5 % point of Student's t with 4 degrees of freedom.
    values = [71.2, 70.8, 72.0, 71.5, 71.0]
    half = 2.776445 * np.std(values, ddof=1) / sqrt(5)
    low, high = mean_interval(values)
    assert low == pytest.approx(71.3 - half, abs=1e-5)
    assert high == pytest.approx(71.3 + half, abs=1e-5)
    assert mean_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)


def test_mean_interval_covers_with_three_seeds() -> None:
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(5, 2, size=3)) for _ in range(2000)]
    covered = np.mean([low <= 5 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=0.02)  # the normal quantile covers only 0.81


def test_mean_interval_needs_two_values() -> None:
    with pytest.raises(InputError, match="at least two"):
        mean_interval([1.0])
    with pytest.raises(InputError, match="NaN"):
        mean_interval([1.0, float("nan")])


# Calibration


@given(st.integers(1, 20), st.integers(0, 10_000))
def test_calibration_error_is_the_definition(bins: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probability, correct = rng.random(50), rng.random(50) < 0.6
    total = 0.0
    for m in range(bins):
        inside = (probability > m / bins) & (probability <= (m + 1) / bins)
        if inside.any():
            gap = abs(correct[inside].mean() - probability[inside].mean())
            total += inside.sum() / 50 * gap
    assert expected_calibration_error(probability, correct, bins) == pytest.approx(total)


def test_calibration_error_by_hand() -> None:
    # Bins (0.6, 0.8] and (0.8, 1]: |0.75 - 0.5| * 2/4 + |0.95 - 0.5| * 2/4; 0.8 is in the lower.
    probability = np.array([0.7, 0.8, 0.9, 1.0])
    error = expected_calibration_error(probability, np.array([True, False, True, False]), bins=5)
    assert error == pytest.approx(0.125 + 0.225)
    assert expected_calibration_error(np.zeros(3), np.zeros(3, bool)) == 0


def test_a_calibrated_model_has_little_error() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(100_000)
    correct = rng.random(100_000) < probability
    assert expected_calibration_error(probability, correct) < 0.01
    assert expected_calibration_error(probability**3, correct) > 0.2


def test_calibration_inputs_are_checked() -> None:
    with pytest.raises(InputError, match=r"between 0 and 1"):
        expected_calibration_error(np.array([1.2]), np.array([True]))
    with pytest.raises(InputError, match="bins"):
        expected_calibration_error(np.array([0.2]), np.array([True]), bins=0)
    with pytest.raises(InputError, match="2 against 1"):
        expected_calibration_error(np.array([0.2, 0.3]), np.array([True]))


# Many tests


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.9]), [1, 1])
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(p: list[float], alpha: float) -> None:
    rejected = set()
    for step, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        # The procedure compares the product too, so that rounding cannot tell the two apart.
        if p[i] * (len(p) - step) > alpha:
            break
        rejected.add(i)
    assert set(np.flatnonzero(holm(p) <= alpha)) == rejected


def test_holm_rejects_what_is_no_probability() -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        holm([0.1, 1.5])
