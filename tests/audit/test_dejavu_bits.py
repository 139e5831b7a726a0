import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, norm
from sklearn.metrics import roc_auc_score

from remanence.audit.dejavu.bits import (
    binary_entropy,
    bloom_bits,
    perceptron_bits,
    set_bits,
    stored_bits,
)
from remanence.audit.dejavu.intervals import auc_estimate, delong, mean_of_two, proportion
from remanence.errors import InputError

RATES = st.floats(0, 1)


@pytest.mark.parametrize(
    ("n", "N", "tpr", "fpr", "bits"),
    [(500, 15_000, 1.0, 0.025, 2316), (2000, 15_000, 0.888, 0.180, 2863), (100, 15_000, 1, 0, 867)],
)
def test_stored_bits_published(n, N, tpr, fpr, bits):
    assert round(stored_bits(n, N, tpr, fpr)) == bits


def test_stored_bits_is_the_mutual_information_of_the_confusion_table():
    n, N, tpr, fpr = 300, 1000, 0.8, 0.15
    joint = np.array([[n * tpr, n * (1 - tpr)], [(N - n) * fpr, (N - n) * (1 - fpr)]]) / N
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    assert stored_bits(n, N, tpr, fpr) == pytest.approx(
        N * (joint * np.log2(joint / independent)).sum()
    )


@given(st.integers(1, 400), RATES, RATES)
def test_stored_bits_identities(n, tpr, fpr):
    N = 1000
    p = n / N
    assert stored_bits(n, N, 1, 0) == pytest.approx(N * binary_entropy(p))
    assert stored_bits(n, N, tpr, tpr) == pytest.approx(0, abs=1e-9)
    bits = stored_bits(n, N, tpr, fpr)
    # The other side taken as the set; the answers turned round.
    assert stored_bits(N - n, N, 1 - fpr, 1 - tpr) == pytest.approx(bits, abs=1e-9)
    assert stored_bits(n, N, 1 - tpr, 1 - fpr) == pytest.approx(bits, abs=1e-9)
    assert 0 <= bits <= N * binary_entropy(p) + 1e-9


@pytest.mark.parametrize(("N", "n"), [(1, 0), (5, 2), (15_000, 100), (50_000, 20_000), (7, 7)])
def test_set_bits_is_log2_of_the_binomial_coefficient(N, n):
    assert set_bits(N, n) == pytest.approx(math.log2(math.comb(N, n)), rel=1e-10, abs=1e-9)


def test_a_perfect_network_exceeds_the_set_slightly():
    assert round(set_bits(15_000, 100)) == 862 < stored_bits(100, 15_000, 1, 0)


def test_yardsticks():
    assert bloom_bits(1, 0.01) == pytest.approx(9.585, abs=5e-4)
    # The optimal number of hash functions log2(1/fpr) and half of the bits set: (1/2)^k = fpr.
    k = math.log2(1 / 0.001)
    assert (1 - math.exp(-k / bloom_bits(1, 0.001))) ** k == pytest.approx(0.001)
    assert perceptron_bits(49_665) == 99_330


@pytest.mark.parametrize(
    "call",
    [
        lambda: stored_bits(5, 4, 1, 0),
        lambda: stored_bits(1, 4, 1.1, 0),
        lambda: stored_bits(1, 4, 1, -0.1),
        lambda: set_bits(4, -1),
        lambda: bloom_bits(4, 0.0),
        lambda: bloom_bits(-1, 0.1),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(InputError, match="give"):
        call()


def test_proportion_is_clopper_pearson():
    share = proportion("TPR", 37, 40)
    assert share.low == pytest.approx(beta.ppf(0.025, 37, 4))
    assert share.high == pytest.approx(beta.ppf(0.975, 38, 3))
    assert proportion("TPR", 40, 40).low == pytest.approx(0.025 ** (1 / 40))
    mean = mean_of_two("balanced accuracy", share, proportion("TNR", 30, 40))
    assert mean.low < mean.value == (37 + 30) / 80 < mean.high


def test_delong_areas_and_coverage():
    rng = np.random.default_rng(0)
    members = np.round(rng.normal(0.5, 1, (2, 60)), 1)  # with ties
    nonmembers = np.round(rng.normal(0, 1, (2, 50)), 1)
    aucs, _ = delong(members, nonmembers)
    truth = [1] * 60 + [0] * 50
    for row in range(2):
        scores = np.concatenate((members[row], nonmembers[row]))
        assert aucs[row] == pytest.approx(roc_auc_score(truth, scores))

    # Two noisy readings of one score: the covariance must foretell the spread of the difference.
    areas, spreads, true = [], [], norm.cdf(1 / np.sqrt(2 * 1.25))
    for _ in range(400):
        a, b = rng.normal(1, 1, 80), rng.normal(0, 1, 90)
        pair = [
            np.stack([side + rng.normal(0, 0.5, side.shape) for _ in range(2)]) for side in (a, b)
        ]
        area, covariance = delong(*pair)
        areas.append(area)
        spreads.append((covariance[0, 0], [1, -1] @ covariance @ [1, -1]))
    areas, (variance, difference) = np.array(areas), np.mean(spreads, axis=0)
    assert areas.mean() == pytest.approx(true, abs=0.005)
    assert areas.var(axis=0).mean() == pytest.approx(variance, rel=0.15)
    assert (areas[:, 0] - areas[:, 1]).var() == pytest.approx(difference, rel=0.15)


def test_full_separation_is_not_certain():
    aucs, covariance = delong(np.ones((1, 30)), np.zeros((1, 50)))
    area = auc_estimate("AUC", float(aucs[0]), float(covariance[0, 0]), 30, 50)
    assert area.value == area.high == 1
    assert area.low == pytest.approx(0.025 ** (1 / 30))
