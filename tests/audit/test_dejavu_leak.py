"""Signal, power, leaked fraction and the verdict, against closed forms and simulated leaks."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from remanence.audit.dejavu.detect import detect
from remanence.audit.dejavu.detect_many import detect_many, distance_interval, holm_log10
from remanence.audit.dejavu.fraction import displayed, fraction_equivalence, leaked_fraction
from remanence.audit.dejavu.kolmogorov_smirnov import ks_two_sample
from remanence.audit.dejavu.leak import (
    critical_constant,
    images_needed,
    min_detectable_fraction,
    min_detectable_fraction_by_rank,
    top_margin,
)
from remanence.audit.dejavu.rank_test import mann_whitney
from remanence.audit.evidence import Check, Estimate
from remanence.errors import InputError

SHIFT = 0.8
D_FULL = 2 * stats.norm.cdf(SHIFT / 2) - 1
AUC_FULL = float(stats.norm.cdf(SHIFT / math.sqrt(2)))


def mixture(rng: np.random.Generator, f: float, m: int) -> np.ndarray:
    """m scores, each a member's with probability f."""
    return rng.normal(size=m) + SHIFT * (rng.random(m) < f)


# The signal


def test_top_margin_is_the_logit_of_the_confidence_and_does_not_saturate() -> None:
    logits = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)) * 3
    confidence = logits.double().softmax(1).max(1).values
    expected = (confidence / (1 - confidence)).log().numpy()
    margin = top_margin(logits)
    assert margin.dtype == np.float64
    assert margin == pytest.approx(expected, rel=1e-9)
    sure = torch.tensor([[50.0, 0, 0], [60.0, 0, 0]])
    assert sure.softmax(1).max(1).values.tolist() == [1, 1]
    assert top_margin(sure) == pytest.approx([50 - math.log(2), 60 - math.log(2)])
    assert top_margin(torch.tensor([[2.0, 2.0]])) == pytest.approx([0])


def test_top_margin_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(25, 4, generator=torch.Generator().manual_seed(1))
    whole = top_margin(logits)
    monkeypatch.setattr("remanence.audit.dejavu.leak.ROWS", 7)
    assert (top_margin(logits) == whole).all()


def test_top_margin_refuses_what_is_not_logits() -> None:
    with pytest.raises(InputError, match="before the softmax"):
        top_margin(torch.randn(9, 4).softmax(1))
    with pytest.raises(InputError, match="NaN"):
        top_margin(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(InputError, match="K >= 2"):
        top_margin(torch.randn(9, 1))


# Power


def test_smallest_detectable_fraction_at_the_stated_figures() -> None:
    assert critical_constant(0.05) == pytest.approx(1.3581, abs=1e-4)
    assert critical_constant(0.001) == pytest.approx(1.9495, abs=1e-4)
    assert min_detectable_fraction(0.302, 500, 4000) == pytest.approx(0.213, abs=5e-4)
    assert min_detectable_fraction(0.302, 2000, 4000) == pytest.approx(0.123, abs=5e-4)
    one_sided = min_detectable_fraction(0.302, 500, 4000, alternative="greater")
    assert one_sided == pytest.approx(0.213 * 1.2239 / 1.3581, abs=5e-4)


def test_images_needed_inverts_it_at_one_half_and_grows_with_power() -> None:
    f = min_detectable_fraction(0.3, 1500, 1500)
    assert images_needed(0.3, f, power=0.5) == pytest.approx(1500, abs=1)
    assert images_needed(0.3, f, power=0.9) > images_needed(0.3, f, power=0.8) > 1500
    assert images_needed(0.3, f / 2, power=0.8) == pytest.approx(
        4 * images_needed(0.3, f, power=0.8), rel=1e-3
    )


def test_power_in_simulated_leaks() -> None:
    rng = np.random.default_rng(0)
    f, level = 0.2, math.log10(0.05)
    size = images_needed(D_FULL, f, power=0.8, alternative="greater")
    found = [
        ks_two_sample(mixture(rng, f, size), rng.normal(size=size), "greater").log10_p <= level
        for _ in range(400)
    ]
    assert 0.8 <= np.mean(found) < 0.99  # a lower bound of the power, not far off
    share = min_detectable_fraction(D_FULL, 400, 900, alternative="greater")
    found = [
        ks_two_sample(mixture(rng, share, 400), rng.normal(size=900), "greater").log10_p <= level
        for _ in range(400)
    ]
    assert 0.5 <= np.mean(found) <= 0.9
    smallest = min_detectable_fraction_by_rank(AUC_FULL, 400, 900)
    found = [
        mann_whitney(mixture(rng, smallest, 400), rng.normal(size=900)).log10_p <= level
        for _ in range(1000)
    ]
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)


