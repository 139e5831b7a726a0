"""Lower bounds of epsilon against mechanisms whose epsilon is known."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import optimize, stats

from remanence.audit.membership.privacy import epsilon_lower_bound
from remanence.errors import InputError

PHI = NormalDist().cdf


def randomised_response(eps: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tells the membership bit with probability e^eps / (1 + e^eps), else its opposite."""
    rng = np.random.default_rng(seed)
    member = np.arange(n) < n // 2
    honest = rng.random(n) < math.exp(eps) / (1 + math.exp(eps))
    return np.where(honest, member, ~member).astype(float), member


def gaussian_mechanism(mu: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    member = np.arange(n) < n // 2
    return np.random.default_rng(seed).normal(size=n) + mu * member, member


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Balle and Wang 2018, theorem 8."""
    gap = lambda e: PHI(mu / 2 - e / mu) - math.exp(e) * PHI(-mu / 2 - e / mu) - delta  # noqa: E731  # one line, one equation
    return float(optimize.brentq(gap, 0, 50))


@pytest.mark.parametrize("eps", [0.3, 1.0, 3.0])
def test_randomised_response_is_bounded_from_below(eps: float) -> None:
    bounds = [epsilon_lower_bound(*randomised_response(eps, 2000, s)).epsilon for s in range(400)]
    assert np.mean([bound <= eps for bound in bounds]) >= 0.95
    big = epsilon_lower_bound(*randomised_response(eps, 100_000, 1))
    assert 0.6 * eps <= big.epsilon <= eps


@pytest.mark.parametrize("eps", [1.0])
def test_thresholds_fixed_beforehand_are_corrected(eps: float) -> None:
    grid = np.linspace(-1, 2, 16)
    bounds = [
        epsilon_lower_bound(*randomised_response(eps, 2000, s), thresholds=grid).epsilon
        for s in range(400)
    ]
    assert np.mean([bound <= eps for bound in bounds]) >= 0.95
    assert epsilon_lower_bound(*randomised_response(eps, 100_000, 1), thresholds=grid).epsilon > 0.6


@pytest.mark.parametrize("thresholds", [None, np.linspace(-2.5, 2.5, 51)])
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_no_leak_is_called_private(thresholds: np.ndarray | None, confidence: float) -> None:
    """The best of many thresholds, uncorrected, would break the level of 50 % clearly."""
    alarms = 0
    for seed in range(400):
        scores, member = gaussian_mechanism(0, 1000, seed)
        bound = epsilon_lower_bound(scores, member, confidence=confidence, thresholds=thresholds)
        alarms += bound.epsilon > 0
    assert alarms <= stats.binom.ppf(0.99, 400, 1 - confidence)


@pytest.mark.parametrize("delta", [0.0, 1e-3, 1e-2])
def test_gaussian_mechanism_with_delta(delta: float) -> None:
    truth = gaussian_epsilon(1.0, delta) if delta else math.inf
    bounds = [
        epsilon_lower_bound(*gaussian_mechanism(1.0, 4000, s), delta=delta).epsilon
        for s in range(200)
    ]
    assert np.mean([bound <= truth for bound in bounds]) >= 0.95
    assert np.mean(bounds) > 0.8


def test_second_inequality_sees_certain_nonmembers() -> None:
    # Nothing is a sure member, but a low score is a sure non-member.
    rng = np.random.default_rng(0)
    member = np.arange(4000) < 2000
    scores = np.where(~member & (rng.random(4000) < 0.3), -1.0, rng.random(4000))
    bound = epsilon_lower_bound(scores, member)
    assert bound.inequality == "nonmembers"
    assert bound.epsilon > math.log(0.25 / 0.01)
    mirror = epsilon_lower_bound(-scores, ~member)
    assert mirror.inequality == "members"
    assert mirror.epsilon == pytest.approx(bound.epsilon, rel=0.05)


def test_delta_lowers_the_bound_and_reversed_scores_give_zero() -> None:
    scores, member = gaussian_mechanism(2, 20_000, 0)
    bounds = [epsilon_lower_bound(scores, member, delta=d).epsilon for d in (0, 0.01, 0.2)]
    assert bounds[0] >= bounds[1] > bounds[2] >= 0
    assert epsilon_lower_bound(-scores, member).epsilon == 0
    assert epsilon_lower_bound(np.zeros(20_000), member).epsilon == 0


def test_figures_belong_together() -> None:
    scores, member = gaussian_mechanism(2, 4000, 0)
    bound = epsilon_lower_bound(scores, member, delta=1e-3, seed=5)
    assert bound == epsilon_lower_bound(scores, member, delta=1e-3, seed=5)
    ratio = (bound.tpr.low - 1e-3) / bound.fpr.high
    other = (1 - bound.fpr.high - 1e-3) / (1 - bound.tpr.low)
    assert bound.epsilon == pytest.approx(max(math.log(ratio), math.log(other)))
    assert bound.tests == 1
    called = np.concatenate([scores[member] >= bound.threshold])
    assert called.mean() == pytest.approx(bound.tpr.value, abs=0.03)


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"delta": 1.0}, "delta"), ({"confidence": 0}, "confidence"), ({"thresholds": []}, "thresh")],
)
def test_bad_options(options: dict[str, object], hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        epsilon_lower_bound(*gaussian_mechanism(0, 200, 0), **options)  # type: ignore[arg-type]  # wrong on purpose


def test_too_few_samples() -> None:
    with pytest.raises(InputError, match="60"):
        epsilon_lower_bound(*gaussian_mechanism(0, 100, 0))
