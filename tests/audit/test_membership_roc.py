"""ROC figures against closed forms, brute force, enumeration and simulation."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from remanence.audit.membership.power import power_statement
from remanence.audit.membership.roc import (
    auc_estimate,
    decide,
    delong,
    evaluate,
    mann_whitney_log10_p,
    tpr_at,
)
from remanence.errors import InputError

N01 = NormalDist()


def gaussian(n: int, m: int, mean: float, std: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Members N(mean, std^2), non-members N(0, 1)."""
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(mean, std, n), rng.normal(0, 1, m)])
    order = rng.permutation(n + m)
    return scores[order], (np.arange(n + m) < n)[order]


def slow_delong(scores: np.ndarray, member: np.ndarray) -> tuple[float, float]:
    """DeLong, DeLong and Clarke-Pearson (1988) over all n m pairs."""
    x, y = scores[member], scores[~member]
    psi = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    variance = psi.mean(1).var(ddof=1) / len(x) + psi.mean(0).var(ddof=1) / len(y)
    return float(psi.mean()), float(variance)


def test_two_gaussians_reach_their_closed_form() -> None:
    rng = np.random.default_rng(0)
    n = 400_000
    scores = np.concatenate([rng.normal(2, 1, n), rng.normal(0, 0.5, n)])
    member = np.arange(2 * n) < n
    roc = evaluate(scores, member, fprs=(0.01,))
    assert N01.cdf(2 / math.sqrt(1.25)) == pytest.approx(0.96318, abs=1e-5)
    assert roc.auc.value == pytest.approx(0.96318, abs=6e-4)
    assert roc.auc.low < 0.96318 < roc.auc.high
    assert roc.oracle.balanced_accuracy.value == pytest.approx(0.91527, abs=1e-3)
    assert roc.oracle.threshold == pytest.approx(0.830, abs=0.03)
    exact = 1 - N01.cdf(0.5 * N01.inv_cdf(0.99) - 2)
    assert roc.tpr_at[0].value == pytest.approx(exact, abs=4e-3)


def test_equal_scores_reveal_nothing() -> None:
    member = np.arange(200) < 100
    roc = evaluate(np.full(200, 3.5), member, fprs=(0.01, 0.1, 1.0))
    assert roc.auc.value == 0.5
    assert roc.auc.low < 0.45
    assert roc.auc.high > 0.55
    assert roc.oracle.balanced_accuracy.value == 0.5
    assert [at.value for at in roc.tpr_at] == [0.0, 0.0, 1.0]
    assert [at.value for at in roc.tnr_at] == [0.0, 0.0, 1.0]
    assert (roc.ap_member, roc.ap_nonmember) == (0.5, 0.5)
    assert roc.fpr.tolist() == roc.tpr.tolist() == [0, 1]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_delong_is_the_sum_over_all_pairs(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(2, 20)), data.draw(st.integers(2, 20))
    values = data.draw(st.lists(st.integers(0, 12), min_size=n + m, max_size=n + m))
    scores, member = np.array(values, dtype=np.float64), np.arange(n + m) < n
    auc, variance = delong(scores, member)
    slow_auc, slow_variance = slow_delong(scores, member)
    assert auc == pytest.approx(slow_auc, abs=1e-12)
    assert variance == pytest.approx(slow_variance, abs=1e-12)
    assert auc == pytest.approx(roc_auc_score(member, scores), abs=1e-12)


@pytest.mark.parametrize(("n", "m", "mean"), [(60, 60, 0.0), (40, 200, 0.5), (100, 100, 1.5)])
def test_auc_interval_covers(n: int, m: int, mean: float) -> None:
    truth = N01.cdf(mean / math.sqrt(2))
    covered = 0
    for seed in range(500):
        auc = auc_estimate(*delong(*gaussian(n, m, mean, 1, seed)), min(n, m), 0.95)
        covered += auc.low <= truth <= auc.high
    assert 0.925 <= covered / 500 <= 0.975


