"""What a number of samples can show, said before any score is seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import optimize, special, stats

from remanence.audit.membership.roc import MIN_SIDE, allowed_errors, check_rate
from remanence.errors import InputError


@dataclass(frozen=True)
class Power:
    """What a number of samples can show.

    Attributes:
        n_member: Number of members.
        n_nonmember: Number of non-members.
        level: Significance level of the one-sided tests.
        power: Chance of detection at the figures below.
        auc: Smallest AUC that the rank test detects.
        fprs: The false positive rates asked for.
        tpr: Smallest TPR detected at each, above what no attack at all would give.
        hits_needed: Members above all but floor(fpr n_nonmember) non-members that make the TPR
            significant, at each.
    """

    n_member: int
    n_nonmember: int
    level: float
    power: float
    auc: float
    fprs: tuple[float, ...]
    tpr: tuple[float, ...]
    hits_needed: tuple[int, ...]

    def __str__(self) -> str:
        rates = ", ".join(
            f"a TPR of {tpr:.2%} at an FPR of {fpr:.4g}"
            for fpr, tpr in zip(self.fprs, self.tpr, strict=True)
        )
        return (
            f"{self.n_member:,} members and {self.n_nonmember:,} non-members detect an AUC of "
            f"{self.auc:.3f}{', or ' if rates else ''}{rates} with {self.power:.0%} power at level "
            f"{self.level:g}."
        )


def power_statement(
    n_member: int,
    n_nonmember: int,
    fprs: Sequence[float] = (1e-3, 1e-2, 1e-1),
    *,
    level: float = 0.05,
    power: float = 0.8,
) -> Power:
    """Smallest effects that this many samples detect, before any score is seen.

    AUC: normal law of the rank test, with the variance of Hanley and McNeil (Radiology 143, 1982)
    under the alternative. TPR: of exchangeable samples, the number of members above the (j + 1)-th
    highest non-member is beta-binomial(n_member, j + 1, n_nonmember - j), which fixes how many
    are significant; the TPR is that at which so many are reached with the power asked for.

    Args:
        n_member: Number of members, at least 30.
        n_nonmember: Number of non-members, at least 30.
        fprs: False positive rates, each in [0, 1).
        level: Significance level, in (0, 0.5).
        power: Chance of detection, in (0.5, 1).

    Returns:
        The smallest AUC and TPRs.

    Raises:
        InputError: A figure is out of range.
    """
    n, k = n_member, n_nonmember
    if min(n, k) < MIN_SIDE:
        raise InputError(f"give at least {MIN_SIDE} samples a side; there are {min(n, k)}")
    if not (0 < level < 0.5 < power < 1):
        raise InputError(f"level {level}, power {power}: give 0 < level < 0.5 < power < 1")
    null_reach = float(special.ndtri(1 - level)) * math.sqrt((n + k + 1) / (12 * n * k))

    def surplus(auc: float) -> float:
        q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
        spread = auc * (1 - auc) + (n - 1) * (q1 - auc**2) + (k - 1) * (q2 - auc**2)
        return auc - 0.5 - null_reach - float(special.ndtri(power)) * math.sqrt(spread / (n * k))

    hits, tprs = [], []
    for fpr in fprs:
        check_rate(fpr)
        j = min(allowed_errors(fpr, k), k - 1)
        law = stats.betabinom(n, j + 1, k - j)
        needed = min(int(law.isf(level)) + 1, n)
        hits.append(needed)
        tprs.append(float(special.betaincinv(needed, n - needed + 1, power)))
    return Power(
        n_member=n,
        n_nonmember=k,
        level=level,
        power=power,
        auc=float(optimize.brentq(surplus, 0.5, 1.0)),
        fprs=tuple(fprs),
        tpr=tuple(tprs),
        hits_needed=tuple(hits),
    )
