"""The theory against densities, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logsumexp
from scipy.stats import multivariate_normal

from remanence.audit.membership.bayes import (
    GaussianMeanWorld,
    TableWorld,
    free_energy,
    hidden_variable_posterior,
    membership_posterior,
    optimal_logit,
    posterior_bound,
)
from remanence.errors import InputError


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 20),
    k=st.integers(1, 50),
    temperature=st.floats(0.1, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_gaussian_logit_is_the_density_ratio(d: int, k: int, temperature: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    world = GaussianMeanWorld(rng.normal(size=d), k, temperature)
    theta, z = rng.normal(size=d), rng.normal(size=d)
    # scipy's density, from the posterior's mean and variance alone.
    ratio = multivariate_normal.logpdf(
        theta, (k * world.mean + z) / (k + 1), temperature / (k + 1) * np.eye(d)
    ) - multivariate_normal.logpdf(theta, world.mean, temperature / k * np.eye(d))
    assert world.log_ratio(theta, z) == pytest.approx(ratio, abs=1e-10, rel=1e-10)
    own = world.with_sample(z).log_density(theta) - world.log_density(theta)
    assert own == pytest.approx(ratio, abs=1e-10, rel=1e-10)


def test_gaussian_threshold_is_a_free_energy() -> None:
    rng = np.random.default_rng(0)
    world = GaussianMeanWorld(np.array([0.3, -0.2]), 4, temperature=0.7)
    theta = world.mean + math.sqrt(0.7 / 4) * rng.normal(size=(400_000, 2))
    z = np.array([1.0, 0.5])
    assert free_energy(world.loss(theta, z)[:, None], 0.7)[0] == pytest.approx(
        float(world.soft_threshold(z)), abs=5e-3
    )


def _hidden_bits(lam: float) -> tuple[float, float, float, float]:
    """Exact, density-weighted and prior-weighted posterior of one sample with 8 hidden bits."""
    rng = np.random.default_rng(3)
    anchors, others = rng.normal(size=(3, 2)), rng.normal(size=(8, 2))
    z, theta = np.array([1.2, -0.4]), np.array([0.5, 0.1])
    joint = {0: [], 1: []}
    s, log_p0, log_prior = [], [], []
    for bits in itertools.product((False, True), repeat=8):
        members = np.concatenate((anchors, others[list(bits)]))
        prior = sum(bits) * math.log(lam) + (8 - sum(bits)) * math.log1p(-lam)
        for inside in (0, 1):
            train = np.concatenate((members, z[None])) if inside else members
            density = multivariate_normal.logpdf(
                theta, train.mean(axis=0), 0.5 / len(train) * np.eye(2)
            )
            joint[inside].append(prior + density + math.log(lam if inside else 1 - lam))
        world = GaussianMeanWorld.trained_on(members, 0.5)
        s.append(float(world.log_ratio(theta, z)))
        log_p0.append(float(world.log_density(theta)))
        log_prior.append(prior)
    exact = float(expit(logsumexp(joint[1]) - logsumexp(joint[0])))
    # All configurations once stand for draws from the prior when each carries its prior's weight.
    weighted = hidden_variable_posterior(
        np.array(s)[:, None], (np.array(log_p0) + log_prior)[:, None], lam
    )
    prior_weighted = float(np.exp(log_prior) @ membership_posterior(s, lam))
    return exact, float(weighted.probability[0]), prior_weighted, float(weighted.effective_draws[0])


@pytest.mark.parametrize("lam", [0.4, 0.5, 0.8])
def test_hidden_bits_need_density_weights(lam: float) -> None:
    exact, weighted, prior_weighted, draws = _hidden_bits(lam)
    assert weighted == pytest.approx(exact, abs=1e-10)
    assert abs(prior_weighted - exact) > 0.01
    assert 1 <= draws <= 256


def test_hidden_bits_by_monte_carlo() -> None:
    rng = np.random.default_rng(4)
    table = TableWorld(rng.gamma(2.0, size=(5, 9)), temperature=0.8, prior=0.3)
    bits = rng.random((20_000, 9)) < 0.3
    bits[:, 2] = False
    exact = table.posterior(2)
    s, log_p0 = table.log_ratio(2, bits), table.log_density(bits)
    estimate = hidden_variable_posterior(s, log_p0, 0.3)
    np.testing.assert_allclose(estimate.probability, exact, atol=0.01)
    assert ((estimate.effective_draws > 1) & (estimate.effective_draws < 20_000)).all()
    plain = hidden_variable_posterior(s, None, 0.3)
    np.testing.assert_allclose(plain.effective_draws, 20_000)
    assert np.abs(plain.probability - exact).max() > 0.02


def test_table_posterior_is_calibrated() -> None:
    """Bits drawn, theta drawn given them: among draws of theta_g the share of members is right."""
    rng = np.random.default_rng(5)
    table = TableWorld(rng.gamma(2.0, size=(4, 6)), temperature=1.3, prior=0.4)
    bits = rng.random((200_000, 6)) < 0.4
    cdf = np.exp(table.log_density(bits)).cumsum(axis=1)
    g = (rng.random((200_000, 1)) > cdf).sum(axis=1).clip(max=3)
    share = np.array([bits[g == i, 1].mean() for i in range(4)])
    np.testing.assert_allclose(table.posterior(1), share, atol=0.012)


def test_table_logit_by_hand() -> None:
    table = TableWorld(np.array([[0.0, 1.0], [2.0, 0.5]]), temperature=0.5)
    p = np.exp([-2.0, -1.0])  # sample 1 in: exp(-loss / T)
    p /= p.sum()
    tau = -0.5 * math.log(p[0] * 1 + p[1] * math.exp(-4))
    assert table.soft_threshold(0, [True, True]) == pytest.approx(tau, abs=1e-14)
    np.testing.assert_allclose(table.log_ratio(0, [0, 1]), [tau / 0.5, (tau - 2) / 0.5])
    # The empty training set is proper here: all parameters are equally likely.
    np.testing.assert_allclose(np.exp(table.log_density([False, False])), [0.5, 0.5])


def test_parameters_add_nothing_to_the_loss() -> None:
    """Two theta on one level set of the loss: same posterior, but another first-order score."""
    world = GaussianMeanWorld(np.array([0.1, 0.4]), 5, temperature=0.3)
    z = np.array([1.0, -1.0])
    first, second = z + np.array([0.6, 0.8]), z - np.array([1.0, 0.0])
    assert world.loss(first, z) == pytest.approx(float(world.loss(second, z)), abs=1e-15)
    assert world.log_ratio(first, z) == pytest.approx(float(world.log_ratio(second, z)), abs=1e-12)
    gradient = world.mean - z
    matt = [-(theta - world.mean) @ gradient for theta in (first, second)]
    assert abs(matt[0] - matt[1]) > 0.1


def test_second_order_taylor_is_exact_up_to_a_constant() -> None:
    rng = np.random.default_rng(6)
    world = GaussianMeanWorld(rng.normal(size=4), 7, temperature=2.5)
    theta, z = rng.normal(size=4), rng.normal(size=(50, 4))
    g = world.mean - z
    taylor = (-(g @ (theta - world.mean)) - 0.5 * (g**2).sum(axis=1) / 8) / 2.5
    assert np.std(taylor - world.log_ratio(theta, z)) < 1e-10


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 40),
    shift=st.floats(-100, 100),
    scale=st.floats(0.01, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_free_energy_bounds_order_and_shift(k: int, shift: float, scale: float, seed: int) -> None:
    losses = scale * np.random.default_rng(seed).gamma(1.0, size=(k, 7))
    slack = 1e-9 * scale
    temperatures = [0.0, *(scale * np.logspace(-6, 9, 16)), math.inf]
    taus = np.array([free_energy(losses, t) for t in temperatures])
    assert (np.diff(taus, axis=0) >= -slack).all()
    np.testing.assert_array_equal(taus[0], losses.min(axis=0))
    np.testing.assert_allclose(taus[-1], losses.mean(axis=0))
    np.testing.assert_allclose(taus[1], taus[0], atol=1e-4 * scale)
    # The second cumulant bounds the distance to the mean at large T.
    np.testing.assert_allclose(taus[-2], taus[-1], atol=slack)
    for t, tau in zip(temperatures, taus, strict=True):
        np.testing.assert_allclose(free_energy(losses + shift, t), tau + shift, atol=1e-9)


def test_free_energy_is_the_log_mean_and_masks() -> None:
    losses = np.random.default_rng(7).gamma(2.0, size=(6, 3, 2))
    use = np.zeros((6, 3, 1), dtype=bool)
    use[:4, 0] = use[2:, 1] = use[5, 2] = True
    for n in range(3):
        some = losses[use[:, n, 0], n]
        naive = -1.7 * np.log(np.mean(np.exp(-some / 1.7), axis=0))
        np.testing.assert_allclose(free_energy(losses, 1.7, use)[n], naive, rtol=1e-12)
    # Losses whose exponential underflows.
    np.testing.assert_allclose(
        free_energy([[2000.0], [3000.0]], 1.0), [2000 + math.log(2)], rtol=1e-15
    )


def test_posterior_bound() -> None:
    assert posterior_bound(1.0) == pytest.approx(0.731059, abs=1e-6)
    assert posterior_bound(1.0, linear=True) == 0.75
    assert posterior_bound(3.0, 0.9, linear=True) == pytest.approx(1.65)
    assert posterior_bound(3.0, 0.9) < 1
    # Randomised response attains the bound.
    assert posterior_bound(math.log(3), 0.5) == pytest.approx(0.75)
    for eps in np.linspace(0, 5, 11):
        for lam in (0.05, 0.5, 0.95):
            exact, linear = (posterior_bound(eps, lam, linear=either) for either in (False, True))
            assert lam - 1e-15 <= exact <= linear + 1e-15


def test_optimal_logit() -> None:
    assert optimal_logit(0.5, 2.0, 3.0) == pytest.approx(0.5)
    assert membership_posterior(0.0, 0.2) == pytest.approx(0.2)
    assert membership_posterior(math.log(4), 0.2) == pytest.approx(0.5)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="empty training set is not normalisable"):
        GaussianMeanWorld.trained_on(np.zeros((0, 3)))
    with pytest.raises(InputError, match="empty training set"):
        GaussianMeanWorld(np.zeros(2), 0)
    with pytest.raises(InputError, match="empty training set"):
        hidden_variable_posterior(np.zeros((2, 1)), np.array([[0.0], [np.nan]]))
    with pytest.raises(InputError, match="draw more"):
        hidden_variable_posterior(np.zeros((2, 1)), np.full((2, 1), -np.inf))
    with pytest.raises(InputError, match="1 samples have no loss"):
        free_energy(np.ones((2, 2)), where=[[True, False], [True, False]])
    with pytest.raises(InputError, match="NaN"):
        free_energy([[np.nan]])
    with pytest.raises(InputError, match="temperature -1"):
        free_energy([[1.0]], -1)
    with pytest.raises(InputError, match="temperature 0"):
        optimal_logit(1.0, 1.0, 0)
    with pytest.raises(InputError, match="prior 1"):
        membership_posterior(0.0, 1)
    with pytest.raises(InputError, match="epsilon"):
        posterior_bound(-1)
    with pytest.raises(InputError, match="at most 16"):
        TableWorld(np.zeros((2, 17))).posterior(0)
    with pytest.raises(InputError, match="finite"):
        TableWorld(np.full((2, 2), np.inf))
