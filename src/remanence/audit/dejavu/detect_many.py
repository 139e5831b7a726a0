"""Which of several data sets was trained on? One test each, and Holm's correction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from remanence.audit.dejavu.detect import UNMENDED, gather_evidence, sentence
from remanence.audit.dejavu.kolmogorov_smirnov import ks_two_sample
from remanence.audit.dejavu.leak import critical_constant
from remanence.audit.dejavu.named_tests import Test
from remanence.audit.dejavu.scores import as_scores
from remanence.audit.evidence import Check, Estimate, Evidence
from remanence.errors import InputError


def detect_many(
    sources: Sequence[tuple[str, ArrayLike, ArrayLike]],
    *,
    test: Test = "ks1",
    checks: Mapping[str, tuple[Check, ...]] | None = None,
    level: float = 0.05,
    permutations: int = 2000,
    seed: int = 0,
) -> dict[str, Evidence]:
    """Test several hypotheses "the model was trained on source j", with Holm's correction.

    Every source brings a claimed-training part and a held-out part of its own. Confidences of two
    sources are never compared. The answer is the set of sources found, possibly none.

    Args:
        sources: Name, candidate scores (n,) and reference scores (m,) of every source.
        test: The declared test, the same for all.
        checks: The exchangeability checks of every source, by name.
        level: Level of the whole family.
        permutations: How many, where a test permutes. Their p-value is at least 1 / (permutations
            + 1), which must survive the correction: give more for many sources.
        seed: For every random step.

    Returns:
        Evidence by name, with corrected p-values, and D with its interval.

    Raises:
        InputError: There is no source, a name comes twice, or a source's scores are unusable.
    """
    names = [name for name, _, _ in sources]
    if not names:
        raise InputError(
            "there is no source to test: give at least one (name, candidate, reference)"
        )
    if len(set(names)) < len(names):
        raise InputError("two sources have one name: give every source its own")
    found = {}
    for name, candidate, reference in sources:
        own = (checks or {}).get(name, ())
        try:
            evidence = gather_evidence(
                test, (candidate, reference), None, own, level, permutations, seed
            )
        except InputError as error:
            raise InputError(f"source {name!r}: {error}") from error
        estimates = evidence.estimates
        if test != "learned":
            estimates = (*estimates, distance_interval(candidate, reference))
        found[name] = replace(
            evidence,
            question=f"Was the model trained on {name}, or on a part of it?",
            estimates=estimates,
            would_change=sentence("fewer sources would weaken the correction", UNMENDED),
        )
    corrected = holm_log10([found[name].log10_p for name in names])
    return {
        name: replace(found[name], corrected_log10_p=log10_p)
        for name, log10_p in zip(names, corrected, strict=True)
    }


def holm_log10(log10_ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction of decimal log p-values, in log space."""
    order = np.argsort(log10_ps, kind="stable")
    steps = np.log10(np.arange(len(order), 0, -1)) + np.asarray(log10_ps)[order]
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 0.0)
    return [float(value) for value in corrected]


def distance_interval(
    candidate: ArrayLike, reference: ArrayLike, confidence: float = 0.95
) -> Estimate:
    """The one-sided distance D+ with the interval that inverts the Kolmogorov-Smirnov test.

    |D+ estimated - D+ true| is at most the distance of the difference of distribution functions
    from its estimate, everywhere at once; so D+ -+ c sqrt(1/n + 1/m) covers at least as often as
    stated. (A bootstrap of D+, the supremum of a noisy curve, covers too seldom.)

    Args:
        candidate: Scores (n,).
        reference: Scores (m,).
        confidence: Level of the interval.

    Raises:
        InputError: Scores are empty or not finite.
    """
    a, b = as_scores(candidate, "candidate"), as_scores(reference, "reference")
    d = ks_two_sample(a, b, "greater", "asymptotic").d
    half = critical_constant(1 - confidence) * math.sqrt(1 / len(a) + 1 / len(b))
    return Estimate("KS distance", d, max(0.0, d - half), min(1.0, d + half), confidence)
