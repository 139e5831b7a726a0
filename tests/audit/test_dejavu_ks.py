"""The KS and rank tests against closed forms, SciPy, enumeration and the null's own rate."""

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from remanence.audit.dejavu.kolmogorov_smirnov import kolmogorov_log10_sf, ks_two_sample
from remanence.audit.dejavu.leak import top_margin
from remanence.audit.dejavu.null_check import null_rejections
from remanence.audit.dejavu.rank_test import auc_interval, mann_whitney
from remanence.errors import InputError

SCIPY_SIDE = {"greater": "less", "less": "greater", "two-sided": "two-sided"}
SIDES = list(SCIPY_SIDE)


def pair(rng: np.random.Generator, *, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    n, m = rng.integers(2, 90, size=2)
    a, b = rng.normal(rng.normal(0, 0.5), 1, n), rng.normal(size=m)
    return (np.round(a, 1), np.round(b, 1)) if ties else (a, b)


# The Kolmogorov-Smirnov distance


def test_exact_p_of_two_fives() -> None:
    low = [1.0, 2, 3, 4, 5]
    apart = ks_two_sample([6.0, 7, 8, 9, 10], low)
    assert apart.d == 1
    assert 10**apart.log10_p == pytest.approx(2 / 252, rel=1e-12)
    assert 10 ** ks_two_sample([4.5, 7, 8, 9, 10], low).log10_p == pytest.approx(20 / 252)
    assert 10 ** ks_two_sample([6.0, 7, 8, 9, 10], low, "greater").log10_p == pytest.approx(1 / 252)
    assert ks_two_sample([6.0, 7, 8, 9, 10], low, "less").log10_p == 0


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_distance_sign_location_and_p_are_scipys(side: str, ties: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = pair(rng, ties=ties)
        ours = ks_two_sample(a, b, side, "asymptotic")
        theirs = stats.ks_2samp(a, b, alternative=SCIPY_SIDE[side], method="asymp")
        assert ours.d == pytest.approx(theirs.statistic, abs=1e-12)
        # SciPy names signs by the distribution function, and picks any place among equals.
        values = np.union1d(a, b)
        gaps = np.searchsorted(np.sort(b), values, side="right") / len(b) - np.searchsorted(
            np.sort(a), values, side="right"
        ) / len(a)
        reached = {"greater": gaps, "less": -gaps, "two-sided": np.abs(gaps)}[side]
        best = values[np.isclose(reached, reached.max(), rtol=0, atol=1e-12)]
        assert ours.location == best[0]
        assert theirs.statistic_location in best
        if len(best) == 1:
            assert ours.sign == -theirs.statistic_sign
        if side != "two-sided":
            assert 10**ours.log10_p == pytest.approx(theirs.pvalue, rel=1e-9)
        if not ties:
            exact = stats.ks_2samp(a, b, alternative=SCIPY_SIDE[side], method="exact")
            assert 10 ** ks_two_sample(a, b, side).log10_p == pytest.approx(exact.pvalue, rel=1e-9)


def test_asymptotic_two_sided_p_is_close_to_the_exact_one() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = rng.normal(0.3, 1, 101), rng.normal(size=97)
        exact, limit = (ks_two_sample(a, b, method=m).log10_p for m in ("exact", "asymptotic"))
        # With tabulated critical values of the exact law, the limit is a little too careful.
        assert limit == pytest.approx(exact, abs=0.12)


@pytest.mark.parametrize(
    ("alpha", "c"), [(0.10, 1.22385), (0.05, 1.3581), (0.01, 1.6276), (0.001, 1.9495)]
)
def test_kolmogorov_law_at_its_tabulated_constants(alpha: float, c: float) -> None:
    assert 10 ** kolmogorov_log10_sf(c) == pytest.approx(alpha, rel=3e-4)


def test_kolmogorov_law_is_continuous_where_the_formula_changes_and_never_infinite() -> None:
    assert kolmogorov_log10_sf(1 - 1e-12) == pytest.approx(kolmogorov_log10_sf(1), abs=1e-10)
    assert kolmogorov_log10_sf(0) == 0
    assert kolmogorov_log10_sf(5) == pytest.approx(np.log10(stats.kstwobign.sf(5)), abs=1e-9)
    assert kolmogorov_log10_sf(1000) == pytest.approx((math.log(2) - 2e6) / math.log(10))


def test_separated_samples_keep_a_finite_p() -> None:
    low, high = np.arange(50_000.0), np.arange(50_000.0) + 1e6
    assert -30_000 < ks_two_sample(high, low).log10_p < -20_000
    assert -20_000 < mann_whitney(high, low).log10_p < -10_000


@pytest.mark.parametrize(("shift", "d"), [(0.1, 0.0399), (0.5, 0.1974), (1.0, 0.3829)])
def test_normal_shift_and_mixture_in_closed_form(shift: float, d: float) -> None:
    rng = np.random.default_rng(2)
    out, inside, more = rng.normal(size=(3, 1_000_000))
    inside += shift
    assert 2 * stats.norm.cdf(shift / 2) - 1 == pytest.approx(d, abs=5e-5)
    assert ks_two_sample(inside, out, "greater").d == pytest.approx(d, abs=0.003)
    mixture = np.concatenate([inside[:300_000], more[300_000:]])
    assert ks_two_sample(mixture, out, "greater").d == pytest.approx(0.3 * d, abs=0.003)


def test_distance_is_blind_to_increasing_maps_and_margin_equals_confidence() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.2, 1, 500), rng.normal(size=400)
    d = ks_two_sample(a, b).d
    assert ks_two_sample(np.exp(a), np.exp(b)).d == d
    assert ks_two_sample(a**3, b**3).d == d
    logits = [torch.randn(n, 10, generator=torch.Generator().manual_seed(n)) for n in (500, 400)]
    confidences = [z.double().softmax(1).max(1).values.numpy() for z in logits]
    by_margin = ks_two_sample(*map(top_margin, logits))
    by_confidence = ks_two_sample(*confidences)
    assert by_margin.d == by_confidence.d
    assert by_margin.log10_p == by_confidence.log10_p


# Permutations


@pytest.mark.parametrize("side", SIDES)
def test_permutation_p_is_the_enumerated_one_with_ties(side: str) -> None:
    pool = np.array([1.0, 2, 2, 3, 3, 3, 4, 5, 5])
    observed = (8, 7, 5, 3)
    rest = [i for i in range(9) if i not in observed]
    d = ks_two_sample(pool[list(observed)], pool[rest], side, "asymptotic").d
    hits = [
        stats.ks_2samp(
            pool[list(chosen)],
            np.delete(pool, chosen),
            alternative=SCIPY_SIDE[side],
            method="asymp",
        ).statistic
        >= d - 1e-12
        for chosen in itertools.combinations(range(9), 4)
    ]
    ours = ks_two_sample(pool[list(observed)], pool[rest], side, "permutation", permutations=40_000)
    assert 10**ours.log10_p == pytest.approx(np.mean(hits), abs=0.01)


def test_grouped_permutation_p_is_the_enumerated_one_for_clusters_of_any_size() -> None:
    rng = np.random.default_rng(4)
    sizes = [1, 4, 2, 3, 1, 2]
    ids = np.repeat(np.arange(6), sizes)
    pool = rng.normal(size=len(ids)) + ids * 0.7
    n = sum(sizes[:3])
    swapped = np.concatenate([pool[n:], pool[:n]])  # the larger clusters are the candidates
    ids = np.concatenate([ids[n:], ids[:n]])
    n = len(pool) - n
    groups = (ids[:n], ids[n:])
    d = ks_two_sample(swapped[:n], swapped[n:], "greater", "asymptotic").d
    auc = mann_whitney(swapped[:n], swapped[n:]).auc
    ks_hits, auc_hits = [], []
    for chosen in itertools.combinations(range(6), 3):
        take = np.isin(ids, chosen)
        ks_hits.append(
            ks_two_sample(swapped[take], swapped[~take], "greater", "asymptotic").d >= d - 1e-12
        )
        auc_hits.append(mann_whitney(swapped[take], swapped[~take]).auc >= auc - 1e-12)
    ours = ks_two_sample(swapped[:n], swapped[n:], "greater", groups=groups, permutations=40_000)
    assert 10**ours.log10_p == pytest.approx(np.mean(ks_hits), abs=0.01)
    rank = mann_whitney(swapped[:n], swapped[n:], groups=groups, permutations=40_000)
    assert 10**rank.log10_p == pytest.approx(np.mean(auc_hits), abs=0.01)
    assert ours.method == "40,000 permutations of 6 groups"


def test_chunks_do_not_change_the_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.2, 1, 60), rng.normal(size=50)
    whole = ks_two_sample(a, b, method="permutation")
    monkeypatch.setattr("remanence.audit.dejavu.scores.CHUNK_CELLS", 700)
    assert ks_two_sample(a, b, method="permutation") == whole


