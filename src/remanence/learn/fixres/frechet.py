"""The Frechet-type law of pooled activations (arXiv 1906.06423, Section 4).

A generalised extreme value law of fixed shape xi > 0,

    F(x; mu, sigma) = exp(-(1 + xi (x - mu) / sigma)^(-1/xi))    where the bracket is positive,

and 0 below.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from scipy.optimize import least_squares, minimize_scalar
from torch import Tensor

from remanence.errors import InputError
from remanence.learn.fixres.activations import MIN_STD

FitMethod = Literal["likelihood", "cdf"]


@dataclass(frozen=True)
class Frechet:
    """Generalised extreme value law of Frechet type; scipy's `genextreme(-xi, mu, sigma)`.

    Attributes:
        mu: location.
        sigma: scale, positive.
        xi: shape, positive.
    """

    mu: float
    sigma: float
    xi: float = 0.3

    def cdf(self, x: Tensor) -> Tensor:
        """Probabilities of values, any shape; 0 below mu - sigma / xi."""
        u = (1 + self.xi * (x - self.mu) / self.sigma).clamp(min=0)
        return torch.exp(-(u ** (-1 / self.xi)))

    def quantile(self, p: Tensor) -> Tensor:
        """Values of probabilities in (0, 1), any shape."""
        return self.mu + self.sigma / self.xi * ((-p.log()) ** -self.xi - 1)


def fit_frechet(
    z: Tensor,
    xi: float = 0.3,
    *,
    method: FitMethod = "likelihood",
    max_values: int = 1_000_000,
    seed: int = 0,
) -> Frechet:
    """Fit location and scale to the marginal of the pooled activations (Section 4).

    Zeros are left-censored: a zero says only that the value would lie at or below 0, with
    probability F(0). Where `z` holds negative values no rectifier came before, and nothing is
    censored.

    With e = mu - sigma / xi, the lower end of the support, the best sigma for a given e is closed:
    (sigma / xi)^(1/xi) = P / sum (x - e)^(-1/xi), for P uncensored values and the sum over all.
    What is left is a search over log(min x - e), along which every value has density.

    Args:
        z: floats of any shape; embeddings (N, C) or any part of them.
        xi: shape, positive; 0.3 in the paper.
        method: `likelihood`, or `cdf` for least squares between empirical and model CDF.
        max_values: larger `z` are sampled down to this many values.
        seed: for that sample.

    Returns:
        The fitted law.

    Raises:
        InputError: an argument is out of range, or `z` holds NaN or infinities, too few distinct
            values above 0, or a spread below 1e-6.
    """
    if not 0 < xi < math.inf:
        raise InputError(f"xi {xi} is not the shape of a Frechet law: give a positive number")
    if method not in get_args(FitMethod):
        raise InputError(f"method {method!r} is unknown: give one of {get_args(FitMethod)}")
    x = z.detach().flatten()
    if len(x) > max_values:
        pick = torch.randint(len(x), (max_values,), generator=torch.Generator().manual_seed(seed))
        x = x[pick.to(x.device)]
    x = x.double()
    if not bool(x.isfinite().all()):
        raise InputError("activations hold NaN or infinity: check the model's output")
    seen, n_censored = x, 0
    if len(x) and x.min().item() >= 0:
        seen = x[x > 0]
        n_censored = len(x) - len(seen)
    if len(seen) < 3 or seen.min() == seen.max():
        raise InputError("activations hold fewer than 3 distinct values above 0: give more images")

    fitted = _fit_likelihood(seen, n_censored, xi)
    if method == "cdf":
        fitted = _fit_cdf(x, fitted)
    if not fitted.sigma > MIN_STD:
        raise InputError(
            f"activations spread over {fitted.sigma:.1e}, too little to fit: use kind='moments'"
        )
    return fitted


def _fit_likelihood(seen: Tensor, n_censored: int, xi: float) -> Frechet:
    lowest = 0.0 if n_censored else seen.min().item()
    above, n_seen, alpha = seen - lowest, len(seen), 1 / xi

    def log_powers(log_gap: float) -> tuple[Tensor, float]:
        """Logs of x - e for uncensored x, and of the sum of (x - e)^-alpha over all."""
        log_x = (above + math.exp(log_gap)).log()
        log_sum = torch.logsumexp(-alpha * log_x, dim=0).item()
        if n_censored:
            high, low = sorted((log_sum, math.log(n_censored) - alpha * log_gap), reverse=True)
            log_sum = high + math.log1p(math.exp(low - high))
        return log_x, log_sum

    def loss(log_gap: float) -> float:
        """Negative profile log-likelihood per uncensored value, up to a constant."""
        log_x, log_sum = log_powers(log_gap)
        return log_sum + (1 + alpha) * log_x.mean().item()

    # A coarse look first: nothing proves that the profile has only one valley.
    centre = math.log(seen.std().item())
    coarse = [centre + step for step in range(-12, 13, 2)]
    best = min(coarse, key=loss)
    log_gap = float(minimize_scalar(loss, bounds=(best - 2, best + 2), method="bounded").x)
    _, log_sum = log_powers(log_gap)
    sigma = xi * math.exp(xi * (math.log(n_seen) - log_sum))
    return Frechet(lowest - math.exp(log_gap) + sigma / xi, sigma, xi)


def _fit_cdf(x: Tensor, start: Frechet) -> Frechet:
    ordered = x.sort().values
    # Evenly spaced order statistics; for ties, and so at a censored 0, the CDF is its upper value.
    points = ordered[torch.linspace(0, len(x) - 1, min(len(x), 2048)).long().to(x.device)]
    shares = (torch.searchsorted(ordered, points, right=True) - 0.5) / len(x)

    def law(theta: tuple[float, float]) -> Frechet:
        return Frechet(theta[0], math.exp(theta[1]), start.xi)

    fit = least_squares(
        lambda theta: (law(theta).cdf(points) - shares).cpu().numpy(),
        (start.mu, math.log(start.sigma)),
        x_scale=(start.sigma, 1.0),
    )
    return law((float(fit.x[0]), float(fit.x[1])))