def test_power_refuses_what_is_out_of_range() -> None:
    for d_full in (0, 1.2):
        with pytest.raises(InputError, match="out of range"):
            min_detectable_fraction(d_full, 10, 10)
    with pytest.raises(InputError, match="alpha 0"):
        min_detectable_fraction(0.3, 10, 10, alpha=0)
    with pytest.raises(InputError, match="at least one image"):
        min_detectable_fraction(0.3, 0, 10)
    with pytest.raises(InputError, match="fraction 0"):
        images_needed(0.3, 0)
    with pytest.raises(InputError, match="power 1"):
        images_needed(0.3, 0.1, power=1)
    with pytest.raises(InputError, match="stronger signal"):
        min_detectable_fraction_by_rank(0.5, 10, 10)


# The fraction


@pytest.mark.parametrize(("method", "size"), [("mean_shift", 600), ("threshold", 1200)])
def test_fraction_is_unbiased_and_its_interval_covers(method: str, size: int) -> None:
    rng = np.random.default_rng(1)
    covered = []
    for f in (0.0, 0.1, 0.3):
        values = []
        for seed in range(500):
            sets = mixture(rng, f, 300), rng.normal(size=size), SHIFT + rng.normal(size=size)
            estimate = leaked_fraction(*sets, method=method, resamples=200, seed=seed)  # type: ignore[arg-type]  # a parametrised literal
            values.append(estimate.value)
            covered.append(estimate.low <= f <= estimate.high)
        assert abs(np.mean(values) - f) < 0.01
        assert min(values) < 0 or f > 0.2  # never clipped
    assert 0.93 <= np.mean(covered) <= 0.97


def test_spread_of_the_fraction_at_the_stated_figures() -> None:
    rng = np.random.default_rng(2)
    values = []
    for _ in range(200):
        sets = mixture(rng, 0.3, 1000), rng.normal(size=4000), SHIFT + rng.normal(size=4000)
        values.append(leaked_fraction(*sets, resamples=1).value)
    assert np.mean(values) == pytest.approx(0.3, abs=0.01)
    assert np.std(values) == pytest.approx(0.040, abs=0.008)


def test_threshold_is_not_chosen_on_the_images_it_is_judged_by() -> None:
    # A threshold judged where it was chosen promises too high a TPR - FPR, so a full leak of new
    # images reads as about 0.9.
    rng = np.random.default_rng(3)
    values = []
    for seed in range(400):
        sets = 1.2 + rng.normal(size=2000), rng.normal(size=200), 1.2 + rng.normal(size=200)
        values.append(leaked_fraction(*sets, method="threshold", resamples=1, seed=seed).value)
    assert np.median(values) == pytest.approx(1, abs=0.04)


def test_grouped_bootstrap_of_duplicates_is_that_of_singles() -> None:
    rng = np.random.default_rng(4)
    sets = [mixture(rng, 0.2, 200), rng.normal(size=300), SHIFT + rng.normal(size=300)]
    tens = [np.repeat(s, 10) for s in sets]
    ids = tuple(np.repeat(np.arange(len(s)), 10) for s in sets)
    single = leaked_fraction(*sets)
    grouped = leaked_fraction(*tens, groups=ids)  # type: ignore[arg-type]  # three arrays
    naive = leaked_fraction(*tens)
    assert grouped.value == pytest.approx(single.value)
    assert grouped.low == pytest.approx(single.low, abs=1e-9)
    assert naive.high - naive.low < 0.5 * (single.high - single.low)