def test_separated_scores_keep_an_open_interval() -> None:
    roc = evaluate(np.arange(80.0), np.arange(80) >= 40, fprs=(0.1,))
    assert (roc.auc.value, roc.auc.high) == (1.0, 1.0)
    assert 0.85 < roc.auc.low < 0.95
    flipped = evaluate(-np.arange(80.0), np.arange(80) >= 40, fprs=(0.1,))
    assert flipped.auc.low == 0
    assert flipped.sign.holds is False
    assert roc.sign.holds is True


def slow_tpr(scores: np.ndarray, member: np.ndarray, alpha: float) -> float:
    best = 0.0
    for t in [*np.unique(scores), np.inf]:
        hit = scores >= t
        if hit[~member].mean() <= alpha + 1e-12:
            best = max(best, float(hit[member].mean()))
    return best


@given(st.integers(0, 10_000), st.integers(1, 15), st.sampled_from([0.01, 0.05, 0.07, 0.29, 0.5]))
@settings(max_examples=60, deadline=None)
def test_tpr_is_the_best_vertex(seed: int, levels: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    scores, member = rng.integers(0, levels, 160).astype(float), np.arange(160) < 60
    at = tpr_at(scores, member, alpha)
    assert at.value == slow_tpr(scores, member, alpha)
    assert (scores[member] >= at.threshold).mean() == at.value
    assert (scores[~member] >= at.threshold).mean() == at.error.value <= alpha
    # Non-members found at few lost members: the same question with the roles changed.
    tnr = evaluate(scores, member, fprs=(alpha,)).tnr_at[0]
    assert tnr.value == slow_tpr(-scores, ~member, alpha)
    assert (scores[~member] < tnr.threshold).mean() == tnr.value
    assert (scores[member] < tnr.threshold).mean() == tnr.error.value


def test_tie_block_is_never_cut() -> None:
    # 20 members and 2 non-members tie at the top: 1 % of 100 allows only one of the two.
    scores = np.concatenate([np.ones(20), np.zeros(80), np.ones(2), np.zeros(98)])
    at = tpr_at(scores, np.arange(200) < 100, 0.01)
    assert (at.value, at.threshold, at.resolved) == (0.0, math.inf, True)
    assert tpr_at(scores, np.arange(200) < 100, 0.02).value == 0.2


def test_unresolved_rate_says_so_and_is_a_number() -> None:
    scores, member = gaussian(100, 100, 4, 1, 0)
    roc = evaluate(scores, member, fprs=(1e-3, 1e-2))
    assert [at.resolved for at in roc.tpr_at] == [False, True]
    at = roc.tpr_at[0]
    assert at.value == (scores[member] > scores[~member].max()).mean() > 0
    assert at.error.value == 0
    exact = stats.binomtest(round(at.value * 100), 100).proportion_ci(0.95, "exact")
    assert (at.low, at.high) == pytest.approx((exact.low, exact.high))
    assert at.error.high == pytest.approx(1 - 0.025 ** (1 / 100))


def test_five_to_one_random_scores_are_no_attack() -> None:
    rng = np.random.default_rng(1)
    scores, member = rng.normal(size=6000), np.arange(6000) < 5000
    decision = decide(scores, member, threshold=-5.0)
    assert decision.accuracy.value == pytest.approx(5 / 6, abs=1e-3)
    assert decision.prior == pytest.approx(5 / 6)
    assert decision.balanced_accuracy.value == pytest.approx(0.5, abs=1e-3)


def test_oracle_flatters_and_transfer_does_not() -> None:
    oracle, transfer = [], []
    for seed in range(200):
        scores, member = gaussian(60, 60, 0, 1, seed)
        elsewhere = evaluate(*gaussian(60, 60, 0, 1, seed + 1000), fprs=()).oracle.threshold
        oracle.append(evaluate(scores, member, fprs=()).oracle.balanced_accuracy.value)
        transfer.append(decide(scores, member, elsewhere).balanced_accuracy.value)
    assert np.mean(oracle) > 0.55
    assert np.mean(transfer) == pytest.approx(0.5, abs=0.012)


def test_transfer_intervals_cover() -> None:
    truth = {"tpr": 1 - N01.cdf(-0.5), "balanced_accuracy": (1 - N01.cdf(-0.5) + N01.cdf(0.5)) / 2}
    covered = dict.fromkeys(truth, 0)
    for seed in range(300):
        decision = decide(*gaussian(80, 50, 1, 1, seed), 0.5)
        for name, value in truth.items():
            figure = getattr(decision, name)
            covered[name] += figure.low <= value <= figure.high
    assert all(hits / 300 >= 0.93 for hits in covered.values())


@given(st.integers(0, 10_000), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_average_precision_merges_ties(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores, member = rng.integers(0, levels, 100).astype(float), rng.random(100) < 0.5
    if not 30 <= member.sum() <= 70:
        return
    roc = evaluate(scores, member)
    assert roc.ap_member == pytest.approx(average_precision_score(member, scores))
    assert roc.ap_nonmember == pytest.approx(average_precision_score(~member, -scores))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_rates_do_not_depend_on_the_scale_of_scores(seed: int) -> None:
    scores, member = gaussian(50, 50, 0.7, 1, seed)
    a, b = evaluate(scores, member), evaluate(np.exp(3 * scores), member)
    assert (a.fpr.tolist(), a.tpr.tolist()) == (b.fpr.tolist(), b.tpr.tolist())
    assert (a.auc, a.ap_member) == (b.auc, b.ap_member)


def test_thresholds_lie_between_neighbouring_floats() -> None:
    low, high = 1.0, np.nextafter(1.0, 2)
    scores = np.concatenate([np.full(40, high), np.full(40, low)])
    roc = evaluate(scores, np.arange(80) < 40)
    assert roc.oracle.balanced_accuracy.value == 1
    assert ((scores >= roc.oracle.threshold) == (np.arange(80) < 40)).all()


def test_groups_have_their_own_tables() -> None:
    scores, member = gaussian(200, 200, 0, 1, 3)
    groups = np.where(np.arange(400) < 390, np.arange(400) % 2, 2)
    scores[(groups == 1) & member] += 10
    roc = evaluate(scores, member, group_by=groups)
    tables = {row.group: row for row in roc.groups}
    assert set(tables) == {"0", "1", "2"}
    assert tables["1"].roc is not None
    assert tables["1"].roc.auc.value == 1
    assert tables["2"].roc is None
    assert tables["2"].n_member + tables["2"].n_nonmember == 10
    alone = evaluate(scores[groups == 0], member[groups == 0])
    assert tables["0"].roc is not None
    assert tables["0"].roc.auc == alone.auc


# Mann-Whitney


def test_exact_p_is_an_enumeration() -> None:
    rng = np.random.default_rng(0)
    for size, top in [(5, 4), (4, 3), (6, 100)]:
        scores = rng.integers(0, top, 2 * size).astype(float)
        scores[:size] += rng.integers(0, 2, size)
        ranks = stats.rankdata(scores)
        observed = ranks[:size].sum()
        sums = [sum(pick) for pick in itertools.combinations(ranks, size)]
        exact = np.mean(np.array(sums) >= observed - 1e-9)
        log10_p = mann_whitney_log10_p(scores, np.arange(2 * size) < size)
        assert 10**log10_p == pytest.approx(exact, rel=1e-9)


def test_p_is_never_zero() -> None:
    small = mann_whitney_log10_p(np.arange(40.0), np.arange(40) >= 20)
    assert small == pytest.approx(-math.log10(math.comb(40, 20)), rel=1e-6)
    big = mann_whitney_log10_p(np.arange(20_000.0), np.arange(20_000) >= 10_000)
    z = (0.5 * 1e8 - 0.5) / math.sqrt(1e8 * 20_001 / 12)
    assert big == pytest.approx(float(stats.norm.logsf(z)) / math.log(10))
    assert -3300 < big < -3200
    assert mann_whitney_log10_p(np.ones(500), np.arange(500) < 250) == 0
    assert mann_whitney_log10_p(-np.arange(500.0), np.arange(500) >= 250) <= 0


@pytest.mark.parametrize("levels", [3, 40, 10**6])
def test_p_agrees_with_scipy_in_the_bulk(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores, member = rng.integers(0, levels, 900).astype(float), np.arange(900) < 400
    scores[member] += rng.random(400) < 0.1
    peer = stats.mannwhitneyu(
        scores[member], scores[~member], alternative="greater", method="asymptotic"
    )
    assert 10 ** mann_whitney_log10_p(scores, member) == pytest.approx(peer.pvalue, rel=1e-9)


@pytest.mark.parametrize(("n", "levels"), [(8, 3), (8, 10**6), (100, 4), (100, 10**6)])
def test_false_alarms_of_the_rank_test(n: int, levels: int) -> None:
    rng = np.random.default_rng(7)
    runs = 150 if n == 8 else 600
    alarms = sum(
        mann_whitney_log10_p(rng.integers(0, levels, 2 * n).astype(float), np.arange(2 * n) < n)
        <= math.log10(0.05)
        for _ in range(runs)
    )
    assert alarms <= stats.binom.ppf(0.999, runs, 0.05)


# Power


def test_power_statement_holds_in_simulation() -> None:
    statement = power_statement(150, 100, fprs=(0.05,))
    shift = math.sqrt(2) * N01.inv_cdf(statement.auc)
    rng = np.random.default_rng(0)
    member = np.arange(250) < 150
    found = 0
    for _ in range(600):
        scores = rng.normal(size=250) + shift * member
        found += mann_whitney_log10_p(scores, member) <= math.log10(0.05)
    assert found / 600 == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(("n", "m", "fpr"), [(150, 100, 0.05), (400, 2000, 0.01), (100, 60, 0.001)])
def test_tpr_power_counts_what_it_says(n: int, m: int, fpr: float) -> None:
    statement = power_statement(n, m, fprs=(fpr,))
    rng = np.random.default_rng(1)
    k, hits = math.floor(fpr * m + 1e-9), statement.hits_needed[0]

    def caught(share: float) -> float:
        """Share of runs with enough members above all but k non-members."""
        found = 0
        for _ in range(800):
            members = rng.normal(size=n) + 100 * (rng.random(n) < share)
            found += (members > np.sort(rng.normal(size=m))[-k - 1]).sum() >= hits
        return found / 800

    assert caught(0.0) <= stats.binom.ppf(0.999, 800, 0.05) / 800
    # The rest of the members also pass, at the rate of the non-members.
    expected_fpr = (k + 1) / (m + 1)
    share = (statement.tpr[0] - expected_fpr) / (1 - expected_fpr)
    assert caught(share) == pytest.approx(0.8, abs=0.06)


def test_power_grows_with_samples_and_reads_as_a_sentence() -> None:
    small, big = power_statement(100, 100), power_statement(10_000, 10_000)
    assert 0.5 < big.auc < small.auc < 1
    assert all(0 < b <= s for b, s in zip(big.tpr, small.tpr, strict=True))
    assert "10,000 members" in str(big)
    assert "80%" in str(big)


# Bad input


@pytest.mark.parametrize(
    ("scores", "member", "hint"),
    [
        (np.zeros(40), np.arange(40) < 20, "30"),
        (np.zeros(100), np.zeros(100, bool), "30"),
        (np.r_[np.nan, np.zeros(99)], np.arange(100) < 50, "finite"),
        (np.zeros(100), np.arange(99) < 50, "99"),
        (np.zeros((50, 2)), np.arange(100) < 50, "shape"),
        (np.zeros(100), np.arange(100), "True or False"),
    ],
)
def test_bad_input_is_one_line(scores: np.ndarray, member: np.ndarray, hint: str) -> None:
    with pytest.raises(InputError, match=hint) as error:
        evaluate(scores, member)
    assert "\n" not in str(error.value)


def test_bad_rates_and_groups() -> None:
    scores, member = gaussian(50, 50, 0, 1, 0)
    with pytest.raises(InputError, match="false-positive rate"):
        evaluate(scores, member, fprs=(1.5,))
    with pytest.raises(InputError, match="confidence"):
        evaluate(scores, member, confidence=95)
    with pytest.raises(InputError, match="group"):
        evaluate(scores, member, group_by=np.zeros(3))
    with pytest.raises(InputError, match="threshold"):
        decide(scores, member, math.nan)
