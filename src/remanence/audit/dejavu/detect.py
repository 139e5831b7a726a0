"""Was a data set, or a part of it, trained on? One declared test and its evidence.

Candidates are compared with held-out references *of the same source*, never with another data
set: different content differs in confidence whatever the training set was.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from remanence.audit.dejavu.fraction import leaked_fraction
from remanence.audit.dejavu.named_tests import Test, run_test
from remanence.audit.dejavu.power import detectable
from remanence.audit.dejavu.rank_test import auc_interval
from remanence.audit.dejavu.scores import Floats, Groups, as_scores, pooled_clusters
from remanence.audit.evidence import Check, Evidence
from remanence.errors import InputError

Pair = tuple[ArrayLike, ArrayLike]

FEWEST = 20
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
    sizes = len(np.asarray(candidate)), len(np.asarray(reference))
    is_candidate = pooled_clusters(groups, *sizes)[1]
    m, n = int(is_candidate.sum()), int((~is_candidate).sum())
    smallest = detectable(test, m, n, members, reference, level=level, leaks=()).smallest
    if smallest is None:
        return "the known members score no higher than the references, so no leak could be found"
    half = min(1.0, smallest) / 2
    needed = detectable(test, m, n, members, reference, level=level, leaks=(half,)).needed[half]
    advice = f"; {needed:,} images a side would find {half:.1%} four times in five"
    if smallest > 1:
        return f"with {m:,} candidates and {n:,} references not even a full leak is found{advice}"
    return f"leaks below {smallest:.1%} may be missed{advice}"


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
