"""The Bayes-optimal membership rule and two worlds where it is exact (arXiv 1908.11229).

Training is a draw of parameters theta given the membership bits m_i of the samples z_i (eq. 1):

    P(theta | m, z)  is proportional to  exp(-(1/T) sum_i m_i loss(theta, z_i)).

For one sample z, with p the law of theta trained on the other samples alone, the optimal logit is

    s(z, theta, p) = (tau_p(z) - loss(theta, z)) / T,    tau_p(z) = -T log E_p[exp(-loss / T)],

and the posterior is the mean of sigmoid(s + logit(prior)) over the hidden bits of the other samples
*given theta and z*. (1) has no prior on theta, so it may not be normalisable when no sample is in.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_softmax, logit, logsumexp

from remanence.errors import InputError

FloatArray = npt.NDArray[np.float64]


def free_energy(
    losses: npt.ArrayLike, temperature: float = 1.0, where: npt.ArrayLike | None = None
) -> FloatArray:
    """Soft threshold tau = -T log mean_k exp(-loss_k / T), the free energy of the losses.

    It lies between the smallest loss (T = 0) and the mean loss (T = infinity), never falls when T
    grows, and moves with a constant that is added to the losses.

    Args:
        losses: (K, ...) losses of the same samples under K draws of theta, or K references.
        temperature: T of the posterior model, in [0, infinity]; not a softmax temperature.
        where: Booleans that broadcast to `losses`: the draws that count; None for all.

    Returns:
        The shape of `losses` without its first axis.

    Raises:
        InputError: NaN losses, a negative temperature, or a sample for which no draw counts.
    """
    _check_temperature(temperature, limits=True)
    x = np.asarray(losses, dtype=np.float64)
    use = np.broadcast_to(True if where is None else np.asarray(where, dtype=bool), x.shape)
    count = use.sum(axis=0)
    if not np.all(count):
        n_empty = int(np.sum(count == 0))
        raise InputError(f"{n_empty} samples have no loss to average: give each at least one draw")
    if np.isnan(x).any(where=use):
        raise InputError("losses hold NaN: check the models that gave them")
    # Plain reductions of filled arrays: numpy's masked ones take several times as long.
    lowest: FloatArray = np.where(use, x, np.inf).min(axis=0)
    if temperature == 0:
        return lowest
    if math.isinf(temperature):
        mean: FloatArray = np.where(use, x, 0.0).sum(axis=0) / count
        return mean
    # expm1 and log1p, so that the limit of a large T does not drown in rounding.
    excess = np.expm1(np.where(use, lowest - x, 0.0) / temperature)
    tau: FloatArray = lowest - temperature * np.log1p(excess.sum(axis=0) / count)
    return tau


def optimal_logit(
    loss: npt.ArrayLike, soft_threshold: npt.ArrayLike, temperature: float = 1.0
) -> FloatArray:
    """Optimal log ratio s = (tau - loss) / T (eq. 3); higher is more member-like.

    Args:
        loss: losses of the samples under the audited parameters, any shape.
        soft_threshold: tau of the same samples, from `free_energy`.
        temperature: T of the posterior model, positive.

    Raises:
        InputError: the temperature is not positive and finite.
    """
    _check_temperature(temperature)
    tau = np.asarray(soft_threshold, dtype=np.float64)
    s: FloatArray = (tau - np.asarray(loss, dtype=np.float64)) / temperature
    return s


def membership_posterior(log_ratio: npt.ArrayLike, prior: float = 0.5) -> FloatArray:
    """P(member) = sigmoid(s + log(prior / (1 - prior))) for known other memberships.

    Args:
        log_ratio: s, any shape.
        prior: share of members among the samples, in (0, 1).

    Raises:
        InputError: the prior is not in (0, 1).
    """
    _check_prior(prior)
    posterior: FloatArray = expit(np.asarray(log_ratio, dtype=np.float64) + logit(prior))
    return posterior


class HiddenPosterior(NamedTuple):
    """A posterior averaged over hidden memberships.

    Attributes:
        probability: (N,) P(member), in [0, 1].
        effective_draws: (N,) effective sample size 1 / sum_k w_k^2, in [1, K]; near 1, one draw
            decides and the average is not to be trusted.
    """

    probability: FloatArray
    effective_draws: FloatArray


def hidden_variable_posterior(
    log_ratio: npt.ArrayLike, log_density: npt.ArrayLike | None = None, prior: float = 0.5
) -> HiddenPosterior:
    """P(member) when the memberships of the other samples are hidden (eq. 2).

    Eq. (2) averages over memberships *given theta*. For draws from their prior, the right weights
    are w_k proportional to prior P(theta | in, k) + (1 - prior) P(theta | out, k).

    Args:
        log_ratio: (K, N) optimal logits s under K configurations of the other memberships, drawn
            from their prior.
        log_density: (K, N), or (K, 1) if the same for all samples, log P(theta | configuration k,
            sample out). None where it cannot be evaluated, as for deep networks: the plain average,
            which is an approximation and biased.
        prior: share of members among the samples, in (0, 1).

    Raises:
        InputError: the prior is not in (0, 1), `log_ratio` is not (K, N) or holds NaN, or the
            density of a configuration is not normalisable.
    """
    _check_prior(prior)
    s = np.asarray(log_ratio, dtype=np.float64)
    if s.ndim != 2 or not s.size or np.isnan(s).any():
        raise InputError(f"log ratios of shape {s.shape} must be (K, N), not empty, without NaN")
    log_weight = np.zeros_like(s)
    if log_density is not None:
        log_p = np.asarray(log_density, dtype=np.float64)
        if np.isnan(log_p).any() or np.isposinf(log_p).any():
            raise InputError(
                "a configuration has no normalisable density, as an empty training set has none: "
                "give a sample that is always in"
            )
        log_weight = log_p + np.logaddexp(math.log(prior) + s, math.log1p(-prior))
    total = logsumexp(log_weight, axis=0)
    if np.isneginf(total).any():
        raise InputError("no configuration gives the parameters any density: draw more of them")
    weight = np.exp(log_weight - total)
    probability = np.sum(weight * membership_posterior(s, prior), axis=0)
    return HiddenPosterior(probability, 1 / np.sum(weight**2, axis=0))


def posterior_bound(epsilon: float, prior: float = 0.5, *, linear: bool = False) -> float:
    """Largest P(member) that an epsilon-differentially private training allows.

    Pure privacy bounds the log ratio by epsilon, so the posterior by sigmoid(logit(prior) +
    epsilon), which the slope of the sigmoid bounds by prior + epsilon / 4.

    Args:
        epsilon: privacy budget, not negative.
        prior: share of members among the samples, in (0, 1).
        linear: the looser linear bound, which may exceed 1.

    Raises:
        InputError: epsilon is negative or the prior is not in (0, 1).
    """
    _check_prior(prior)
    if not epsilon >= 0:
        raise InputError(f"epsilon {epsilon} is no privacy budget: give a number of at least 0")
    return prior + epsilon / 4 if linear else float(expit(logit(prior) + epsilon))


@dataclass(frozen=True, eq=False)
class GaussianMeanWorld:
    """Estimation of a mean: loss 0.5 |theta - z|^2, where every integral is closed.

    Parameters trained on k samples of mean mu0 follow N(mu0, (T / k) I).

    Attributes:
        mean: (d,) mean mu0 of the training samples.
        count: how many they are, k, at least 1: without any, (1) is not normalisable.
        temperature: T of the posterior model, positive.

    Raises:
        InputError: an empty training set, or an argument out of range.
    """

    mean: FloatArray
    count: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(
                "an empty training set is not normalisable here: give a sample that is always in"
            )
        _check_temperature(self.temperature)
        if np.ndim(self.mean) != 1 or not np.isfinite(self.mean).all():
            raise InputError("the mean of the training samples must be (d,) and finite")

    @classmethod
    def trained_on(cls, samples: npt.ArrayLike, temperature: float = 1.0) -> Self:
        """Return the world of the training samples (k, d)."""
        z = np.asarray(samples, dtype=np.float64)
        return cls(z.mean(axis=0) if len(z) else np.zeros(z.shape[1:]), len(z), temperature)

    def with_sample(self, z: npt.ArrayLike) -> "GaussianMeanWorld":
        """Return the world with one more training sample (d,)."""
        k = self.count
        mean = (k * self.mean + np.asarray(z, dtype=np.float64)) / (k + 1)
        return GaussianMeanWorld(mean, k + 1, self.temperature)

    def log_density(self, theta: npt.ArrayLike) -> FloatArray:
        """Log density (...) of parameters (..., d)."""
        variance = self.temperature / self.count
        d = len(self.mean)
        square = np.sum((np.asarray(theta, dtype=np.float64) - self.mean) ** 2, axis=-1)
        log_p: FloatArray = -0.5 * (square / variance + d * math.log(2 * math.pi * variance))
        return log_p

    def loss(self, theta: npt.ArrayLike, z: npt.ArrayLike) -> FloatArray:
        """Losses (...) of samples (..., d) under parameters (..., d)."""
        difference = np.asarray(theta, dtype=np.float64) - np.asarray(z, dtype=np.float64)
        half: FloatArray = 0.5 * np.sum(difference**2, axis=-1)
        return half

    def soft_threshold(self, z: npt.ArrayLike) -> FloatArray:
        """Tau (...) of samples (..., d): (T d / 2) log(1 + 1/k) + k / (k + 1) |z - mu0|^2 / 2."""
        k, d = self.count, len(self.mean)
        spread = k / (k + 1) * self.loss(self.mean, z)
        tau: FloatArray = 0.5 * self.temperature * d * math.log1p(1 / k) + spread
        return tau

    def log_ratio(self, theta: npt.ArrayLike, z: npt.ArrayLike) -> FloatArray:
        """Optimal logit s (...) of samples (..., d) under parameters (..., d)."""
        return optimal_logit(self.loss(theta, z), self.soft_threshold(z), self.temperature)


@dataclass(frozen=True, eq=False)
class TableWorld:
    """A finite set of parameters with any losses: every integral is a sum.

    The counting measure stands for the flat prior of (1), so that here an empty training set is
    normalisable: each parameter is then equally likely.

    Attributes:
        losses: (G, n) loss of sample i under parameter g.
        temperature: T of the posterior model, positive.
        prior: share of members among the samples, in (0, 1).

    Raises:
        InputError: an argument out of range or losses that are not finite.
    """

    losses: FloatArray
    temperature: float = 1.0
    prior: float = 0.5

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        _check_prior(self.prior)
        if np.ndim(self.losses) != 2 or not np.isfinite(self.losses).all():
            raise InputError("the table of losses must be (parameters, samples) and finite")

    def log_density(self, member: npt.ArrayLike) -> FloatArray:
        """Log P(theta_g | m), (..., G), for membership bits (..., n)."""
        total = np.asarray(member, dtype=np.float64) @ self.losses.T  # (..., G)
        log_p: FloatArray = log_softmax(-total / self.temperature, axis=-1)
        return log_p

    def soft_threshold(self, sample: int, member: npt.ArrayLike) -> FloatArray:
        """Tau (...) of one sample for membership bits (..., n) of the others; its own is unread."""
        members = np.array(member, dtype=bool)
        members[..., sample] = False
        log_p = self.log_density(members)
        loss = self.losses[:, sample]
        tau: FloatArray = -self.temperature * logsumexp(log_p - loss / self.temperature, axis=-1)
        return tau

    def log_ratio(self, sample: int, member: npt.ArrayLike) -> FloatArray:
        """Optimal logit s (..., G) of one sample under every parameter."""
        tau = self.soft_threshold(sample, member)[..., None]
        return optimal_logit(self.losses[:, sample], tau, self.temperature)

    def posterior(self, sample: int) -> FloatArray:
        """P(sample is a member | theta_g), (G,), summed over all 2^n sets of members.

        Raises:
            InputError: there are more than 16 samples.
        """
        n = self.losses.shape[1]
        if n > 16:
            raise InputError(f"2^{n} sets of members are too many to sum: give at most 16 samples")
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1  # (2^n, n)
        n_in = bits.sum(axis=1)
        log_prior = n_in * math.log(self.prior) + (n - n_in) * math.log1p(-self.prior)
        joint = self.log_density(bits) + log_prior[:, None]  # (2^n, G)
        inside = logsumexp(joint[bits[:, sample]], axis=0)
        posterior: FloatArray = np.exp(inside - logsumexp(joint, axis=0))
        return posterior


def _check_temperature(temperature: float, *, limits: bool = False) -> None:
    if not (0 < temperature < math.inf or (limits and temperature in {0, math.inf})):
        raise InputError(f"temperature {temperature} is out of range: give a positive number")


def _check_prior(prior: float) -> None:
    if not 0 < prior < 1:
        raise InputError(f"prior {prior} is no share of members: give a number between 0 and 1")
