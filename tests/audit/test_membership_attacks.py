"""Attacks against loops, dense counts, closed forms and worlds where the answer is known."""

import math
import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, spearmanr
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score, roc_curve

from remanence.audit.membership.attacks import (
    ATTACKS,
    MALT,
    MAST,
    RMIA,
    Attack,
    BaVarIA,
    LiRA,
    References,
    ZeroOne,
    references_from_logits,
    rmia_score,
)
from remanence.audit.membership.bayes import free_energy
from remanence.audit.membership.signals import Signals, signals_from_logits
from remanence.audit.membership.task_signals import regression_signals
from remanence.errors import InputError

Floats = npt.NDArray[np.float64]


def signals(margin: Floats) -> Signals:
    """Signals of a binary head with these margins, (N,) or (N, Q)."""
    phi = np.asarray(margin, dtype=float)
    return Signals(
        np.logaddexp(0, -phi),
        phi,
        np.exp(-np.logaddexp(0, -phi)),
        (phi > 0).astype(float),
        phi,
        np.zeros(len(phi), int),
    )


def references(margin: Floats, member: npt.NDArray[np.bool_]) -> References:
    """References with these margins, (K, N) or (K, N, Q)."""
    return References.stack([signals(one) for one in margin], member)


def halves(k: int, n: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Balanced design: each sample is in exactly k/2 references."""
    return rng.random((k, n)).argsort(axis=0).argsort(axis=0) < k // 2


def world(
    k: int, n: int, seed: int = 0, gap: float = 1.0, q: int = 1
) -> tuple[Signals, References, npt.NDArray[np.bool_]]:
    """Target and references whose margins are a hard or easy sample's mean, plus gap where in."""
    rng = np.random.default_rng(seed)
    member = halves(k, n, rng)
    inside = rng.random(n) < 0.5
    ease = rng.normal(2, 2, size=(n, 1))
    noise = rng.normal(size=(k + 1, n, q))
    margin = ease + noise
    margin[:-1] += gap * member[..., None]
    margin[-1] += gap * inside[:, None]
    return signals(margin[-1]), references(margin[:-1], member), inside


ALL = [*ATTACKS.values(), lambda: RMIA(online=True), lambda: MAST(statistic="median", tau="mid")]


@settings(max_examples=25, deadline=None)
@given(which=st.sampled_from(range(len(ALL))), seed=st.integers(0, 10**6), q=st.integers(1, 2))
def test_score_rises_when_the_loss_falls(which: int, seed: int, q: int) -> None:
    attack = ALL[which]()
    target, refs, _ = world(8, 60, seed, q=q)
    rng = np.random.default_rng(seed)
    if isinstance(attack, LiRA | BaVarIA) and "in" in attack.needs:
        # Two Gaussians of different width cross twice: the ratio rises between the two means.
        low, high = _means(attack, refs)
        keep = (low < high).all(axis=1)
        refs, low, high = refs.select(keep), low[keep], high[keep]
        u, v = np.sort(rng.random((2, *low.shape)), axis=0)
        worse, better = signals(low + u * (high - low)), signals(low + v * (high - low))
    else:
        worse = target
        better = signals(target.margin + rng.gamma(1.0, size=(60, q)) + 1e-3)
    assert (better.loss < worse.loss).all()
    if isinstance(attack, RMIA):
        attack = attack.with_population(target, refs)
        assert (attack.log_ratio(better, refs) > attack.log_ratio(worse, refs)).all()
    gain = attack.score(better, refs) - attack.score(worse, refs)
    if isinstance(attack, ZeroOne | RMIA):  # counts
        assert (gain >= 0).all()
        assert gain.max() > 0
    else:
        assert (gain > 0).all()


def _means(attack: Attack, refs: References) -> tuple[Floats, Floats]:
    sides = []
    for use in (~refs.member, refs.member):
        weight = use[..., None]
        n = weight.sum(axis=0)
        mean = (refs.margin * weight).sum(axis=0) / n
        if isinstance(attack, BaVarIA):
            overall = (refs.margin * weight).sum(axis=(0, 1)) / n.sum()
            mean = (attack.kappa0 * overall + n * mean) / (attack.kappa0 + n)
        sides.append(mean)
    return sides[0], sides[1]


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_finds_members(name: str) -> None:
    attack = ATTACKS[name]()
    assert attack.name == name
    assert any(c.isdigit() for c in attack.paper)
    assert "\n" not in attack.paper
    target, refs, inside = world(16, 4000, seed=1, gap=2.0)
    scores = attack.score(target, refs)
    assert scores.shape == (4000,)
    assert scores.dtype == np.float64
    assert roc_auc_score(inside, scores) > (0.55 if name == "zero-one" else 0.6)
    # What an attack does not need, it does not read.
    if "references" not in attack.needs:
        np.testing.assert_array_equal(attack.score(target), scores)
    if (
        "in" not in attack.needs
        and "references" in attack.needs
        and name not in {"mast", "mast-all"}
    ):
        blind = np.where(refs.member[..., None], 50.0, refs.margin)
        np.testing.assert_allclose(attack.score(target, references(blind, refs.member)), scores)


def test_zero_one_accuracy_is_half_the_gap() -> None:
    rng = np.random.default_rng(2)
    correct = np.r_[rng.random(300) < 0.9, rng.random(700) < 0.6]
    score = ZeroOne().score(signals(np.where(correct, 1.0, -1.0)))
    guess = score > 0.5
    balanced = 0.5 * (guess[:300].mean() + 1 - guess[300:].mean())
    assert balanced == pytest.approx(0.5 + (correct[:300].mean() - correct[300:].mean()) / 2)


def test_zero_one_and_predicted_labels() -> None:
    predicted = signals_from_logits(torch.randn(4, 3))
    with pytest.raises(InputError, match="true labels"):
        ZeroOne().score(predicted)
    with pytest.raises(InputError, match="undefined for 3"):
        ZeroOne().score(regression_signals(np.zeros(3), np.ones(3)))
    entropy = MALT(signal="entropy").score(predicted)
    assert predicted.entropy is not None
    np.testing.assert_array_equal(entropy, -predicted.entropy[:, 0])
    with pytest.raises(InputError, match="entropy"):
        MALT(signal="entropy").score(signals(np.zeros(2)))


def test_mast_estimators_by_hand() -> None:
    member = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=bool)
    loss = np.array([[1.0, 5.0], [2.0, 6.0], [4.0, 2.0], [9.0, 1.0]])
    refs = References(loss, -loss, np.exp(-loss), member)
    target = replace(signals(np.zeros(2)), loss=np.array([1.5, 0.5])[:, None])
    by_hand = {
        "out": [6.5 - 1.5, 5.5 - 0.5],
        "mid": [(1.5 + 6.5) / 2 - 1.5, (1.5 + 5.5) / 2 - 0.5],
        "all": [4 - 1.5, 3.5 - 0.5],
        "lse": [
            -math.log(np.exp(-loss[:, 0]).mean()) - 1.5,
            -math.log(np.exp(-loss[:, 1]).mean()) - 0.5,
        ],
    }
    for tau, want in by_hand.items():
        np.testing.assert_allclose(MAST(tau=tau).score(target, refs), want, rtol=1e-12)  # type: ignore[arg-type]
    np.testing.assert_allclose(MAST(T=math.inf).score(target, refs), by_hand["all"])
    np.testing.assert_allclose(MAST(T=0).score(target, refs), [1 - 1.5, 1 - 0.5])
    np.testing.assert_allclose(
        MAST(tau="all", statistic="median").score(target, refs), [3 - 1.5, 3.5 - 0.5]
    )
    np.testing.assert_allclose(
        MAST(tau="out", offline_scale=0.5).score(target, refs), [3.25 - 1.5, 2.75 - 0.5]
    )
    np.testing.assert_allclose(
        MAST(tau="mid", signal="margin").score(replace(target, margin=-target.loss), refs),
        by_hand["mid"],
    )


