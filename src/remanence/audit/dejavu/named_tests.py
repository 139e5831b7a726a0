"""The tests of whether candidates score higher than held-out references, by name."""

from dataclasses import dataclass
from typing import Literal, get_args

from numpy.typing import ArrayLike

from remanence.audit.dejavu.kolmogorov_smirnov import Alternative, ks_two_sample
from remanence.audit.dejavu.learned_test import learned_test
from remanence.audit.dejavu.rank_test import mann_whitney
from remanence.audit.dejavu.scores import Floats, Groups, as_scores
from remanence.errors import InputError

Test = Literal["ks", "ks1", "mw", "mw_loss", "calibrated", "learned"]

RANKED = {
    "mw": "AUC of confidence",
    "mw_loss": "AUC of the label's margin",
    "calibrated": "AUC of calibrated scores",
}


@dataclass(frozen=True)
class Outcome:
    """What one test found.

    Attributes:
        statistic: Its name.
        value: Its value.
        log10_p: Decimal logarithm of the p-value.
        method: How the p-value was computed.
        scores: Candidate and reference scores behind it; out-of-fold ones for the learned test.
    """

    statistic: str
    value: float
    log10_p: float
    method: str
    scores: tuple[Floats, Floats]


def run_test(
    test: Test,
    candidate: ArrayLike,
    reference: ArrayLike,
    *,
    groups: Groups | None = None,
    permutations: int = 2000,
    seed: int = 0,
) -> Outcome:
    """Run one test by name.

    Args:
        test: "ks": two-sided Kolmogorov-Smirnov on label-free confidence. "ks1": the same,
            one-sided. "mw": rank test on confidence. "mw_loss": rank test on the margin of the true
            label. "calibrated": rank test on scores calibrated by reference models. "learned":
            cross-fitted regressor on features.
        candidate: The scores that the test's name asks for (n,), or features (n, F).
        reference: The same for references, (m,) or (m, F).
        groups: Cluster names of the candidates (n,) and references (m,).
        permutations: How many, where the test permutes.
        seed: For the permutations.

    Raises:
        InputError: The test is unknown, or its input unusable.
    """
    if test not in get_args(Test):
        raise InputError(f"test {test!r} is unknown: give one of {', '.join(get_args(Test))}")
    if test == "learned":
        learned = learned_test(
            candidate, reference, groups=groups, permutations=permutations, seed=seed
        )
        scores = learned.candidate, learned.reference
        return Outcome("out-of-fold t", learned.t, learned.log10_p, learned.method, scores)
    scores = as_scores(candidate, "candidate"), as_scores(reference, "reference")
    if test in RANKED:
        ranks = mann_whitney(*scores, groups=groups, permutations=permutations, seed=seed)
        return Outcome(RANKED[test], ranks.auc, ranks.log10_p, ranks.method, scores)
    side = alternative(test)
    ks = ks_two_sample(*scores, side, groups=groups, permutations=permutations, seed=seed)
    name = "one-sided KS distance" if test == "ks1" else "KS distance"
    return Outcome(name, ks.d, ks.log10_p, ks.method, scores)


def alternative(test: Test) -> Alternative:
    """Return what a Kolmogorov-Smirnov test looks for."""
    return "greater" if test == "ks1" else "two-sided"
