"""The posterior's two parameters against worlds in which they are known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from remanence.audit.membership.calibration import Calibrator, reliability
from remanence.errors import InputError


def boltzmann(
    temperature: float, n: int, seed: int, prior: float = 0.5, offset: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose posterior is exactly sigma(score / T + offset + logit of the prior)."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 3, n) * temperature
    # Bayes: with P(m | s) given and the law of s free, membership is drawn from its posterior.
    logit = scores / temperature + offset + math.log(prior / (1 - prior))
    return scores, rng.random(n) < expit(logit)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 50.0])
def test_slope_is_the_inverse_temperature(temperature: float) -> None:
    calibrator = Calibrator.fit(*boltzmann(temperature, 60_000, 0))
    assert calibrator.temperature == pytest.approx(temperature, rel=0.03)
    assert calibrator.a == pytest.approx(1 / temperature, rel=0.03)
    assert calibrator.offset == pytest.approx(0, abs=0.05)


def test_gaussian_world_obeys_the_theory() -> None:
    # Log-likelihood ratio of N(1, 1) against N(0, 1) is s - 1/2; scores are T times that.
    rng = np.random.default_rng(1)
    member = rng.random(80_000) < 0.2
    scores = 0.25 * (rng.normal(size=80_000) + member - 0.5)
    calibrator = Calibrator.fit(scores, member)
    assert calibrator.temperature == pytest.approx(0.25, rel=0.04)
    assert calibrator.offset == pytest.approx(0, abs=0.03)
    assert calibrator.prior == pytest.approx(0.2, abs=0.01)
    for prior in (0.05, 0.2, 0.7):
        exact = expit(scores / 0.25 + math.log(prior / (1 - prior)))
        assert np.abs(calibrator.posterior(scores, prior) - exact).max() < 0.02


@pytest.mark.parametrize("prior", [0.03, 0.5, 0.9])
def test_prior_shift_stays_calibrated(prior: float) -> None:
    rng = np.random.default_rng(2)
    fit_member, member = rng.random(20_000) < 0.5, rng.random(60_000) < prior
    calibrator = Calibrator.fit(rng.normal(size=20_000) + 2 * fit_member, fit_member)
    shifted = reliability(
        calibrator.posterior(rng.normal(size=60_000) + 2 * member, prior=prior), member
    )
    assert shifted.ece < 0.012
    assert shifted.brier < shifted.brier_prior


def test_fit_is_the_maximum_likelihood() -> None:
    scores, member = boltzmann(2, 3000, 3, prior=0.3, offset=0.7)

    def loss(ab: np.ndarray) -> float:
        u = ab[0] * scores + ab[1]
        return float(np.logaddexp(0, u).sum() - u[member].sum())

    best = minimize(loss, np.zeros(2), method="BFGS").x
    calibrator = Calibrator.fit(scores, member)
    assert (calibrator.a, calibrator.b) == pytest.approx(best, rel=2e-3, abs=2e-3)


def test_separable_scores_do_not_blow_up() -> None:
    member = np.arange(400) < 200
    for gap in (0.0, 1.0, 1e6):
        scores = np.where(member, 1.0 + gap, -1.0) + np.random.default_rng(0).normal(0, 1e-3, 400)
        calibrator = Calibrator.fit(scores, member)
        posterior = calibrator.posterior(scores)
        assert np.isfinite([calibrator.a, calibrator.b, calibrator.temperature]).all()
        assert 0 < posterior.min() < 0.01
        assert 0.99 < posterior.max() < 1
    far = calibrator.posterior(np.array([-1e300, 1e300]))
    assert far.tolist() == [0, 1]


def test_uninformative_scores_give_back_the_prior() -> None:
    member = np.arange(1000) < 300
    calibrator = Calibrator.fit(np.full(1000, 7.0), member)
    assert calibrator.temperature == math.inf
    assert calibrator.posterior(np.array([-5.0, 7.0, 50.0])) == pytest.approx(0.3, abs=1e-6)
    assert calibrator.posterior(np.array([7.0]), prior=0.9) == pytest.approx(0.9, abs=1e-6)
    reverse = Calibrator.fit(-member.astype(float), member)
    assert reverse.a < 0
    assert reverse.temperature == math.inf


@given(st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
@settings(max_examples=20, deadline=None)
def test_posterior_does_not_depend_on_the_unit(scale: float, shift: float) -> None:
    scores, member = boltzmann(1, 500, 4)
    plain = Calibrator.fit(scores, member).posterior(scores)
    other = Calibrator.fit(scale * scores + shift, member).posterior(scale * scores + shift)
    assert np.abs(plain - other).max() < 1e-3


# Reliability


def test_reliability_by_hand() -> None:
    p = np.array([0.1, 0.2, 0.3, 0.6, 0.8, 0.9])
    member = np.array([False, False, True, False, True, True])
    table = reliability(p, member, bins=2)
    assert table.brier == pytest.approx(np.mean((p - member) ** 2))
    assert table.ece == pytest.approx(0.5 * abs(0.2 - 1 / 3) + 0.5 * abs(2.3 / 3 - 2 / 3))
    assert [row.n for row in table.rows] == [3, 3]
    assert [row.predicted for row in table.rows] == pytest.approx([0.2, 2.3 / 3])
    assert [row.observed.value for row in table.rows] == pytest.approx([1 / 3, 2 / 3])
    assert table.brier_prior == pytest.approx(0.25)


def test_overconfidence_is_seen() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(size=20_000)
    member = rng.random(20_000) < expit(logit)
    honest, boastful = reliability(expit(logit), member), reliability(expit(5 * logit), member)
    assert honest.ece < 0.02
    assert boastful.ece > 0.15
    assert honest.brier < boastful.brier
    inside = [row.observed.low <= row.predicted <= row.observed.high for row in honest.rows]
    assert sum(inside) >= 8


def test_equal_probabilities_share_a_bin() -> None:
    table = reliability(np.full(100, 0.5), np.arange(100) < 50)
    assert [row.n for row in table.rows] == [100]
    assert table.ece == 0


@pytest.mark.parametrize(
    ("p", "hint"), [(np.full(100, 1.5), "between 0 and 1"), (np.full(99, 0.5), "bool each")]
)
def test_bad_probabilities(p: np.ndarray, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        reliability(p, np.arange(100) < 50)


def test_bad_fit_and_prior() -> None:
    with pytest.raises(InputError, match="30"):
        Calibrator.fit(np.zeros(20), np.arange(20) < 10)
    calibrator = Calibrator.fit(*boltzmann(1, 500, 0))
    with pytest.raises(InputError, match="prior"):
        calibrator.posterior(np.zeros(3), prior=1.0)
    with pytest.raises(InputError, match="finite"):
        calibrator.posterior(np.array([np.nan]))
