"""How many bits of an arbitrary set a network holds, and what to compare that with.

To store which n of N images are "in" takes log2 C(N, n) bits. A network that answers with errors
holds less: the mutual information between membership and its answer (arXiv 1809.06396).
"""

import math

from remanence.errors import InputError

PERCEPTRON_BITS_PER_WEIGHT = 2.0
"""Random labels that a perceptron learns, per weight (Cover 1965; MacKay 2003, chapter 40)."""

LANGUAGE_MODEL_BITS_PER_PARAMETER = 3.6
"""Bits of random strings that GPT-style models hold, per parameter (arXiv 2505.24832)."""


def binary_entropy(p: float) -> float:
    """Entropy in bits of an event of probability `p`; 0 at p = 0 and p = 1."""
    if p <= 0 or p >= 1:
        return 0.0
    return -(p * math.log2(p) + (1 - p) * math.log1p(-p) / math.log(2))


def stored_bits(n: int, N: int, tpr: float, fpr: float) -> float:
    """Mutual information between membership and the network's answers, summed over N images.

    With p = n / N and q = p tpr + (1 - p) fpr the share of answers "in",

        bits = N [h(q) - p h(tpr) - (1 - p) h(fpr)]

    which takes members as independent draws. As exactly n of N are in, it can exceed
    `set_bits(N, n)` by a few bits where the network is near perfect: report the smaller of the two.

    Args:
        n: images in the set.
        N: images in the pool that the network saw, those in the set among them.
        tpr: share of the set that is answered "in".
        fpr: share of the rest of the pool that is answered "in".

    Returns:
        Bits, in [0, N h(n / N)]; 0 when `tpr` equals `fpr`.

    Raises:
        InputError: `n` is not in [0, N], or a rate is not in [0, 1].
    """
    _check_set(N, n)
    for name, rate in (("tpr", tpr), ("fpr", fpr)):
        _check_rate(name, rate)
    p = n / N
    q = p * tpr + (1 - p) * fpr
    bits = N * (binary_entropy(q) - p * binary_entropy(tpr) - (1 - p) * binary_entropy(fpr))
    return max(bits, 0.0)


def set_bits(N: int, n: int) -> float:
    """Bits that name a set of `n` out of `N` images: log2 of the binomial coefficient.

    Raises:
        InputError: `n` is not in [0, N].
    """
    _check_set(N, n)
    return (math.lgamma(N + 1) - math.lgamma(n + 1) - math.lgamma(N - n + 1)) / math.log(2)


def bloom_bits(n: int, fpr: float) -> float:
    """Bits of a Bloom filter that holds `n` elements: n log2(1 / fpr) / ln 2, 9.59 each at 1%.

    Raises:
        InputError: `n` is negative, or `fpr` is not in (0, 1].
    """
    if n < 0:
        raise InputError(f"a set of {n} elements does not exist: give n >= 0")
    if not 0 < fpr <= 1:
        raise InputError(f"a Bloom filter with false positive rate {fpr}: give a rate in (0, 1]")
    return n * math.log2(1 / fpr) / math.log(2)


def perceptron_bits(n_weights: int) -> float:
    """Random labels that a perceptron of `n_weights` weights learns, in bits: two a weight."""
    return PERCEPTRON_BITS_PER_WEIGHT * n_weights


def _check_set(N: int, n: int) -> None:
    if N < 1 or not 0 <= n <= N:
        raise InputError(f"a set of {n} out of {N} images does not exist: give 0 <= n <= N, N >= 1")


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise InputError(f"{name} {rate} is not a rate: give a number in [0, 1]")