@pytest.mark.parametrize("test", ["ks", "mw"])
def test_duplicates_fool_the_naive_test_and_not_the_grouped_one(test: str) -> None:
    rng = np.random.default_rng(6)
    singles, naive, grouped = [], [], []
    groups = (np.repeat(np.arange(40), 5), np.repeat(np.arange(40, 75), 5))

    def log10_p(a: np.ndarray, b: np.ndarray, g: tuple[np.ndarray, np.ndarray]) -> float:
        if test == "mw":
            return mann_whitney(a, b, groups=g, permutations=199).log10_p
        return ks_two_sample(a, b, "greater", groups=g, permutations=199).log10_p

    for _ in range(300):
        a, b = rng.normal(size=40), rng.normal(size=35)
        a5, b5 = np.repeat(a, 5), np.repeat(b, 5)
        singles.append(log10_p(a, b, (np.arange(40), np.arange(40, 75))))
        grouped.append(log10_p(a5, b5, groups))
        naive.append(log10_p(a5, b5, (np.arange(200), np.arange(200, 375))))
    assert grouped == singles
    level = np.log10(0.05)
    assert np.mean(np.array(grouped) <= level) < 0.08
    assert np.mean(np.array(naive) <= level) > 0.2


def test_choice_of_method() -> None:
    rng = np.random.default_rng(7)
    small, large = rng.normal(size=(2, 50)), rng.normal(size=(2, 500))
    assert ks_two_sample(*small).method == "exact"
    assert ks_two_sample(*large).method == "asymptotic"
    assert ks_two_sample(*np.round(large, 1)).method == "2,000 permutations"
    tied = small.copy()
    tied[1, 0] = tied[0, 0]  # one tie in a small sample already breaks the exact law
    assert ks_two_sample(*tied).method == "2,000 permutations"


