"""Bootstrap over utterances or speakers: frames of one utterance are not independent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from numpy.typing import ArrayLike

DRAWS = 2000


def ratio_interval(
    above: ArrayLike,
    below: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    draws: int = DRAWS,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of sum(above) / sum(below), drawing groups anew.

    Args:
        above: (N,) of each utterance, such as its right frames.
        below: (N,), such as its frames.
        groups: Of each utterance; those of one group are drawn together. None: each is its own.
        draws: How often all groups are drawn, with replacement.
        confidence: Coverage, between 0 and 1.
        seed: For the draws.

    Returns:
        low and high; NaN where there are fewer than two groups.
    """
    a, b = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    if groups is not None:
        numbers: dict[Hashable, int] = {}
        place = [numbers.setdefault(group, len(numbers)) for group in groups]
        a, b = (np.bincount(place, values, len(numbers)).astype(np.float64) for values in (a, b))
    if len(a) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    ratios = np.empty(draws)
    for i in range(draws):
        drawn = rng.integers(len(a), size=len(a))
        total = b[drawn].sum()
        ratios[i] = a[drawn].sum() / total if total else np.nan
    low, high = np.nanquantile(ratios, ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)
