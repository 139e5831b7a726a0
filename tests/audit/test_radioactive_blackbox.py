"""Black-box tests: uniform on innocent models where a paired t-test is not, and with power."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from remanence.audit.radioactive.blackbox import detect_blackbox, detect_keys, detect_twins
from remanence.errors import InputError

K, D, N, B = 5, 32, 200, 19
MEANS = np.random.default_rng(7).standard_normal((K, D)) / 2
LABELS = np.arange(N) % K


def unit(rng):
    u = rng.standard_normal((K, D))
    return u / np.linalg.norm(u, axis=1, keepdims=True)


def images(rng):
    return MEANS[LABELS] + rng.standard_normal((N, D))


def losses(head, phi):
    logits = phi @ head.T
    log_total = np.log(np.exp(logits).sum(1))
    return log_total - logits[np.arange(N), LABELS]


def head_of(phi):
    """Class means, as a head: what a suspect learns of its training features."""
    return np.stack([phi[k == LABELS].mean(0) for k in range(K)])


def one_repeat(rng, marked_share, alpha=2.0):
    """Decoy p and the t-test's p of one suspect, real marks and held-out images."""
    real, held_out, seen = unit(rng), images(rng), images(rng)
    seen[: int(marked_share * N)] += alpha * real[LABELS[: int(marked_share * N)]]
    head = head_of(seen)
    marked = [
        losses(head, held_out + alpha * u[LABELS]) for u in (real, *(unit(rng) for _ in range(B)))
    ]
    found = detect_blackbox(marked[0].mean(), [m.mean() for m in marked[1:]])
    t_test = stats.ttest_rel(losses(head, held_out), marked[0], alternative="greater")
    return 10**found.log10_p, float(t_test.pvalue)


def test_decoy_p_values_are_uniform_on_innocent_models_and_a_paired_t_test_s_are_not():
    rng = np.random.default_rng(0)
    decoy, t_test = zip(*[one_repeat(rng, 0.0, 0.5) for _ in range(200)], strict=True)
    counts = np.bincount(np.round(np.array(decoy) * (B + 1)).astype(int), minlength=B + 2)[1:]
    assert counts.sum() == 200
    assert len(counts) == B + 1
    assert stats.chisquare(counts).pvalue > 0.01
    # The mark itself moves an innocent model's loss: the t-test takes that for proof.
    assert np.mean(np.array(t_test) < 0.05) > 0.25


def test_decoys_find_a_marked_model():
    rng = np.random.default_rng(1)
    p = [one_repeat(rng, 1.0)[0] for _ in range(20)]
    assert np.mean(np.array(p) <= 0.05) > 0.8


def test_decoy_p_counts_ties_against_the_owner_and_has_its_resolution():
    decoys = np.arange(1.0, 20.0)
    assert 10 ** detect_blackbox(0.5, decoys).log10_p == pytest.approx(1 / 20)
    assert detect_blackbox(0.5, decoys).evidence.verdict == "detected"
    tied = detect_blackbox(1.0, decoys)
    assert (tied.rank, 10**tied.log10_p) == (1, pytest.approx(2 / 20))
    assert tied.evidence.would_change.startswith("At most 0 of the 19 decoy sets")
    assert detect_blackbox(99.0, decoys).log10_p == 0
    broken = detect_blackbox(0.5, decoys, committed=False)
    assert broken.evidence.verdict == "not interpretable"
    with pytest.raises(InputError, match="18 decoy sets cannot reach"):
        detect_blackbox(0.5, decoys[1:])
    with pytest.raises(InputError, match="NaN"):
        detect_blackbox(float("nan"), decoys)


def test_key_hits_are_binomial_and_stay_finite_in_the_tail():
    labels = torch.arange(40) % 10
    top = torch.stack([(labels + 1) % 10, (labels + 2) % 10], dim=1)
    top[:17, 1] = labels[:17]
    found = detect_keys(top, labels, 10)
    assert (found.successes, found.trials, found.chance) == (17, 40, 0.2)
    assert 10**found.log10_p == pytest.approx(stats.binom.sf(16, 40, 0.2), rel=1e-10)
    assert found.evidence.verdict == "detected"
    many = torch.arange(2000) % 1000
    assert detect_keys(many[:, None], many, 1000).log10_p == pytest.approx(-6000)
    assert detect_keys(many[:, None], (many + 1) % 1000, 1000).log10_p == pytest.approx(0, abs=1e-9)
    with pytest.raises(InputError, match="different classes"):
        detect_keys(torch.zeros(40, 2, dtype=torch.long), labels, 10)
    with pytest.raises(InputError, match="do not match"):
        detect_keys(top, labels[1:], 10)


def test_the_count_that_would_change_the_verdict_is_the_smallest_that_does():
    labels = torch.zeros(30, dtype=torch.long)

    def verdict(hits):
        found = detect_keys((torch.arange(30) >= hits).long()[:, None], labels, 10)
        return found.evidence.verdict, found.evidence.would_change

    needed = int(verdict(0)[1].split()[2])
    assert verdict(needed)[0] == "detected"
    assert verdict(needed - 1)[0] == "not detected"


def test_twins_are_a_sign_test_without_ties():
    published = np.r_[np.full(20, 2.0), np.full(5, 1.0), np.full(7, 3.0)]
    withheld = np.r_[np.full(20, 1.0), np.full(5, 2.0), np.full(7, 3.0)]
    found = detect_twins(published, withheld)
    assert (found.successes, found.trials) == (20, 25)
    assert 10**found.log10_p == pytest.approx(
        stats.binomtest(20, 25, alternative="greater").pvalue, rel=1e-10
    )
    assert detect_twins(np.ones(2000), np.zeros(2000)).log10_p == pytest.approx(
        -2000 * math.log10(2)
    )
    # However lopsided the scores are, a fair coin makes them even.
    rng = np.random.default_rng(0)
    twins = np.sort(rng.standard_cauchy((2, 60)) ** 3, axis=0)
    p = []
    for _ in range(200):
        coin = rng.random(60) < 0.5
        chosen, left = np.where(coin, twins[0], twins[1]), np.where(coin, twins[1], twins[0])
        p.append(10 ** detect_twins(chosen, left).log10_p)
    assert np.mean(np.array(p) <= 0.05) <= 0.09
    with pytest.raises(InputError, match="all twins score alike"):
        detect_twins([1.0], [1.0])
    with pytest.raises(InputError, match="do not match"):
        detect_twins([1.0], [1.0, 2.0])