def test_mast_median_with_uneven_counts() -> None:
    rng = np.random.default_rng(3)
    member = rng.random((9, 40)) < 0.4
    member[0], member[1] = True, False
    loss = rng.gamma(1.0, size=(9, 40))
    refs = References(loss, -loss, np.exp(-loss), member)
    want = [np.median(loss[~member[:, n], n]) for n in range(40)]
    got = MAST(tau="out", statistic="median").soft_threshold(refs)
    np.testing.assert_allclose(got[:, 0], want)


def test_mast_ignores_a_constant_of_the_sample() -> None:
    target, refs, _ = world(8, 50)
    shift = np.random.default_rng(4).normal(size=(50, 1)) * 5
    moved = replace(target, loss=target.loss + shift)
    moved_refs = replace(refs, loss=refs.loss + shift)
    for name in ("mast-out", "mast-mid", "mast-all", "mast"):
        attack = ATTACKS[name]()
        np.testing.assert_allclose(
            attack.score(moved, moved_refs), attack.score(target, refs), atol=1e-12
        )


@pytest.mark.parametrize("k", [6, 7])
def test_a_left_out_target_does_not_show_in_the_counts(k: int) -> None:
    """Target outputs are noise, yet references react to members: nothing may be found.

    Without target 2, a member has one IN reference fewer than the rest, which a plain mean tells.
    """
    rng = np.random.default_rng(5)
    member = halves(k, 10_000, rng)
    margin = rng.normal(size=(k, 10_000)) + 3.0 * member
    margin[2] = rng.normal(1.5, 0.5, size=10_000)
    refs = references(margin, member)
    target, rest, inside = refs.leave_out(2)
    np.testing.assert_array_equal(inside, member[2])
    np.testing.assert_array_equal(target.margin, refs.margin[2])
    assert len(rest) == k - 2
    assert (rest.member.sum(axis=0) == k // 2 - 1).all()
    careless = np.delete(refs.loss, 2, axis=0).mean(axis=0) - target.loss
    assert roc_auc_score(inside, careless) > 0.6
    for make in ALL:
        assert abs(roc_auc_score(inside, make().score(target, rest)) - 0.5) < 0.02, make()


def test_leave_out_drops_one_reference_of_the_other_side() -> None:
    member = halves(6, 50, np.random.default_rng(6))
    margin = np.arange(300.0).reshape(6, 50)
    _, rest, inside = references(margin, member).leave_out(4)
    for n in range(50):
        others = [margin[i, n] for i in (5, 0, 1, 2, 3)]
        others.remove(next(margin[i, n] for i in (5, 0, 1, 2, 3) if member[i, n] != inside[n]))
        assert rest.margin[:, n, 0].tolist() == others
        assert rest.member[:, n].tolist() == [member[int(x) // 50, n] for x in others]
    # Independent bits tell nothing of each other: there, all others stay.
    uneven = np.random.default_rng(7).random((6, 50)) < 0.5
    _, rest, _ = references(margin, uneven).leave_out(4)
    np.testing.assert_array_equal(rest.margin[..., 0], margin[[5, 0, 1, 2, 3]])
    with pytest.raises(InputError, match="needs as many IN references"):
        MAST(tau="all").score(signals(np.zeros(50)), rest)


def test_lse_without_any_in_reference_is_out() -> None:
    target, refs, _ = world(8, 30)
    public = replace(refs, member=np.zeros_like(refs.member))
    attack = MAST(offline_scale=0.4, T=2.0)
    lse = -2 * np.log(np.exp(-public.loss / 2).mean(axis=0))[:, 0]
    np.testing.assert_allclose(attack.score(target, public), 0.4 * lse - target.loss[:, 0])


def lira_loop(target: Signals, refs: References, *, per_sample: bool, online: bool) -> list[float]:
    """One scipy call a sample, side and query."""
    k, n, q = refs.margin.shape
    scores = []
    centred: dict[bool, list[list[float]]] = {
        True: [[] for _ in range(q)],
        False: [[] for _ in range(q)],
    }
    for side in (True, False):
        for j in range(q):
            for i in range(n):
                x = refs.margin[refs.member[:, i] == side, i, j]
                centred[side][j] += list(x - x.mean())
    for i in range(n):
        total = 0.0
        for j in range(q):
            log_p = {}
            for side in (True, False):
                x = refs.margin[refs.member[:, i] == side, i, j]
                pooled = math.sqrt(np.sum(np.square(centred[side][j])) / (k * n / 2 - n))
                sd = x.std(ddof=1) if per_sample else pooled
                log_p[side] = (x.mean(), sd)
            phi = target.margin[i, j]
            if online:
                total += norm.logpdf(phi, *log_p[True]) - norm.logpdf(phi, *log_p[False])
            else:
                total += norm.logcdf(phi, *log_p[False])
        scores.append(total / q)
    return scores


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("online", [False, True])
def test_lira_equals_a_loop(*, per_sample: bool, online: bool) -> None:
    target, refs, _ = world(8, 40, seed=6, q=2)
    attack = LiRA(online=online, variance="per_sample" if per_sample else "fixed")
    want = lira_loop(target, refs, per_sample=per_sample, online=online)
    np.testing.assert_allclose(attack.score(target, refs), want, rtol=1e-9, atol=1e-9)


def test_lira_auto_variance_waits_for_32_a_side() -> None:
    for k, like in ((62, "fixed"), (64, "per_sample")):
        target, refs, _ = world(k, 20, seed=7)
        for online in (True, False):
            want = LiRA(online=online, variance=like).score(target, refs)  # type: ignore[arg-type]
            np.testing.assert_array_equal(LiRA(online=online).score(target, refs), want)


def test_lira_sides_have_their_own_width() -> None:
    """In and out differ by width alone: mixed-up sides or a between-sample spread lose it."""
    rng = np.random.default_rng(8)
    member = halves(40, 3000, rng)
    ease = rng.normal(0, 10, size=3000)
    width = np.where(member, 0.5, 2.0)
    refs = references(ease + width * rng.normal(size=(40, 3000)), member)
    phi = np.linspace(-4, 4, 3000)
    mean_in = np.array([refs.margin[member[:, i], i, 0].mean() for i in range(3000)])
    mean_out = np.array([refs.margin[~member[:, i], i, 0].mean() for i in range(3000)])
    got = LiRA(variance="fixed").score(signals(ease + phi), refs)
    want = norm.logpdf(ease + phi, mean_in, 0.5) - norm.logpdf(ease + phi, mean_out, 2.0)
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())
    assert got[1500] > 0 > got[0]


def test_offline_lira_is_one_sided() -> None:
    rng = np.random.default_rng(9)
    refs = references(rng.normal(size=(9, 100)), np.zeros((9, 100), dtype=bool))
    scores = [
        LiRA(online=False).score(signals(np.full(100, phi)), refs).mean() for phi in (-5, 0, 5)
    ]
    assert scores[0] < scores[1] < scores[2]  # two-sided: the first would be the largest again


def test_lira_is_quick() -> None:
    rng = np.random.default_rng(10)
    margin = rng.normal(size=(64, 50_000, 1))
    member = halves(64, 50_000, rng)
    refs = References(np.logaddexp(0, -margin), margin, np.full_like(margin, 0.5), member)
    target = signals(rng.normal(size=50_000))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        LiRA().score(target, refs)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    steps=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_rmia_equals_the_dense_count(n: int, m: int, steps: int, seed: int) -> None:
    """Log ratios on a grid of log(gamma), where differences are exact and ties abound."""
    rng = np.random.default_rng(seed)
    gamma, unit = math.exp(0.5 * steps), 0.5
    x, z = (unit * rng.integers(-8, 8, size) for size in (n, m))
    assert math.log(gamma) == unit * steps
    dense = (x[:, None] - z[None, :] > math.log(gamma)).mean(axis=1)
    np.testing.assert_array_equal(rmia_score(x, z, gamma), dense)
    x, z = rng.normal(size=n), rng.normal(size=m)
    dense = (np.exp(x)[:, None] / np.exp(z)[None, :] > gamma).mean(axis=1)
    np.testing.assert_array_equal(rmia_score(x, z, gamma), dense)


def test_rmia_ratios_by_hand() -> None:
    target, refs, _ = world(8, 30)
    p, p_out = target.conf[:, 0], np.zeros(30)
    p_in = np.zeros(30)
    for n in range(30):
        p_out[n] = refs.conf[~refs.member[:, n], n, 0].mean()
        p_in[n] = refs.conf[refs.member[:, n], n, 0].mean()
    for a in (0.0, 0.3, 1.0):
        want = p / (0.5 * ((1 + a) * p_out + 1 - a))
        np.testing.assert_allclose(np.exp(RMIA(a=a).log_ratio(target, refs)), want)
    want = p / (0.5 * (p_in + p_out))
    np.testing.assert_allclose(np.exp(RMIA(online=True).log_ratio(target, refs)), want)
    np.testing.assert_allclose(want, p / refs.conf.mean(axis=0)[:, 0])


def test_rmia_takes_losses_beyond_the_range_of_their_exponentials() -> None:
    rng = np.random.default_rng(0)
    margin = rng.normal(-900, 300, (6, 40))  # losses to 1,800 nats: exp(-745) is already 0
    member = np.arange(6)[:, None] % 2 == np.arange(40) % 2
    refs = references(margin, member)
    target = signals(rng.normal(-900, 300, 40))
    ratio = RMIA(online=True).log_ratio(target, refs)
    log_p = [
        np.array([-free_energy(refs.loss[side[:, i], i, 0]) for i in range(40)])
        for side in (member, ~member)
    ]
    want = -target.loss[:, 0] - (np.logaddexp(*log_p) - math.log(2))
    np.testing.assert_allclose(ratio, want, rtol=1e-12)


@pytest.mark.parametrize("online", [True, False])
def test_rmia_and_base_have_one_roc(*, online: bool) -> None:
    target, refs, inside = world(16, 2000, seed=11)
    if not online:
        refs = replace(refs, member=np.zeros_like(refs.member))
    rmia = RMIA(online=online, a=1.0).score(target, refs)
    base = MAST().score(target, refs)
    for one, other in zip(roc_curve(inside, rmia), roc_curve(inside, base), strict=True):
        if one.max() <= 1:  # rates; the thresholds differ
            np.testing.assert_array_equal(one, other)


def test_rmia_population() -> None:
    target, refs, _ = world(8, 30, seed=12)
    people, people_refs, _ = world(8, 500, seed=13)
    attack = RMIA(gamma=2.0).with_population(people, people_refs)
    x, z = attack.log_ratio(target, refs), attack.log_ratio(people, people_refs)
    want = (x[:, None] - math.log(2) > z[None]).mean(axis=1)
    np.testing.assert_array_equal(attack.score(target, refs), want)


def test_bavaria_equals_a_loop() -> None:
    target, refs, _ = world(6, 25, seed=14)
    phi, k0, a0 = refs.margin[..., 0], 1.5, 3.0
    want = np.zeros(25)
    for sign, use in ((1, refs.member), (-1, ~refs.member)):
        groups = [phi[use[:, i], i] for i in range(25)]
        pooled = sum(((g - g.mean()) ** 2).sum() for g in groups) / sum(len(g) - 1 for g in groups)
        m0 = np.concatenate(groups).mean()
        for i, g in enumerate(groups):
            n, k, a = len(g), k0 + len(g), a0 + len(g) / 2
            b = (a0 - 1) * pooled + 0.5 * ((g - g.mean()) ** 2).sum()
            b += k0 * n * (g.mean() - m0) ** 2 / (2 * k)
            scale = math.sqrt(b * (k + 1) / (a * k))
            mean = (k0 * m0 + n * g.mean()) / k
            want[i] += sign * student.logpdf(target.margin[i, 0], 2 * a, mean, scale)
    np.testing.assert_allclose(BaVarIA(1.5, 3.0).score(target, refs), want, rtol=1e-9, atol=1e-9)


def test_bavaria_becomes_lira() -> None:
    target, refs, _ = world(512, 1000, seed=15)
    lira = LiRA(variance="per_sample").score(target, refs)
    assert spearmanr(BaVarIA().score(target, refs), lira).statistic > 0.999
    few = refs.margin[:4], halves(4, 1000, np.random.default_rng(0))
    with_few = [a.score(target, references(*few)) for a in (BaVarIA(), LiRA(variance="per_sample"))]
    assert spearmanr(*with_few).statistic < 0.999


def test_references_from_logits_and_leave_out() -> None:
    generator = torch.Generator().manual_seed(16)
    logits = torch.randn(5, 12, 2, 4, generator=generator)
    labels, member = torch.arange(12) % 4, halves(5, 12, np.random.default_rng(0))
    refs = references_from_logits(logits, labels, member)
    target, rest, inside = refs.leave_out(3)
    want = signals_from_logits(logits[3], labels)
    for name in ("loss", "margin", "conf", "correct", "hinge", "labels"):
        np.testing.assert_array_equal(getattr(target, name), getattr(want, name))
    assert rest.loss.shape == (3, 12, 2)
    np.testing.assert_array_equal(inside, member[3])
    binary = references_from_logits(torch.randn(5, 12), labels % 2, member)
    assert binary.margin.shape == (5, 12, 1)
    with pytest.raises(InputError, match="left out"):
        refs.leave_out(5)


def test_missing_sides_are_named_and_can_be_dropped() -> None:
    target, refs, _ = world(4, 10)
    member = refs.member.copy()
    member[:, [2, 7]] = True
    member[:, 5] = False
    gaps = replace(refs, member=member)
    with pytest.raises(InputError, match=r"2 of 10 samples have no OUT reference \(indices 2, 7\)"):
        MAST(tau="out").score(target, gaps)
    with pytest.raises(InputError, match=r"1 of 10 samples have no IN reference \(indices 5\)"):
        MAST().score(target, replace(refs, member=refs.member & (np.arange(10) != 5)))
    keep = gaps.covered(("in", "out"))
    assert keep.tolist() == [i not in {2, 5, 7} for i in range(10)]
    assert LiRA(variance="fixed").score(target.select(keep), gaps.select(keep)).shape == (7,)


def test_bad_references() -> None:
    target, refs, _ = world(4, 10)
    with pytest.raises(InputError, match="mast needs reference models"):
        MAST().score(target)
    with pytest.raises(InputError, match="give Booleans"):
        replace(refs, member=refs.member.astype(int))
    with pytest.raises(InputError, match=r"of shape \(4, 10\)"):
        replace(refs, member=refs.member[:, :9])
    loss = refs.loss.copy()
    loss[1, 3] = np.inf
    with pytest.raises(InputError, match="references 1 is not finite"):
        replace(refs, loss=loss)
    with pytest.raises(InputError, match="same samples"):
        MAST().score(target.select(np.arange(9)), refs)
    with pytest.raises(InputError, match="other labels"):
        MAST().score(replace(target, labels=np.ones(10, int)), refs)
    two = refs.member.copy()
    two[0], two[1:] = True, False
    with pytest.raises(InputError, match="variance='fixed'"):
        LiRA(variance="per_sample").score(target, replace(refs, member=two))
    with pytest.raises(InputError, match="train more references"):
        LiRA().score(target, replace(refs, member=two))
    with pytest.raises(InputError, match="all agree"):
        LiRA().score(target, replace(refs, margin=np.zeros_like(refs.margin)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAST(tau="outside"), "tau 'outside' is unknown"),  # type: ignore[arg-type]
        (lambda: MALT(signal="conf"), "signal 'conf'"),  # type: ignore[arg-type]
        (lambda: MAST(tau="lse", statistic="median"), "no median"),
        (lambda: MAST(tau="mid", offline_scale=0.3), "offline_scale"),
        (lambda: LiRA(variance="global"), "variance 'global'"),  # type: ignore[arg-type]
        (lambda: RMIA(a=2), "a 2"),
        (lambda: RMIA(gamma=0.5), "gamma 0.5"),
        (lambda: BaVarIA(alpha0=1), "alpha0 1"),
    ],
)
def test_bad_options(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]