# The null


@pytest.mark.parametrize(
    ("test", "size"),
    [
        (lambda a, b: ks_two_sample(a, b[:-4]).log10_p, 90),
        (lambda a, b: ks_two_sample(a, b[:-2], "greater").log10_p, 25),
        (lambda a, b: ks_two_sample(a, b[:-14], "greater").log10_p, 400),
        (lambda a, b: ks_two_sample(a, b[:-14]).log10_p, 400),
        (lambda a, b: mann_whitney(a, b).log10_p, 60),
    ],
    ids=["exact", "exact one-sided", "asymptotic one-sided", "asymptotic", "rank"],
)
def test_level_on_held_out_scores(
    test: Callable[[np.ndarray, np.ndarray], float], size: int
) -> None:
    scores = np.random.default_rng(8).gamma(2.0, size=5000)
    logs: list[float] = []

    def kept(a: np.ndarray, b: np.ndarray) -> float:
        logs.append(test(a, b))
        return logs[-1]

    rate = null_rejections(scores, kept, draws=2000, size=size, seed=1)
    assert 0.035 <= rate.value <= 0.06
    assert rate.low < rate.value < rate.high
    assert 0.004 <= np.mean(np.array(logs) <= -2) <= 0.016


def test_permutation_keeps_its_level_with_heavy_ties_where_the_limit_law_does_not() -> None:
    scores = np.round(np.random.default_rng(9).normal(size=4000))

    def permuted(a: np.ndarray, b: np.ndarray) -> float:
        return ks_two_sample(a, b, "greater", permutations=199).log10_p

    def limit(a: np.ndarray, b: np.ndarray) -> float:
        return ks_two_sample(a, b, "greater", "asymptotic").log10_p

    rate = null_rejections(scores, permuted, draws=600, size=100)
    assert rate.low <= 0.05 <= rate.high
    assert null_rejections(scores, limit, draws=1000, size=100).high < 0.05


