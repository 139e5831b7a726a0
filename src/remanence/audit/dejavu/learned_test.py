"""The learned test: a regressor tells candidates from references, on images it was not fitted to.

Dataset inference fits a regressor to features and tests its scores; here the fit is cross-fitted,
so that every image is scored by a regressor that never saw it, and there is one p-value for all
images. Features become ranks, the regressor is ridge regression on the label. Both are closed
form, so every permutation refits it: the p-value is exact. (Permuting the finished scores alone is
not: scores of one fold depend on the labels of the others.)
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from remanence.audit.dejavu.scores import (
    Floats,
    Groups,
    permutation_log10_p,
    permutation_method,
    permuted_labels,
    pooled_clusters,
)
from remanence.errors import InputError

# Ridge penalty as a share of the features' total variance: blind-walk features are nearly copies.
RIDGE = 0.01


@dataclass(frozen=True)
class LearnedResult:
    """A learned test.

    Attributes:
        t: Sum of the folds' two-sample t statistics over the root of their number.
        log10_p: Decimal logarithm of the permutation p-value.
        method: How the p-value was computed.
        candidate: Out-of-fold scores (n,), standardised within each fold; higher = more like a
            candidate.
        reference: Out-of-fold scores (m,).
    """

    t: float
    log10_p: float
    method: str
    candidate: Floats
    reference: Floats


def learned_test(
    candidate: ArrayLike,
    reference: ArrayLike,
    *,
    groups: Groups | None = None,
    folds: int = 5,
    permutations: int = 2000,
    seed: int = 0,
) -> LearnedResult:
    """Test whether features tell candidates from references, with K-fold cross-fitting.

    Args:
        candidate: Features (n, F), for example of `blind_walk`, or several membership scores.
        reference: Features (m, F).
        groups: Cluster names of the candidates (n,) and references (m,); clusters are assigned to
            folds and permuted as wholes.
        folds: Number of folds, at least 2.
        permutations: How many times labels are permuted and the regressor refitted.
        seed: For folds and permutations.

    Returns:
        Statistic, p-value and out-of-fold scores.

    Raises:
        InputError: Features are not two finite matrices of the same width, or there are fewer
            clusters than two a fold.
    """
    x, n = _features(candidate, reference)
    total = len(x)
    ids, is_candidate = pooled_clusters(groups, n, total - n)
    clusters = len(is_candidate)
    if not 2 <= folds <= clusters // 2:
        raise InputError(f"{folds} folds of {clusters} images or groups: give 2 to {clusters // 2}")
    generator = np.random.default_rng(seed)
    fold_of = (generator.permutation(clusters) % folds)[ids]
    parts = [_fold(x, fold_of == k, ids) for k in range(folds)]
    gram: Floats = np.sum([part.gram for part in parts], axis=0)
    penalty = RIDGE * np.trace(gram) * np.eye(len(gram))
    inverses = [np.linalg.inv(gram - part.gram + penalty) for part in parts]

    observed, coefficients = _statistic(parts, inverses, is_candidate[None].astype(np.float64))
    t = float(observed[0])
    count = 0
    for labels in permuted_labels(is_candidate, permutations, total, generator):
        count += int((_statistic(parts, inverses, labels)[0] >= t - 1e-9 * abs(t)).sum())

    scores = np.empty(total)
    for part, coefficient in zip(parts, coefficients, strict=True):
        own = part.x @ coefficient[:, 0]
        scores[part.rows] = (own - own.mean()) / max(float(own.std()), 1e-300)
    method = permutation_method(groups, permutations, clusters)
    log10_p = permutation_log10_p(count, permutations)
    return LearnedResult(t, log10_p, method, scores[:n], scores[n:])


@dataclass(frozen=True)
class _Fold:
    rows: NDArray[np.bool_]  # (N,)
    x: Floats  # (N_k, F)
    ids: NDArray[np.intp]  # (N_k,)
    gram: Floats  # (F, F)


def _fold(x: Floats, rows: NDArray[np.bool_], ids: NDArray[np.intp]) -> _Fold:
    own = x[rows]
    return _Fold(rows, own, ids[rows], own.T @ own)


def _features(candidate: ArrayLike, reference: ArrayLike) -> tuple[Floats, int]:
    """Pooled ranks of the features (n + m, F) in (-1, 1), and n."""
    sides = [np.asarray(side, dtype=np.float64) for side in (candidate, reference)]
    for side, name in zip(sides, ("candidate", "reference"), strict=True):
        if side.ndim != 2 or not side.size:
            raise InputError(f"{name} features have shape {side.shape}: give a matrix (N, F)")
        if not np.isfinite(side).all():
            raise InputError(f"{name} features hold NaN or infinity: check how they were made")
    if sides[0].shape[1] != sides[1].shape[1]:
        raise InputError(
            f"candidates have {sides[0].shape[1]} features and references {sides[1].shape[1]}: "
            "give the same ones"
        )
    pooled = np.concatenate(sides)
    # Ranks over both sides ignore the labels, so they keep the null exact, and outliers harmless.
    ranks: Floats = (stats.rankdata(pooled, axis=0) - (len(pooled) + 1) / 2) / (len(pooled) / 2)
    if not ranks.any():
        raise InputError("every feature is constant: give features that differ between images")
    return ranks, len(sides[0])


def _statistic(
    parts: list[_Fold], inverses: list[Floats], labels: NDArray[np.int8] | Floats
) -> tuple[Floats, list[Floats]]:
    """Pooled t (b,) and each fold's coefficients (F, b), for cluster labels (b, C).

    All moments of the out-of-fold scores follow from each fold's X'y and X'X: the scores
    themselves are never formed.
    """
    of_items = [labels[:, part.ids].astype(np.float64) for part in parts]
    n_in = [y.sum(1) for y in of_items]
    share = np.sum(n_in, axis=0) / sum(len(part.x) for part in parts)
    sums_in = [part.x.T @ y.T for part, y in zip(parts, of_items, strict=True)]
    sums = [part.x.sum(0)[:, None] for part in parts]
    products = [s_in - s * share for s_in, s in zip(sums_in, sums, strict=True)]
    whole = np.sum(products, axis=0)

    t = np.zeros(len(labels))
    coefficients = []
    for k, part in enumerate(parts):
        coefficient = inverses[k] @ (whole - products[k])
        coefficients.append(coefficient)
        size = len(part.x)
        n_out = size - n_in[k]
        total = (coefficient * sums[k]).sum(0)
        total_in = (coefficient * sums_in[k]).sum(0)
        variance = (coefficient * (part.gram @ coefficient)).sum(0) / size - (total / size) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            gap = total_in / n_in[k] - (total - total_in) / n_out
            own = gap / np.sqrt(variance * (1 / n_in[k] + 1 / n_out))
        # A fold that holds one label only, or constant scores, says nothing.
        t += np.where(np.isfinite(own), own, 0.0)
    return t / math.sqrt(len(parts)), coefficients
