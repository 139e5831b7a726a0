"""Intervals of the figures that the memoriser and the layer probe report."""

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm, rankdata

from remanence.audit.evidence import Estimate

Scores = npt.NDArray[np.float64]


def proportion(name: str, successes: int, trials: int) -> Estimate:
    """Share of successes with its exact 95% interval (Clopper and Pearson 1934)."""
    exact = binomtest(successes, trials).proportion_ci(0.95, method="exact")
    return Estimate(name, successes / trials, float(exact.low), float(exact.high))


def mean_of_two(name: str, a: Estimate, b: Estimate) -> Estimate:
    """Mean of two independent figures; its interval from theirs (Zou and Donner 2008, MOVER)."""
    value = (a.value + b.value) / 2
    below = math.hypot(a.value - a.low, b.value - b.low) / 2
    above = math.hypot(a.high - a.value, b.high - b.value) / 2
    return Estimate(name, value, value - below, value + above)


def delong(members: Scores, nonmembers: Scores) -> tuple[Scores, Scores]:
    """Areas under L ROC curves over the same images, and their covariance.

    DeLong, DeLong and Clarke-Pearson 1988, by midranks (Sun and Xu 2014): O(L N log N).

    Args:
        members: (L, M) scores, higher for a member; M >= 2.
        nonmembers: (L, K) scores; K >= 2.

    Returns:
        (L,) areas in [0, 1], ties counted half, and the (L, L) covariance of their estimates.
    """
    m, k = members.shape[1], nonmembers.shape[1]
    ranks = rankdata(np.concatenate((members, nonmembers), axis=1), axis=1)
    # For each member the share of non-members below it, and the reverse.
    above = (ranks[:, :m] - rankdata(members, axis=1)) / k
    below = 1 - (ranks[:, m:] - rankdata(nonmembers, axis=1)) / m
    covariance = np.atleast_2d(np.cov(above)) / m + np.atleast_2d(np.cov(below)) / k
    return above.mean(axis=1), covariance


def auc_estimate(name: str, auc: float, variance: float, m: int, k: int) -> Estimate:
    """Area under the ROC curve with its 95% interval.

    A full separation leaves no variance to estimate; its interval is then the exact one of
    min(m, k) successes out of as many.

    Args:
        name: what the figure is called.
        auc: the area.
        variance: of its estimate, as `delong` gives it.
        m: members.
        k: non-members.
    """
    if variance <= 0 and auc in (0.0, 1.0):
        fewer = min(m, k)
        return proportion(name, round(auc * fewer), fewer)
    reach = float(norm.ppf(0.975)) * math.sqrt(max(variance, 0.0))
    return Estimate(name, auc, max(auc - reach, 0.0), min(auc + reach, 1.0))
