"""From scores to probabilities: sigma(a score + b), fitted on models whose members are known.

Under the posterior model of arXiv 1908.11229 (section 3) P(member | score) is
sigma(score / T + t) with t = log(prior / (1 - prior)) for scores tau(z) - loss(z), so that the
slope a estimates 1 / T and b - t is 0.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from sklearn.linear_model import LogisticRegression

from remanence.audit.evidence import Estimate
from remanence.audit.membership.roc import checked, proportion
from remanence.errors import InputError

Floats = NDArray[np.float64]

RIDGE = 1e-2  # on the slope of scores of unit spread: bounds it where members are separable


@dataclass(frozen=True)
class ReliabilityRow:
    """Samples of one bin of predicted probability.

    Attributes:
        low: Smallest prediction in the bin.
        high: Largest prediction.
        n: Number of samples.
        predicted: Their mean prediction.
        observed: Share of members among them, with its Clopper-Pearson interval.
    """

    low: float
    high: float
    n: int
    predicted: float
    observed: Estimate


@dataclass(frozen=True)
class Reliability:
    """How far probabilities can be taken at their word.

    Attributes:
        brier: Mean squared error of the probabilities, in [0, 1].
        brier_prior: The same of always answering the share of members: the score to beat.
        ece: Expected calibration error over bins of equal size, in [0, 1].
        rows: The bins, by rising prediction.
    """

    brier: float
    brier_prior: float
    ece: float
    rows: tuple[ReliabilityRow, ...]


@dataclass(frozen=True)
class Calibrator:
    """P(member | score) = sigma(a score + b), for the share of members it was fitted on.

    Attributes:
        a: Slope, per unit of score; estimates 1 / T. Not above 0 where higher scores were no sign
            of membership.
        b: Intercept.
        prior: Share of members in the fit.
    """

    a: float
    b: float
    prior: float

    @property
    def temperature(self) -> float:
        """T of the posterior model in units of the score; inf where a is not above 0."""
        return 1 / self.a if self.a > 0 else math.inf

    @property
    def offset(self) -> float:
        """Intercept less the logit of the prior; 0 under the theory."""
        return self.b - float(special.logit(self.prior))

    @classmethod
    def fit(cls, scores: ArrayLike, member: ArrayLike) -> Self:
        """Fit a and b by logistic regression.

        Give scores of models whose members are known, each scored by the other models (leave one
        model out), pooled over models; never those of the audited model. Maximum likelihood, with
        a ridge of 0.01 on the slope of standardised scores: it costs about 0.1 / M of the slope
        where members and non-members overlap and keeps it finite where they do not.

        Args:
            scores: (M,) float, finite, higher = more member-like.
            member: (M,) bool, at least 30 on each side.

        Returns:
            The fitted calibrator.

        Raises:
            InputError: Shapes differ, a score is not finite, or a side has fewer than 30 samples.
        """
        s, m = checked(scores, member)
        prior = float(m.mean())
        centre, spread = float(s.mean()), float(s.std())
        # Equal scores have a spread of a few rounding errors, which must not be blown up.
        if spread <= 1e-12 * max(1.0, abs(centre)):
            return cls(0.0, float(special.logit(prior)), prior)
        model = LogisticRegression(C=1 / RIDGE, tol=1e-8, max_iter=1000)
        model.fit(((s - centre) / spread)[:, None], m)
        a = float(model.coef_[0, 0]) / spread
        return cls(a, float(model.intercept_[0]) - a * centre, prior)

    def posterior(self, scores: ArrayLike, prior: float | None = None) -> Floats:
        """Probability of membership.

        Args:
            scores: (N,) float, finite, of the same attack.
            prior: Share of members expected among the samples, in (0, 1); that of the fit by
                default. Bayes' rule shifts the logit by the difference of the priors' logits.

        Returns:
            (N,) float64 in [0, 1].

        Raises:
            InputError: A score is not finite, or the prior is out of range.
        """
        s = np.asarray(scores, dtype=np.float64)
        if not np.isfinite(s).all():
            raise InputError("scores to calibrate are not all finite: leave those samples out")
        given = self.prior if prior is None else prior
        if not 0 < given < 1:
            raise InputError(f"prior {given} is out of range: give a number between 0 and 1")
        shift = float(special.logit(given)) + self.offset
        return np.asarray(special.expit(self.a * s + shift))


def reliability(probabilities: ArrayLike, member: ArrayLike, bins: int = 10) -> Reliability:
    """Compare probabilities with what happened.

    Use samples that were not part of the fit. Bins hold equal numbers of samples (equal
    probabilities stay together), because membership probabilities crowd around the prior.

    Args:
        probabilities: (N,) float in [0, 1].
        member: (N,) bool, at least one on each side.
        bins: How many bins at most.

    Returns:
        Brier score, expected calibration error and the table.

    Raises:
        InputError: Shapes differ, or a probability is out of range.
    """
    p, m = checked(probabilities, member, smallest=1)
    if p.min() < 0 or p.max() > 1:
        raise InputError("probabilities must lie between 0 and 1: give posteriors, not scores")
    if bins < 1:
        raise InputError(f"{bins} bins: give at least 1, usually 10")
    order = np.argsort(p, kind="stable")
    p, m = p[order], m[order]
    cuts = np.searchsorted(p, p[np.arange(1, bins) * len(p) // bins], side="left")
    rows = tuple(
        ReliabilityRow(
            low=float(own.min()),
            high=float(own.max()),
            n=len(own),
            predicted=float(own.mean()),
            observed=proportion("share of members", int(hits.sum()), len(own), 0.95),
        )
        for own, hits in zip(
            np.split(p, np.unique(cuts)), np.split(m, np.unique(cuts)), strict=True
        )
        if len(own)
    )
    return Reliability(
        brier=float(np.mean((p - m) ** 2)),
        brier_prior=float(m.mean() * (1 - m.mean())),
        ece=sum(row.n * abs(row.predicted - row.observed.value) for row in rows) / len(p),
        rows=rows,
    )
