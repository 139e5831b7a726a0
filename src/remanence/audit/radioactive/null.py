"""What cosines with random directions are like by chance, in log space (arXiv 2002.00937).

A carrier is uniform on the unit sphere and independent of an innocent head, so the law of their
cosine is known exactly, whatever the head is. Ordinary marked models reach p-values far below
the smallest float, so every function here takes and gives natural logarithms and none gives -inf.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from remanence.errors import InputError

Floats = NDArray[np.float64]

# Of a cosine that rounds to 1, only this much is known; the p-value is then an upper bound.
_NEAREST_TO_ONE = 1 - 2.0**-53

# Gauss-Hermite quadrature for averages over a standard normal.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(40)


def cosine_logp(c: ArrayLike, d: int) -> Floats:
    """Logarithm of P(cosine >= c) for a uniform direction and any fixed one in d dimensions.

    P = I(1 - c^2; (d-1)/2, 1/2) / 2 for c >= 0, with I the regularised incomplete beta function,
    and 1 - P(-c) for c < 0. One-sided: only alignment counts.

    Args:
        c: cosines, any shape, in [-1, 1].
        d: dimension of the carriers (the marking network's, not the suspect's), at least 2.

    Returns:
        Natural logarithms, the shape of `c`, finite and at most 0.

    Raises:
        InputError: `d` is below 2, or a cosine is NaN or outside [-1, 1].
    """
    cosine = np.asarray(c, dtype=np.float64)
    if d < 2:
        raise InputError(f"dimension {d} has no directions to compare: give at least 2")
    if not bool(np.all(np.abs(cosine) <= 1 + 1e-9)):  # also false for NaN
        raise InputError("cosines hold NaN or lie outside [-1, 1]: check the features and weights")
    log_tail = _log_upper_tail(np.minimum(np.abs(cosine), _NEAREST_TO_ONE), d)
    return np.where(cosine >= 0, log_tail, np.log1p(-np.exp(log_tail)))


def _log_upper_tail(c: Floats, d: int) -> Floats:
    """Log of P(cosine >= c) for c in [0, 1)."""
    a, b = (d - 1) / 2, 0.5
    log_x = np.log1p(-c) + np.log1p(c)  # x = 1 - c^2 without cancellation near 1
    x = np.exp(log_x)
    far = x < (a + 1) / (a + b + 2)  # where the continued fraction converges
    log_half = math.log(0.5)
    out = np.empty_like(c)
    # Near the middle nothing underflows; there 1 - I(c^2; 1/2, a) keeps the digits of a small c.
    out[~far] = np.log1p(-special.betainc(b, a, c[~far] ** 2)) + log_half
    log_front = a * log_x[far] + np.log(c[far]) - math.log(a) - special.betaln(a, b)
    out[far] = log_front + np.log(_continued_fraction(x[far], a, b)) + log_half
    return np.minimum(out, log_half)


def _continued_fraction(x: Floats, a: float, b: float) -> Floats:
    """The incomplete beta's continued fraction 1/(1 + k_1/(1 + k_2/(1 + ...))), by Lentz's method.

    Converges in O(sqrt(a)) steps for x < (a + 1) / (a + b + 2) (DLMF 8.17.22).
    """
    upper = np.ones_like(x)
    lower = 1 / (1 - (a + b) / (a + 1) * x)
    value = lower.copy()
    for m in range(1, 100_000):
        even = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m)) * x
        odd = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1)) * x
        for k in (even, odd):
            lower = 1 / (1 + k * lower)
            upper = 1 + k / upper
            step = upper * lower
            value *= step
        if not bool(np.any(np.abs(step - 1) > 1e-15)):
            break
    return value


def fisher_logp(logp: ArrayLike) -> float | Floats:
    """Fisher's combination of independent p-values, from and to natural logarithms.

    -2 sum ln p_k is chi-squared with 2K degrees of freedom; for an even number of them the tail
    is a finite sum, ln p = -h + logsumexp_j(j ln h - ln j!), j < K, h = -sum ln p_k.

    Args:
        logp: (..., K) natural logarithms of p-values, at most 0.

    Returns:
        The combined natural logarithm, the leading shape; a float for a vector.

    Raises:
        InputError: there is nothing to combine, or a value is NaN or above 0.
    """
    logs = np.asarray(logp, dtype=np.float64)
    if logs.ndim == 0 or logs.shape[-1] == 0:
        raise InputError("there are no p-values to combine: give at least one class")
    if not bool(np.all(logs <= 0)):
        raise InputError("logarithms of p-values hold NaN or exceed 0: give values up to 0")
    h = -logs.sum(axis=-1, keepdims=True)
    j = np.arange(logs.shape[-1])
    combined = -h[..., 0] + special.logsumexp(special.xlogy(j, h) - special.gammaln(j + 1), axis=-1)
    combined = np.minimum(combined, 0.0)
    return float(combined) if combined.ndim == 0 else combined


def stouffer_logp(cosines: ArrayLike, d: int) -> float:
    """Approximate log p of the sum statistic s = sqrt(K d) mean(cosine), taken as standard normal.

    Only asymptotically right: at d = 64 and one class with cosine 0.4 it is 6.9e-4 where the exact
    value is 4.8e-4. Report it beside Fisher's exact p, never instead.

    Args:
        cosines: (K,) in [-1, 1].
        d: dimension of the carriers.

    Returns:
        Natural logarithm of the upper tail.
    """
    return float(special.log_ndtr(-sum_statistic(cosines, d)))


def sum_statistic(cosines: ArrayLike, d: int) -> float:
    """Return s = sqrt(K d) mean(cosine), about standard normal by chance."""
    c = np.asarray(cosines, dtype=np.float64)
    return float(math.sqrt(c.size * d) * c.mean())


def holm_logp(logp: ArrayLike) -> Floats:
    """Holm's correction for several tests, from and to natural logarithms.

    Args:
        logp: (M,) natural logarithms of p-values.

    Returns:
        (M,) corrected logarithms in the same order, at most 0.
    """
    logs = np.asarray(logp, dtype=np.float64)
    order = np.argsort(logs)
    steps = logs[order] + np.log(np.arange(len(logs), 0, -1))
    corrected = np.empty_like(logs)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 0.0)
    return corrected


def min_mean_cosine(K: int, d: int, p: float, power: float = 0.5) -> float:
    """Mean cosine at which the sum statistic reaches p: (z_p + z_power) / sqrt(K d).

    Fisher's combination needs about a tenth more where all classes are marked alike, and less
    where few classes carry the mark.

    Args:
        K: number of marked classes.
        d: dimension of the carriers, less the rank of reference heads.
        p: the p-value to reach, in (0, 0.5).
        power: chance of reaching it, in (0, 1); 0.5 for the threshold itself.

    Returns:
        The mean cosine; above 1 where K and d cannot reach p.

    Raises:
        InputError: an argument is out of range.
    """
    _check_design(K, d, p)
    if not 0 < power < 1:
        raise InputError(f"power {power} is not a probability: give a number between 0 and 1")
    return float((special.ndtri(power) - special.ndtri(p)) / math.sqrt(K * d))


def expected_log10_p(mean_cosine: float, K: int, d: int) -> float:
    """Typical log10 of Fisher's p where every class has this expected cosine.

    The cosine of a class spreads by about 1/sqrt(d) around its mean; -ln p is averaged over that
    spread by Gauss-Hermite quadrature before the classes are combined.

    Args:
        mean_cosine: expected cosine of a class, in (-1, 1).
        K: number of marked classes.
        d: dimension of the carriers.

    Returns:
        log10 p at the expected value of Fisher's statistic.

    Raises:
        InputError: an argument is out of range.
    """
    _check_design(K, d)
    if not -1 < mean_cosine < 1:
        raise InputError(f"mean cosine {mean_cosine} is out of range: give one between -1 and 1")
    c = np.clip(mean_cosine + _NODES * math.sqrt((1 - mean_cosine**2) / d), -1, 1)
    per_class = float(cosine_logp(c, d) @ _WEIGHTS / _WEIGHTS.sum())
    return float(fisher_logp(np.full(K, per_class))) / math.log(10)


@dataclass(frozen=True)
class Plan:
    """What a marking can prove, before or after it is made.

    Attributes:
        num_classes: K, marked classes.
        dim: d, dimension of the carriers.
        p: the p-value aimed at.
        mean_cosine: the mean cosine that is assumed or was measured; None where none was given.
        min_mean_cosine: mean cosine whose sum statistic equals p.
        detectable: smallest expected mean cosine that reaches p with `power`.
        power: that chance.
        expected_log10_p: typical log10 of Fisher's p at `mean_cosine`.
        classes_needed: marked classes at which `mean_cosine` reaches p, same dimension; None where
            it is not positive.
        dim_needed: dimension at which it does, same number of classes.
    """

    num_classes: int
    dim: int
    p: float
    mean_cosine: float | None
    min_mean_cosine: float
    detectable: float
    power: float
    expected_log10_p: float | None
    classes_needed: int | None
    dim_needed: int | None


def plan(
    K: int, d: int, *, p: float = 1e-4, mean_cosine: float | None = None, power: float = 0.8
) -> Plan:
    """Say what K classes and d dimensions can prove, and what a given mean cosine would need.

    Args:
        K: number of marked classes.
        d: dimension of the carriers.
        p: p-value aimed at, in (0, 0.5).
        mean_cosine: expected or measured mean cosine between carriers and head, in (-1, 1).
        power: chance of detection for `detectable`, in (0, 1).

    Returns:
        The plan.

    Raises:
        InputError: an argument is out of range.
    """
    threshold = min_mean_cosine(K, d, p)
    expected, cells = None, math.inf
    if mean_cosine is not None:
        expected = expected_log10_p(mean_cosine, K, d)
        if mean_cosine > 0:
            cells = (special.ndtri(p) / mean_cosine) ** 2
    known = math.isfinite(cells)
    return Plan(
        num_classes=K,
        dim=d,
        p=p,
        mean_cosine=mean_cosine,
        min_mean_cosine=threshold,
        detectable=min_mean_cosine(K, d, p, power),
        power=power,
        expected_log10_p=expected,
        classes_needed=max(1, math.ceil(cells / d)) if known else None,
        dim_needed=max(2, math.ceil(cells / K)) if known else None,
    )


def _check_design(K: int, d: int, p: float = 0.05) -> None:
    if K < 1 or d < 2:
        raise InputError(f"{K} classes in {d} dimensions cannot be tested: give K >= 1, d >= 2")
    if not 0 < p < 0.5:
        raise InputError(f"p {p} is not a p-value to aim at: give a number between 0 and 0.5")
