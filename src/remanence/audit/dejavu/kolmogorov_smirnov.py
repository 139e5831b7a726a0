"""The two-sample Kolmogorov-Smirnov test, the statistic of Deja Vu (arXiv 1809.06396).

    D = sup_x |F_a(x) - F_b(x)|,      D+ = sup_x (F_b(x) - F_a(x)),

with right-continuous empirical distribution functions. Counts are compared as integers, so that
equal distances are equal whatever the rounding.

"greater" means that the first sample, the candidate, is stochastically larger, as members' scores
are. (SciPy names the alternatives by the distribution functions, the other way round.)
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
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
from remanence.errors import InputError

Alternative = Literal["greater", "less", "two-sided"]
Method = Literal["auto", "exact", "asymptotic", "permutation"]
Integers = NDArray[np.int64]

EXACT_LIMIT = 10_000
TIE_LIMIT = 0.01


@dataclass(frozen=True)
class KSResult:
    """A Kolmogorov-Smirnov test.

    Attributes:
        d: The distance, in [0, 1].
        location: The lowest score at which it is reached.
        sign: +1 where the first sample is larger there (F_b > F_a), -1 where it is smaller.
        log10_p: Decimal logarithm of the p-value, never -inf.
        method: How the p-value was computed.
    """

    d: float
    location: float
    sign: int
    log10_p: float
    method: str


def ks_two_sample(
    a: ArrayLike,
    b: ArrayLike,
    alternative: Alternative = "two-sided",
    method: Method = "auto",
    groups: Groups | None = None,
    permutations: int = 2000,
    seed: int = 0,
) -> KSResult:
    """Test whether two samples come from one distribution.

    `auto` permutes where groups are given, where more than 1% of the pooled scores repeat an
    earlier one, or where a small sample has any tie; else it is exact for n m <= 10,000 and
    asymptotic above.

    Args:
        a: Candidate scores (n,).
        b: Reference scores (m,).
        alternative: "greater" for candidates that are stochastically larger, "less", "two-sided".
        method: How to compute the p-value.
        groups: Cluster names of the candidates (n,) and references (m,); clusters are permuted as
            wholes, and keep their sizes.
        permutations: How many, for the permutation p-value (1 + #) / (1 + permutations).
        seed: For the permutations.

    Returns:
        Distance, where it is reached, and the p-value.

    Raises:
        InputError: Scores are empty or not finite, an argument is unknown, the exact method meets
            ties or more than n m = 10,000, or groups are given with a method that ignores them.
    """
    if alternative not in get_args(Alternative):
        raise InputError(f"alternative {alternative!r} is unknown: give {get_args(Alternative)}")
    if method not in get_args(Method):
        raise InputError(f"method {method!r} is unknown: give one of {get_args(Method)}")
    a, b = as_scores(a, "candidate"), as_scores(b, "reference")
    n, m = len(a), len(b)
    pool = np.concatenate([a, b])
    order = np.argsort(pool, kind="stable")
    ordered = pool[order]
    last = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), n + m - 1)
    counts_a = np.cumsum(order < n, dtype=np.int64)[last]
    gaps = _gaps(counts_a, last + 1, n, n + m)
    extreme = _extremes(gaps, alternative)
    at = int(extreme.argmax())
    d = int(extreme[at]) / (n * m)
    sign = 1 if gaps[at] > 0 or (gaps[at] == 0 and alternative == "greater") else -1

    tied = 1 - len(last) / (n + m)
    small = n * m <= EXACT_LIMIT
    if method == "auto":
        if groups is not None or tied > TIE_LIMIT or (small and tied):
            method = "permutation"
        else:
            method = "exact" if small else "asymptotic"
    if groups is not None and method != "permutation":
        raise InputError(f"method {method!r} ignores groups: use 'permutation' or 'auto'")

    label: str = method
    if method == "exact":
        if tied or not small:
            raise InputError(
                f"the exact p-value needs untied scores and n m <= {EXACT_LIMIT:,}: "
                "use method='permutation'"
            )
        log10_p = _exact_log10_p(a, b, alternative)
    elif method == "asymptotic":
        log10_p = _asymptotic_log10_p(d, n, m, alternative)
    else:
        ids, is_candidate = pooled_clusters(groups, n, m)
        count = 0
        generator = np.random.default_rng(seed)
        ids_in_order = ids[order]
        for labels in permuted_labels(is_candidate, permutations, n + m, generator):
            # Without groups a random permutation is as random in any order: no need to reorder.
            of_items = labels if groups is None else labels[:, ids_in_order]
            counts = np.cumsum(of_items, axis=1, dtype=np.int64)
            n_b = counts[:, -1]
            if len(last) < n + m:
                counts = counts[:, last]
            largest = _extremes(_gaps(counts, last + 1, n_b[:, None], n + m), alternative).max(1)
            # Clusters of unequal size change n: the distance is then no longer an integer / (n m).
            count += int((largest / (n_b * (n + m - n_b)) >= d * (1 - 1e-12)).sum())
        log10_p = permutation_log10_p(count, permutations)
        label = permutation_method(groups, permutations, len(is_candidate))
    return KSResult(d, float(ordered[last[at]]), sign, log10_p, label)


def _gaps(counts_a: Integers, counts: NDArray[np.intp], n: int | Integers, total: int) -> Integers:
    """(F_b - F_a) n m, an integer, from the numbers at or below each value."""
    return counts * n - counts_a * total


def _extremes(gaps: Integers, alternative: Alternative) -> Integers:
    if alternative == "two-sided":
        return np.abs(gaps)
    return gaps if alternative == "greater" else -gaps


def _exact_log10_p(a: Floats, b: Floats, alternative: Alternative) -> float:
    theirs = {"greater": "less", "less": "greater", "two-sided": "two-sided"}[alternative]
    p = stats.ks_2samp(a, b, alternative=theirs, method="exact").pvalue
    return min(0.0, math.log10(p))


def _asymptotic_log10_p(d: float, n: int, m: int, alternative: Alternative) -> float:
    n_e = n * m / (n + m)
    if alternative == "two-sided":
        # Stephens's correction of the limit law for finite samples.
        return kolmogorov_log10_sf(d * (math.sqrt(n_e) + 0.12 + 0.11 / math.sqrt(n_e)))
    # Hodges (1957), eq. 5.3, the finite-sample form of exp(-2 n_e d^2).
    high, low = max(n, m), min(n, m)
    z = math.sqrt(n_e) * d
    shift = z * (high + 2 * low) / math.sqrt(high * low * (high + low)) / 3
    return (-2 * z * z - 2 * shift) / math.log(10)


def kolmogorov_log10_sf(x: float) -> float:
    """Decimal logarithm of Q(x) = 2 sum_j (-1)^(j-1) exp(-2 j^2 x^2), finite for every x >= 0."""
    if x < 1:
        return math.log10(special.kolmogorov(x))
    rest = sum((-1) ** (j - 1) * math.exp(-2 * (j * j - 1) * x * x) for j in range(2, 6))
    return (math.log(2) - 2 * x * x + math.log1p(rest)) / math.log(10)
