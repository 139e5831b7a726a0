"""What a test could find, given some known training images: its smallest leak, images needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from numpy.typing import ArrayLike
from scipy import special

from remanence.audit.dejavu.kolmogorov_smirnov import ks_two_sample
from remanence.audit.dejavu.leak import (
    images_needed,
    min_detectable_fraction,
    min_detectable_fraction_by_rank,
)
from remanence.audit.dejavu.named_tests import RANKED, Test, alternative
from remanence.audit.dejavu.rank_test import mann_whitney
from remanence.errors import InputError

LEAKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Power:
    """What a test could find.

    Attributes:
        separation: D of known members against references, or their AUC for a rank test.
        smallest: Leaked fraction that is found about every second time; above 1, not even a full
            leak is. None where known members score no higher than references.
        needed: For each leaked fraction, images a side that find it four times in five.
    """

    separation: float
    smallest: float | None
    needed: dict[float, int]


def detectable(
    test: Test,
    m: int,
    n: int,
    members: ArrayLike,
    reference: ArrayLike,
    *,
    level: float = 0.05,
    leaks: Sequence[float] = LEAKS,
) -> Power:
    """Ask what a test could find.

    Args:
        test: Any but "learned", as in `detect`.
        m: Number of candidates, or of their groups.
        n: Number of references, or of their groups.
        members: Scores (k,) of known training images.
        reference: Scores (r,) of held-out images.
        level: Level of the test.
        leaks: Fractions for which to tell the images needed.

    Raises:
        InputError: The test is "learned", or scores are empty or not finite.
    """
    if test == "learned":
        raise InputError("the power of the learned test is not known: choose another test")
    if test in RANKED:
        auc = mann_whitney(members, reference).auc
        if auc <= 0.5:
            return Power(auc, None, {})
        return Power(
            auc,
            min_detectable_fraction_by_rank(auc, m, n, level),
            {leak: images_needed_by_rank(auc, leak, level) for leak in leaks},
        )
    side = alternative(test)
    d = ks_two_sample(members, reference, side, "asymptotic").d
    if d <= 0:
        return Power(d, None, {})
    return Power(
        d,
        min_detectable_fraction(d, m, n, level, side),
        {leak: images_needed(d, leak, level, 0.8, side) for leak in leaks},
    )


def images_needed_by_rank(
    auc_full: float, f: float, alpha: float = 0.05, power: float = 0.8
) -> int:
    """Images a side with which the one-sided rank test finds a leaked fraction f.

    Noether (1987): the AUC has mean 1/2 + f (AUC_full - 1/2) and, for the small leaks that matter,
    the standard deviation of the null, sqrt((2 m + 1) / (12 m^2)).

    Args:
        auc_full: AUC of known training images against held-out ones, in (0.5, 1].
        f: Leaked fraction, in (0, 1].
        alpha: Level of the test.
        power: Probability of finding the leak, in [0.5, 1).

    Returns:
        m = n, the number of candidates and of references.

    Raises:
        InputError: An argument is out of range.
    """
    if not (0.5 < auc_full <= 1 and 0 < f <= 1 and 0 < alpha < 1 and 0.5 <= power < 1):
        raise InputError(
            f"AUC {auc_full}, fraction {f}, level {alpha}, power {power}: give an AUC in (0.5, 1], "
            "a fraction in (0, 1], a level in (0, 1) and a power in [0.5, 1)"
        )
    shift = f * (auc_full - 0.5)
    sigmas = (float(special.ndtri(power)) - float(special.ndtri(alpha))) / shift
    # (2 m + 1) / (12 m^2) = 1 / sigmas^2, solved for m.
    return math.ceil((sigmas**2 + sigmas * math.sqrt(sigmas**2 + 12)) / 12)
