"""Likelihood ratios of the margin between references with and without the sample: LiRA, BaVarIA.

arXiv 2112.03570, Section V, and 2603.11799.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np
from scipy.special import gammaln, log_ndtr

from remanence.audit.membership.attacks.base import Attack, Need
from remanence.audit.membership.attacks.reference_signals import BoolArray, References, Side
from remanence.audit.membership.signals import FloatArray, Signals
from remanence.errors import InputError

Variance = Literal["fixed", "per_sample", "auto"]
ENOUGH_FOR_PER_SAMPLE = 32  # references a side; 2112.03570, Section VI-A


@dataclass(frozen=True, eq=False)
class Moments:
    """Margins of one side: how many, their mean, and their squares around that mean.

    Attributes:
        count: (N, 1) references a sample.
        mean: (N, Q).
        scatter: (N, Q) sum of squared deviations from the sample's own mean.
    """

    count: FloatArray
    mean: FloatArray
    scatter: FloatArray

    @classmethod
    def of(cls, margin: FloatArray, use: BoolArray) -> Self:
        """Moments over the references (K, N) that count, of margins (K, N, Q)."""
        weight = use.astype(np.float64)
        count = weight.sum(axis=0)[:, None]
        mean = np.einsum("knq,kn->nq", margin, weight) / count
        deviation = margin - mean
        scatter = np.einsum("knq,knq,kn->nq", deviation, deviation, weight)
        return cls(count, mean, scatter)

    def pooled_variance(self, side: Side) -> FloatArray:
        """Variance around the samples' own means, pooled over samples, (Q,), unbiased."""
        freedom = float((self.count - 1).sum())
        if freedom == 0:
            raise InputError(
                f"the {side.upper()} variance needs a sample with 2 {side.upper()} references: "
                "train more references"
            )
        variance: FloatArray = self.scatter.sum(axis=0) / freedom
        if not (variance > 0).all():
            raise InputError(f"{side.upper()} references all agree: train them on different halves")
        return variance

    def variance(self, side: Side) -> FloatArray:
        """Variance of each sample, (N, Q), unbiased."""
        if self.count.min() < 2 or not (self.scatter > 0).all():
            raise InputError(
                f"some samples have fewer than 2 {side.upper()} references that differ: "
                "use variance='fixed'"
            )
        own: FloatArray = self.scatter / (self.count - 1)
        return own


@dataclass(frozen=True)
class LiRA(Attack):
    """Gaussian likelihood ratio of the margin, one Gaussian a side and sample.

    Online: log N(phi; mu_in, var_in) - log N(phi; mu_out, var_out). Offline, from OUT references
    alone: log Phi((phi - mu_out) / sd_out), one-sided; from about 38 deviations on it is 0. Log
    ratios are averaged over queries. Where the two variances differ, the online ratio rises with
    the margin between the two means, and may fall beyond them.

    Attributes:
        online: whether to use the IN references.
        variance: "fixed", one a side, pooled over samples after subtracting each sample's own
            mean; "per_sample"; "auto" takes the latter from 32 references a side on.
    """

    online: bool = True
    variance: Variance = "auto"

    paper = (
        "Carlini et al. 2022, 2112.03570: sees the confidence of the sample and trains references "
        "on data like the target's"
    )

    def __post_init__(self) -> None:
        if self.variance not in get_args(Variance):
            raise InputError(f"variance {self.variance!r} is unknown: give {get_args(Variance)}")

    @property
    def name(self) -> str:
        """Short name, as in `ATTACKS`."""
        return "lira" if self.online else "lira-offline"

    @property
    def needs(self) -> frozenset[Need]:
        """What `score` has to be given."""
        return frozenset[Need](
            ("references", "out", "in") if self.online else ("references", "out")
        )

    def _score(self, target: Signals, references: References) -> FloatArray:
        outside = Moments.of(references.margin, ~references.member)
        if not self.online:
            per_sample = self._per_sample(outside)
            deviation = np.sqrt(self._variance(outside, "out", per_sample=per_sample))
            one_sided: FloatArray = log_ndtr((target.margin - outside.mean) / deviation)
            return one_sided
        inside = Moments.of(references.margin, references.member)
        per_sample = self._per_sample(inside, outside)
        var_in = self._variance(inside, "in", per_sample=per_sample)
        var_out = self._variance(outside, "out", per_sample=per_sample)
        log_in = _log_normal(target.margin, inside.mean, var_in)
        return log_in - _log_normal(target.margin, outside.mean, var_out)

    def _per_sample(self, *sides: Moments) -> bool:
        if self.variance != "auto":
            return self.variance == "per_sample"
        return all(bool((side.count >= ENOUGH_FOR_PER_SAMPLE).all()) for side in sides)

    @staticmethod
    def _variance(moments: Moments, side: Side, *, per_sample: bool) -> FloatArray:
        return moments.variance(side) if per_sample else moments.pooled_variance(side)


