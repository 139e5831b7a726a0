"""Was a data set, or a part of it, trained on? One declared test and its evidence.

Candidates are compared with held-out references *of the same source*, never with another data
set: different content differs in confidence whatever the training set was.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from remanence.audit.dejavu.fraction import leaked_fraction
from remanence.audit.dejavu.kolmogorov_smirnov import Alternative, ks_two_sample
from remanence.audit.dejavu.leak import (
    images_needed,
    min_detectable_fraction,
    min_detectable_fraction_by_rank,
)
from remanence.audit.dejavu.learned_test import learned_test
from remanence.audit.dejavu.rank_test import auc_interval, mann_whitney
from remanence.audit.dejavu.scores import Floats, Groups, as_scores, pooled_clusters
from remanence.audit.evidence import Check, Evidence
from remanence.errors import InputError

Test = Literal["ks", "ks1", "mw", "mw_loss", "calibrated", "learned"]
Pair = tuple[ArrayLike, ArrayLike]

FEWEST = 20
RANKED = {
    "mw": "AUC of confidence",
    "mw_loss": "AUC of the label's margin",
    "calibrated": "AUC of calibrated scores",
}
QUESTION = "Was the model trained on the candidates, or on a part of them?"
NULL = "candidates and references are exchangeable: the model saw neither in training"
UNMENDED = "a reference from another source than the candidates would void any verdict"


@dataclass(frozen=True)
class Detection:
    """The declared test and, for information, others.

    Attributes:
        primary: The evidence; only its verdict counts.
        exploratory: Tests that were not declared as primary; their questions say so. Choosing among
            them after the fact would accuse too often.
    """

    primary: Evidence
    exploratory: tuple[Evidence, ...] = ()


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
    side = _alternative(test)
    ks = ks_two_sample(*scores, side, groups=groups, permutations=permutations, seed=seed)
    name = "one-sided KS distance" if test == "ks1" else "KS distance"
    return Outcome(name, ks.d, ks.log10_p, ks.method, scores)


def detect(
    candidate: ArrayLike,
    reference: ArrayLike,
    *,
    test: Test = "ks1",
    exploratory: Mapping[Test, Pair] | None = None,
    known_members: ArrayLike | None = None,
    groups: Groups | None = None,
    checks: tuple[Check, ...] = (),
    confidences: bool = False,
    level: float = 0.05,
    permutations: int = 2000,
    seed: int = 0,
) -> Detection:
    """Test whether the model was trained on (part of) the candidates.

    The default is the paper's Kolmogorov-Smirnov test, in the direction in which training moves
    confidences. With labels, "mw_loss" finds about half as large a leak. Fix the test, the level
    and the reference before looking at the scores; a reference that served for early stopping or
    for choosing a threshold is not held out.

    Args:
        candidate: Scores (n,), higher = more member-like, or features (n, F) for "learned".
        reference: Scores (m,) or features (m, F) of held-out images of the same source.
        test: The declared test, see `run_test`.
        exploratory: Other tests with their own candidate and reference scores, in the same order of
            images.
        known_members: Scores (k,) of known training images of the same source: they give the
            leaked fraction and the smallest detectable one.
        groups: Cluster names of the candidates (n,) and references (m,), for dependent images.
        checks: The exchangeability checks that the caller ran; a failed one voids the verdict.
        confidences: The scores are softmax confidences, in [0, 1].
        level: Significance level.
        permutations: How many, where a test permutes.
        seed: For every random step.

    Returns:
        The declared test's evidence and the exploratory ones.

    Raises:
        InputError: Fewer than 20 images or groups a side, scores that are constant, not finite or
            not confidences, an exploratory test equal to the declared one, or known members with
            "learned".
    """
    others = dict(exploratory or {})
    if test in others:
        raise InputError(
            f"test {test!r} is the declared one: leave it out of the exploratory tests"
        )
    if known_members is not None and test == "learned":
        raise InputError("a leaked fraction needs scores, not features: leave out known_members")
    if confidences:
        known = [] if known_members is None else [known_members]
        for scores in (candidate, reference, *known):
            _check_confidences(np.asarray(scores, dtype=np.float64))
    how = groups, checks, level, permutations, seed
    primary = gather_evidence(test, (candidate, reference), *how)
    estimates = primary.estimates
    if known_members is None:
        power = "known training images would tell the smallest leak that this test can find"
    else:
        members = as_scores(known_members, "member")
        _check_scores(members, len(members), "member")
        power = _power(test, candidate, reference, members, groups, level)
        three = (None, None, None) if groups is None else (*groups, None)
        try:
            fraction = leaked_fraction(candidate, reference, members, groups=three, seed=seed)
            estimates = (*estimates, fraction)
        except InputError as error:
            # Members that score like the references leave the fraction undefined, not the test.
            power = f"{power}; no leaked fraction: {error}"
    return Detection(
        replace(primary, estimates=estimates, would_change=sentence(power, UNMENDED)),
        tuple(_explore(name, pair, *how) for name, pair in others.items()),
    )


def gather_evidence(
    test: Test,
    pair: Pair,
    groups: Groups | None,
    checks: tuple[Check, ...],
    level: float,
    permutations: int,
    seed: int,
) -> Evidence:
    """Run one test on checked input; what would change the verdict is left to the caller."""
    if not 0 < level < 1:
        raise InputError(f"level {level} is out of range: give a number between 0 and 1")
    sides = [np.asarray(side, dtype=np.float64) for side in pair]
    if min(side.ndim for side in sides) == 0:
        raise InputError("scores are single numbers: give one score an image, (N,)")
    is_candidate = pooled_clusters(groups, len(sides[0]), len(sides[1]))[1]
    units = int(is_candidate.sum()), int((~is_candidate).sum())
    for side, unit, name in zip(sides, units, ("candidate", "reference"), strict=True):
        _check_scores(side, unit, name)
    outcome = run_test(test, *pair, groups=groups, permutations=permutations, seed=seed)
    # Out-of-fold scores depend on one another through the fits: DeLong's interval is too narrow.
    estimates = () if test == "learned" else (auc_interval(*outcome.scores, groups=groups),)
    return Evidence(
        question=QUESTION,
        statistic=outcome.statistic,
        value=outcome.value,
        null=NULL,
        log10_p=outcome.log10_p,
        method=outcome.method,
        would_change="",
        level=level,
        estimates=estimates,
        checks=checks,
    )


def _explore(
    test: Test,
    pair: Pair,
    groups: Groups | None,
    checks: tuple[Check, ...],
    level: float,
    permutations: int,
    seed: int,
) -> Evidence:
    return replace(
        gather_evidence(test, pair, groups, checks, level, permutations, seed),
        question=f"Exploratory, not the declared test: {QUESTION}",
        would_change="Declare this test before new data are seen, and repeat it on them.",
    )


def _power(
    test: Test,
    candidate: ArrayLike,
    reference: ArrayLike,
    members: Floats,
    groups: Groups | None,
    level: float,
) -> str:
    """What the known members tell about the smallest leak that the test can find."""
    is_candidate = pooled_clusters(groups, len(np.asarray(candidate)), len(np.asarray(reference)))[
        1
    ]
    m, n = int(is_candidate.sum()), int((~is_candidate).sum())
    useless = "the known members score no higher than the references, so no leak could be found"
    advice = ""
    if test in RANKED:
        auc_full = mann_whitney(members, reference).auc
        if auc_full <= 0.5:
            return useless
        smallest = min_detectable_fraction_by_rank(auc_full, m, n, level)
    else:
        side = _alternative(test)
        d_full = ks_two_sample(members, reference, side, "asymptotic").d
        if d_full <= 0:
            return useless
        smallest = min_detectable_fraction(d_full, m, n, level, side)
        target = min(1.0, smallest) / 2
        needed = images_needed(d_full, target, level, 0.8, side)
        advice = f"; {needed:,} images a side would find {target:.1%} four times in five"
    if smallest > 1:
        return f"with {m:,} candidates and {n:,} references not even a full leak is found" + advice
    return f"leaks below {smallest:.1%} may be missed" + advice


def _alternative(test: Test) -> Alternative:
    return "greater" if test == "ks1" else "two-sided"


def sentence(*parts: str) -> str:
    """Join clauses into one sentence."""
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _check_scores(scores: Floats, units: int, name: str) -> None:
    if units < FEWEST:
        of = "" if units == len(scores) else "independent groups of "
        raise InputError(f"give at least {FEWEST} {of}{name} images; there are {units}")
    if not np.isfinite(scores).all():
        raise InputError(f"{name} scores hold NaN or infinity: check the model's output")
    if scores.ndim == 1 and scores.min() == scores.max():
        raise InputError(
            f"{name} scores are all {scores[0]:g}: give scores that differ, such as top margins"
        )


def _check_confidences(scores: Floats) -> None:
    if not ((scores >= 0) & (scores <= 1)).all():
        raise InputError("confidences lie outside [0, 1]: give softmax outputs, or top margins")
