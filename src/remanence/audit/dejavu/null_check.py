"""How often a test accuses the innocent: held-out images against held-out images."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from remanence.audit.dejavu.scores import Floats
from remanence.audit.evidence import Estimate
from remanence.errors import InputError

Log10PTest = Callable[[Floats, Floats], float]


def null_rejections(
    scores: ArrayLike,
    test: Log10PTest,
    draws: int = 2000,
    size: int = 200,
    alpha: float = 0.05,
    seed: int = 0,
) -> Estimate:
    """Measure the false alarms of a test: both sides are drawn from the same held-out scores.

    Every draw takes 2 size different rows and calls the first half candidates. A rate whose
    interval lies above alpha means that the p-values cannot be trusted on such scores.

    Args:
        scores: Held-out scores (N,) or features (N, F), N >= 2 size.
        test: Takes two halves (size,) or (size, F), returns the decimal logarithm of a p-value.
        draws: How often to repeat.
        size: Rows a side.
        alpha: Level at which to count a rejection.
        seed: For the draws.

    Returns:
        Rejection rate with its Clopper-Pearson interval.

    Raises:
        InputError: There are fewer than 2 size rows, or a count is not positive.
    """
    pool = np.asarray(scores, dtype=np.float64)
    if draws < 1 or size < 1:
        raise InputError(f"{draws} draws of {size} images: give at least 1 of each")
    if len(pool) < 2 * size:
        raise InputError(f"two sides of {size} need {2 * size} images; there are {len(pool)}")
    generator = np.random.default_rng(seed)
    rejected = 0
    for _ in range(draws):
        pick = generator.choice(len(pool), 2 * size, replace=False)
        rejected += test(pool[pick[:size]], pool[pick[size:]]) <= math.log10(alpha)
    interval = stats.binomtest(rejected, draws).proportion_ci()
    return Estimate("rejection rate", rejected / draws, float(interval.low), float(interval.high))