@dataclass(frozen=True)
class BaVarIA(Attack):
    """Student-t likelihood ratio: LiRA with a prior on each sample's mean and variance.

    Each side has a normal-inverse-gamma prior, drawn from all references of the side: mean mu0,
    and beta0 = (alpha0 - 1) times the pooled variance, so that the prior mean of the variance is
    the pooled one. With more references a sample speaks more for itself, and the score goes to
    LiRA's with variance per sample. The strengths kappa0 and alpha0 are choices made here.

    Attributes:
        kappa0: weight of the prior mean, in references; positive.
        alpha0: shape of the prior of the variance, above 1.
    """

    kappa0: float = 1.0
    alpha0: float = 2.0

    name = "bavaria"
    paper = (
        "Brannvall 2026, 2603.11799: sees the confidence of the sample and trains a few references "
        "on data like the target's"
    )
    needs = frozenset[Need]({"references", "in", "out"})

    def __post_init__(self) -> None:
        if not (0 < self.kappa0 < math.inf and 1 < self.alpha0 < math.inf):
            raise InputError(f"kappa0 {self.kappa0} must be above 0, alpha0 {self.alpha0} above 1")

    def _score(self, target: Signals, references: References) -> FloatArray:
        inside = self._log_predictive(target.margin, references, "in")
        outside = self._log_predictive(target.margin, references, "out")
        return inside - outside

    def _log_predictive(self, phi: FloatArray, references: References, side: Side) -> FloatArray:
        use = references.member if side == "in" else ~references.member
        moments = Moments.of(references.margin, use)
        n = moments.count  # (N, 1)
        mu0 = (moments.mean * n).sum(axis=0) / n.sum()  # (Q,)
        beta0 = (self.alpha0 - 1) * moments.pooled_variance(side)  # (Q,)
        kappa, alpha = self.kappa0 + n, self.alpha0 + n / 2
        mu = (self.kappa0 * mu0 + n * moments.mean) / kappa
        shift = self.kappa0 * n * (moments.mean - mu0) ** 2 / (2 * kappa)
        beta = beta0 + 0.5 * moments.scatter + shift
        return _log_student(phi, 2 * alpha, mu, beta * (kappa + 1) / (alpha * kappa))


def _log_normal(x: FloatArray, mean: FloatArray, variance: FloatArray) -> FloatArray:
    log_p: FloatArray = -0.5 * ((x - mean) ** 2 / variance + np.log(2 * math.pi * variance))
    return log_p


def _log_student(
    x: FloatArray, freedom: FloatArray, location: FloatArray, square_scale: FloatArray
) -> FloatArray:
    # scipy.stats.t.logpdf, without its checks, which take most of its time.
    constant = gammaln((freedom + 1) / 2) - gammaln(freedom / 2) - 0.5 * np.log(freedom * math.pi)
    square = (x - location) ** 2 / square_scale
    log_p: FloatArray = (
        constant - 0.5 * np.log(square_scale) - (freedom + 1) / 2 * np.log1p(square / freedom)
    )
    return log_p
