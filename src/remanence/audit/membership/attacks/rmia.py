"""Relative membership inference: the sample against a population (arXiv 2312.03262)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from remanence.audit.membership.attacks.base import Attack, Need
from remanence.audit.membership.attacks.reference_signals import BoolArray, References
from remanence.audit.membership.bayes import free_energy
from remanence.audit.membership.signals import FloatArray, Signals
from remanence.errors import InputError

CACHED = 1 << 17  # confidences a pass; a core's cache holds them for both sides
SMALLEST = 1e-280  # sums of confidences below lose digits, and are formed from the losses


def rmia_score(
    log_ratio: FloatArray, population_log_ratio: FloatArray, gamma: float = 1.0
) -> FloatArray:
    """Share of the population z with ratio_x / ratio_z > gamma (eq. 2), ties not counted.

    Sorting the population once gives the same counts as the N x M matrix, in O((N + M) log M).

    Args:
        log_ratio: (N,) log of p(x | theta) / p(x).
        population_log_ratio: (M,) the same of the population.
        gamma: at least 1.

    Returns:
        (N,) shares in [0, 1].

    Raises:
        InputError: gamma is below 1 or the population is empty or not finite.
    """
    if not 1 <= gamma < math.inf:
        raise InputError(f"gamma {gamma} is out of range: give a number of at least 1")
    z = np.sort(np.asarray(population_log_ratio, dtype=np.float64), axis=None)
    if not z.size or not np.isfinite(z).all():
        raise InputError("the population's log ratios are empty or not finite: score it again")
    below = np.searchsorted(z, np.asarray(log_ratio) - math.log(gamma), side="left")
    share: FloatArray = below / z.size
    return share


@dataclass(frozen=True, eq=False)
class RMIA(Attack):
    """How often the sample's likelihood ratio beats that of a population.

    ratio_x = p(x | theta) / p(x). Offline p(x) = ((1 + a) p_out + 1 - a) / 2, with p_out the mean
    confidence of the OUT references; online it is the mean of p_in and p_out. Log ratios are
    averaged over queries. The score is a count, a step function of ratio_x: it never falls when
    the loss falls, but needs a fine population to rise with it.

    Attributes:
        a: how much of p(x) the OUT references explain, in [0, 1]; offline only.
        gamma: how much larger than the population's a ratio must be, at least 1.
        online: whether to use the IN references.
        population: (M,) log ratios of the population; None compares the samples with each other.
    """

    a: float = 0.3
    gamma: float = 1.0
    online: bool = False
    population: FloatArray | None = None

    name = "rmia"
    paper = (
        "Zarifzadeh et al. 2024, 2312.03262: sees the confidence of the sample, trains references "
        "on data like the target's and holds a population of such data"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.a <= 1:
            raise InputError(f"a {self.a} is out of range: give a number from 0 to 1")
        if not 1 <= self.gamma < math.inf:
            raise InputError(f"gamma {self.gamma} is out of range: give a number of at least 1")

    @property
    def needs(self) -> frozenset[Need]:
        """What `score` has to be given."""
        return frozenset[Need](
            ("references", "out", "in") if self.online else ("references", "out")
        )

    def log_ratio(self, target: Signals, references: References) -> FloatArray:
        """Log of p(x | theta) / p(x), (N,)."""
        self._check(target, references)
        inside = references.member
        log_p_out, *log_p_in = _log_mean_confidence(
            references, (~inside, inside) if self.online else (~inside,)
        )
        if self.online:
            log_p = np.logaddexp(log_p_in[0], log_p_out) - math.log(2)
        elif self.a == 1:
            log_p = log_p_out
        else:
            log_p = np.logaddexp(math.log1p(self.a) + log_p_out, math.log1p(-self.a)) - math.log(2)
        ratio: FloatArray = (-target.loss - log_p).mean(axis=1)
        return ratio

    def with_population(self, target: Signals, references: References) -> "RMIA":
        """Return the attack with the population whose signals these are."""
        return replace(self, population=self.log_ratio(target, references))

    def _score(self, target: Signals, references: References) -> FloatArray:
        ratio = self.log_ratio(target, references)
        population = ratio if self.population is None else self.population
        return rmia_score(ratio, population, self.gamma)[:, None]


def _log_mean_confidence(references: References, sides: Sequence[BoolArray]) -> list[FloatArray]:
    """Log of the mean of exp(-loss) over the references (K, N) of each side, (N, Q) each."""
    K, N, Q = references.loss.shape
    log_p = [np.empty((N, Q)) for _ in sides]
    step = max(1, CACHED // (K * Q))
    for start in range(0, N, step):
        part = slice(start, start + step)
        confidence = references.conf[:, part]
        for out, use in zip(log_p, sides, strict=True):
            weight = use[:, part].astype(np.float64)
            sums = np.einsum("knq,kn->nq", confidence, weight)
            if sums.min() > SMALLEST:
                out[part] = np.log(sums / weight.sum(axis=0)[:, None])
            else:
                losses = references.loss[:, part]
                out[part] = -free_energy(losses, where=use[:, part, None])
    return log_p
