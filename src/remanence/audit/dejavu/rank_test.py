"""The one-sided Mann-Whitney rank test, tie-corrected and in log space, and the AUC it measures.

AUC = P(candidate > reference) + P(tie) / 2. A candidate set with a share f of members has
AUC - 1/2 = f (AUC of members - 1/2), so its distance from 1/2 reads as an effect size.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from remanence.audit.dejavu.scores import (
    Floats,
    Groups,
    as_scores,
    permutation_log10_p,
    permutation_method,
    permuted_labels,
    pooled_clusters,
)
from remanence.audit.evidence import Estimate


@dataclass(frozen=True)
class RankResult:
    """A rank test.

    Attributes:
        auc: Probability that a candidate scores above a reference, ties counted half.
        log10_p: Decimal logarithm of the one-sided p-value, never -inf.
        method: How the p-value was computed.
    """

    auc: float
    log10_p: float
    method: str


def mann_whitney(
    candidate: ArrayLike,
    reference: ArrayLike,
    *,
    groups: Groups | None = None,
    permutations: int = 2000,
    seed: int = 0,
) -> RankResult:
    """Test whether candidates score higher than references, by ranks.

    Without groups: normal approximation with continuity and tie correction. With groups: clusters
    are permuted as wholes.

    Args:
        candidate: Scores (n,).
        reference: Scores (m,).
        groups: Cluster names of the candidates (n,) and references (m,).
        permutations: How many, where groups are given.
        seed: For the permutations.

    Returns:
        AUC and p-value.

    Raises:
        InputError: Scores are empty or not finite, or the groups are unusable.
    """
    candidate, reference = as_scores(candidate, "candidate"), as_scores(reference, "reference")
    n, m = len(candidate), len(reference)
    ranks = stats.rankdata(np.concatenate([candidate, reference]))
    auc = float(_auc(ranks[:n].sum(), n, m))
    if groups is None:
        ties = np.unique(ranks, return_counts=True)[1].astype(np.float64)
        total = n + m
        spread = n * m / 12 * (total + 1 - (ties**3 - ties).sum() / (total * (total - 1)))
        if spread <= 0:
            return RankResult(auc, 0.0, "normal approximation")
        z = ((auc - 0.5) * n * m - 0.5) / math.sqrt(spread)
        return RankResult(auc, float(special.log_ndtr(-z)) / math.log(10), "normal approximation")

    ids, is_candidate = pooled_clusters(groups, n, m)
    rank_sums, sizes = np.bincount(ids, ranks), np.bincount(ids).astype(np.float64)
    count = 0
    generator = np.random.default_rng(seed)
    for labels in permuted_labels(is_candidate, permutations, len(sizes), generator):
        in_candidate = labels.astype(np.float64)
        n_b = in_candidate @ sizes
        count += int((_auc(in_candidate @ rank_sums, n_b, n + m - n_b) >= auc - 1e-12).sum())
    method = permutation_method(groups, permutations, len(sizes))
    return RankResult(auc, permutation_log10_p(count, permutations), method)


def _auc(rank_sum: Floats, n: Floats | int, m: Floats | int) -> Floats:
    return (rank_sum - n * (n + 1) / 2) / (n * m)


def auc_interval(
    candidate: ArrayLike,
    reference: ArrayLike,
    *,
    groups: Groups | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """AUC with DeLong's interval on the logit scale; clusters are summed first (Obuchowski 1997).

    At an AUC of 0 or 1 the variance is unknown; the open end is then that of a proportion of which
    every one of min(n, m) trials succeeded.

    Args:
        candidate: Scores (n,).
        reference: Scores (m,).
        groups: Cluster names of the candidates (n,) and references (m,).
        confidence: Level of the interval.

    Raises:
        InputError: Scores are empty or not finite, or the groups are unusable.
    """
    candidate, reference = as_scores(candidate, "candidate"), as_scores(reference, "reference")
    n, m = len(candidate), len(reference)
    ids, is_candidate = pooled_clusters(groups, n, m)
    ranks = stats.rankdata(np.concatenate([candidate, reference]))
    # Placements: the share of the other set below each score, ties counted half.
    above = (ranks[:n] - stats.rankdata(candidate)) / m
    below = 1 - (ranks[n:] - stats.rankdata(reference)) / n
    auc = float(above.mean())
    deviations = np.bincount(ids, np.concatenate([(above - auc) / n, (below - auc) / m]))
    variance = 0.0
    for side in (deviations[is_candidate], deviations[~is_candidate]):
        variance += float((side**2).sum()) * len(side) / max(1, len(side) - 1)
    if not 0 < auc < 1:
        fewest = int(min(is_candidate.sum(), (~is_candidate).sum()))
        end = ((1 - confidence) / 2) ** (1 / fewest)
        low, high = (end, 1.0) if auc else (0.0, 1 - end)
        return Estimate("AUC", auc, low, high, confidence)
    z = float(special.ndtri((1 + confidence) / 2))
    half = z * math.sqrt(variance) / (auc * (1 - auc))
    centre = float(special.logit(auc))
    low, high = (float(special.expit(centre + step)) for step in (-half, half))
    return Estimate("AUC", auc, low, high, confidence)