def test_a_lying_test_is_caught_by_the_null_check() -> None:
    scores = np.random.default_rng(10).normal(size=400)
    rate = null_rejections(scores, lambda a, b: 2 * mann_whitney(a, b).log10_p, draws=400, size=50)
    assert rate.low > 0.05
    with pytest.raises(InputError, match="need 402 images; there are 400"):
        null_rejections(scores, lambda _a, _b: 0.0, draws=1, size=201)


# Ranks


def test_rank_test_is_scipys_with_ties() -> None:
    rng = np.random.default_rng(11)
    for ties in (False, True):
        for _ in range(100):
            a, b = pair(rng, ties=ties)
            theirs = stats.mannwhitneyu(a, b, alternative="greater", method="asymptotic")
            ours = mann_whitney(a, b)
            assert ours.auc == pytest.approx(theirs.statistic / (len(a) * len(b)))
            assert 10**ours.log10_p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert mann_whitney(np.ones(5), np.ones(6)).log10_p == 0


@pytest.mark.parametrize("copies", [1, 4])
def test_auc_interval_covers_also_under_duplication(copies: int) -> None:
    rng = np.random.default_rng(12)
    truth = stats.norm.cdf(0.8 / math.sqrt(2))
    groups = (np.repeat(np.arange(60), copies), np.repeat(np.arange(60, 140), copies))
    covered = []
    for _ in range(1000):
        a, b = rng.normal(0.8, 1, 60), rng.normal(size=80)
        interval = auc_interval(np.repeat(a, copies), np.repeat(b, copies), groups=groups)
        covered.append(interval.low <= truth <= interval.high)
    assert 0.935 <= np.mean(covered) <= 0.97


def test_auc_interval_of_separated_samples_is_not_a_point() -> None:
    high, low = np.arange(30.0) + 100, np.arange(50.0)
    assert auc_interval(high, low).low == pytest.approx(0.025 ** (1 / 30))
    assert auc_interval(low, high).high == pytest.approx(1 - 0.025 ** (1 / 30))


# Errors and speed


def test_unusable_input_is_named() -> None:
    a = np.arange(30.0)
    with pytest.raises(InputError, match="candidate scores hold NaN"):
        ks_two_sample(np.append(a, np.nan), a)
    with pytest.raises(InputError, match="no reference scores"):
        mann_whitney(a, [])
    with pytest.raises(InputError, match="one score an image"):
        ks_two_sample(a[:, None], a)
    with pytest.raises(InputError, match="2 groups have images among both"):
        ks_two_sample(a, a, groups=(np.arange(30), np.arange(28, 58)))
    with pytest.raises(InputError, match=r"reference groups have shape \(3,\)"):
        ks_two_sample(a, a, groups=(np.arange(30), np.arange(3)))
    with pytest.raises(InputError, match="ignores groups"):
        ks_two_sample(a, a, method="exact", groups=(np.arange(30), np.arange(30, 60)))
    with pytest.raises(InputError, match="untied scores"):
        ks_two_sample(a, a, method="exact")
    with pytest.raises(InputError, match="permutations give no p-value"):
        ks_two_sample(a, a, permutations=0)


def test_speed() -> None:
    rng = np.random.default_rng(13)
    a, b = rng.normal(size=(2, 1_000_000))
    start = time.process_time()
    ks_two_sample(a, b)
    assert time.process_time() - start < 1
    start = time.process_time()
    ks_two_sample(a[:10_000], b[:10_000], method="permutation")
    assert time.process_time() - start < 3