def test_normal_limit_of_large_sets_agrees_with_resampling(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    sets = mixture(rng, 0.2, 500), rng.normal(size=500), SHIFT + rng.normal(size=500)
    resampled = leaked_fraction(*sets, resamples=4000)
    monkeypatch.setattr("remanence.audit.dejavu.fraction.NORMAL_LIMIT", 10)
    limit = leaked_fraction(*sets, resamples=4000)
    assert limit.value == resampled.value
    assert (limit.low, limit.high) == pytest.approx((resampled.low, resampled.high), abs=0.015)


def test_only_the_display_is_clipped() -> None:
    shown = displayed(Estimate("leaked fraction", -0.02, -0.1, 0.06))
    assert (shown.value, shown.low, shown.high) == (0, 0, 0.06)


def test_equivalence_keeps_its_level_at_the_margin_and_shows_absence() -> None:
    rng = np.random.default_rng(6)

    def shown(f: float) -> float:
        results = []
        for seed in range(250):
            sets = mixture(rng, f, 800), rng.normal(size=800), SHIFT + rng.normal(size=800)
            evidence = fraction_equivalence(*sets, margin=0.2, resamples=150, seed=seed)
            (interval,) = evidence.estimates
            within = max(-interval.low, interval.high) <= 0.2
            assert within == (evidence.verdict == "detected")
            results.append(within)
        return float(np.mean(results))

    assert 0.02 <= shown(0.2) <= 0.08
    assert shown(0.0) > 0.85


def test_fraction_refuses_members_that_tell_nothing() -> None:
    rng = np.random.default_rng(7)
    a, b, c = rng.normal(size=(3, 100))
    with pytest.raises(InputError, match="known members score no higher"):
        leaked_fraction(a, b, c)
    with pytest.raises(InputError, match="member scores hold NaN"):
        leaked_fraction(a, b, np.append(c, np.nan))
    with pytest.raises(InputError, match="margin 1"):
        fraction_equivalence(a, b, c + 3, margin=1)
    with pytest.raises(InputError, match="form one group"):
        leaked_fraction(a, b, c + 3, method="threshold", groups=(None, np.zeros(100), None))


# The verdict


def test_detects_a_leak_and_says_how_large() -> None:
    rng = np.random.default_rng(8)
    members = SHIFT + rng.normal(size=3000)
    found = detect(mixture(rng, 0.4, 1000), rng.normal(size=3000), known_members=members).primary
    assert found.verdict == "detected"
    assert found.statistic == "one-sided KS distance"
    auc, fraction = found.estimates
    assert auc.low <= 0.5 + 0.4 * (AUC_FULL - 0.5) <= auc.high
    assert fraction.low <= 0.4 <= fraction.high
    smallest = min_detectable_fraction(
        ks_two_sample(members, rng.normal(size=3000), "greater").d, 1000, 3000, 0.05, "greater"
    )
    assert smallest == pytest.approx(0.14, abs=0.01)
    assert "Leaks below 1" in found.would_change
    assert "images a side would find" in found.would_change


def test_no_leak_and_less_confident_candidates_are_not_detected() -> None:
    rng = np.random.default_rng(9)
    reference = rng.normal(size=1000)
    assert detect(rng.normal(size=1000), reference).primary.verdict == "not detected"
    unsure = rng.normal(size=1000) - 1
    for test in ("ks1", "mw"):
        assert detect(unsure, reference, test=test).primary.verdict == "not detected"  # type: ignore[arg-type]  # a literal
    assert detect(unsure, reference, test="ks").primary.verdict == "detected"


def test_a_failed_check_voids_the_verdict() -> None:
    rng = np.random.default_rng(10)
    failed = Check("Candidates and references are exchangeable.", holds=False, finding="AUC 0.93")
    found = detect(rng.normal(size=500) + 2, rng.normal(size=500), checks=(failed,)).primary
    assert found.log10_p < -50
    assert found.verdict == "not interpretable"


def test_exploratory_tests_are_named_so_and_leave_the_primary_alone() -> None:
    rng = np.random.default_rng(11)
    c, r = rng.normal(size=(2, 200))
    features = rng.normal(size=(200, 3)) + 1, rng.normal(size=(200, 3))
    alone = detect(c, r).primary
    both = detect(c, r, exploratory={"mw_loss": (c + 1, r), "learned": features})
    assert both.primary == alone
    assert both.primary.verdict == "not detected"
    assert [e.statistic for e in both.exploratory] == ["AUC of the label's margin", "out-of-fold t"]
    assert all(e.verdict == "detected" for e in both.exploratory)
    assert all("not the declared test" in e.question for e in both.exploratory)
    assert both.exploratory[1].estimates == ()


def test_label_aware_rank_test_reports_its_own_power() -> None:
    rng = np.random.default_rng(12)
    members, reference = SHIFT + rng.normal(size=2000), rng.normal(size=2000)
    c = mixture(rng, 0.0, 500)
    found = detect(c, reference, test="mw_loss", known_members=members).primary
    smallest = min_detectable_fraction_by_rank(mann_whitney(members, reference).auc, 500, 2000)
    assert f"{smallest:.1%}" in found.would_change
    blind = detect(c, reference, test="mw", known_members=reference - 1).primary
    assert "no leak could be found" in blind.would_change
    assert len(blind.estimates) == 1


def test_groups_decide_by_the_number_of_groups() -> None:
    rng = np.random.default_rng(13)
    c, r = np.repeat(rng.normal(0.15, 1, 60), 20), np.repeat(rng.normal(size=60), 20)
    groups = (np.repeat(np.arange(60), 20), np.repeat(np.arange(60, 120), 20))
    assert detect(c, r).primary.method == "2,000 permutations"  # heavy ties
    grouped = detect(c, r, groups=groups, known_members=r + 1).primary
    assert grouped.method == "2,000 permutations of 120 groups"
    ids = (np.arange(60), np.arange(60, 120))
    singles = ks_two_sample(c[::20], r[::20], "greater", groups=ids)
    assert grouped.log10_p == singles.log10_p


def test_unusable_input_is_named() -> None:
    rng = np.random.default_rng(14)
    a, b = rng.normal(size=(2, 100))
    with pytest.raises(InputError, match="give at least 20 candidate images; there are 12"):
        detect(a[:12], b)
    with pytest.raises(InputError, match="20 independent groups of reference images; there are 10"):
        detect(a, b, groups=(np.arange(100), 100 + np.arange(100) // 10))
    with pytest.raises(InputError, match="reference scores are all 1:"):
        detect(a, np.ones(50))
    with pytest.raises(InputError, match="candidate scores hold NaN"):
        detect(np.append(a, np.nan), b)
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        detect(rng.random(50), rng.random(50) + 0.2, confidences=True)
    with pytest.raises(InputError, match="'t-test' is unknown"):
        detect(a, b, test="t-test")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InputError, match="the declared one"):
        detect(a, b, exploratory={"ks1": (a, b)})
    with pytest.raises(InputError, match="needs scores"):
        detect(a[:, None], b[:, None], test="learned", known_members=a)
    with pytest.raises(InputError, match="level 0"):
        detect(a, b, level=0)


# Many sources


def test_holm_in_log_space() -> None:
    ps = [0.01, 0.04, 0.03, 0.5]
    expected = [0.04, 0.09, 0.09, 0.5]
    assert 10 ** np.array(holm_log10(np.log10(ps).tolist())) == pytest.approx(expected)
    assert holm_log10([-400.0, -0.1]) == pytest.approx([-400 + math.log10(2), -0.1])
    assert holm_log10([-0.1, -0.1]) == [0, 0]


def test_only_the_sources_trained_on_are_found() -> None:
    rng = np.random.default_rng(15)
    # Sources differ in confidence by far more than training does: that must not matter.
    sources = [
        ("birds", 5 + mixture(rng, 0.0, 500), 5 + rng.normal(size=500)),
        ("cars", mixture(rng, 0.5, 500), rng.normal(size=500)),
        ("flowers", -3 + mixture(rng, 0.0, 500), -3 + rng.normal(size=500)),
    ]
    found = detect_many(sources)
    assert {name for name, e in found.items() if e.verdict == "detected"} == {"cars"}
    logs = [e.log10_p for e in found.values()]
    assert [e.corrected_log10_p for e in found.values()] == holm_log10(logs)
    distance = found["cars"].estimates[1]
    assert distance.low <= 0.5 * D_FULL <= distance.high
    assert "cars" in found["cars"].question


def test_family_of_innocent_sources_is_rarely_accused() -> None:
    rng = np.random.default_rng(16)
    accused = 0
    for _ in range(250):
        sources = [(str(j), *rng.normal(size=(2, 40))) for j in range(4)]
        accused += any(e.p <= 0.05 for e in detect_many(sources, test="mw").values())
    assert accused / 250 <= 0.08


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_distance_interval_covers(shift: float) -> None:
    rng = np.random.default_rng(17)
    truth = 2 * stats.norm.cdf(shift / 2) - 1
    covered = []
    for _ in range(1000):
        interval = distance_interval(rng.normal(shift, 1, 300), rng.normal(size=400))
        covered.append(interval.low <= truth <= interval.high)
    assert np.mean(covered) >= 0.95


def test_many_refuses_what_is_ambiguous() -> None:
    a, b = np.random.default_rng(18).normal(size=(2, 50))
    with pytest.raises(InputError, match="no source"):
        detect_many([])
    with pytest.raises(InputError, match="one name"):
        detect_many([("x", a, b), ("x", a, b)])
    with pytest.raises(InputError, match="source 'x': give at least 20 candidate"):
        detect_many([("x", a[:5], b)])
