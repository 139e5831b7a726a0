"""Was this model trained on the marked images? Tests with an exact null (arXiv 2002.00937).

Section 3.3 of the paper: the rows of a head trained on marked images lean towards the carriers.
For a model that is independent of the carriers, each cosine is that of a uniform direction with
a fixed one, so its p-value is exact whatever the head is, and Fisher combines the classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from remanence.audit.evidence import Estimate, Evidence
from remanence.audit.radioactive.alignment import Alignment
from remanence.audit.radioactive.head import PreparedHead, Provenance, prepare_head
from remanence.audit.radioactive.null import (
    cosine_logp,
    fisher_logp,
    holm_logp,
    min_mean_cosine,
    plan,
    stouffer_logp,
)
from remanence.errors import InputError

Floats = NDArray[np.float64]

LN10 = math.log(10)


@dataclass(frozen=True)
class Detection:
    """The outcome of one test of a head against one set of carriers.

    Attributes:
        classes: (K,) the owner's classes that were tested.
        cosines: (K,) between the aligned rows and the carriers.
        log_p: (K,) natural logarithms of their one-sided p-values.
        d_eff: dimension of the null: the carriers', less the rank of the reference heads.
        mean_cosine: mean of `cosines`.
        log10_p: Fisher's exact combination; never -inf.
        stouffer_log10_p: the sum statistic's, approximate.
        evidence: the question, the answer and what it rests on.
    """

    classes: NDArray[np.int64]
    cosines: Floats
    log_p: Floats
    d_eff: int
    mean_cosine: float
    log10_p: float
    stouffer_log10_p: float
    evidence: Evidence


def detect_whitebox(
    weight: Tensor,
    alignment: Alignment | None,
    carriers: ArrayLike,
    *,
    reference: Sequence[Tensor] = (),
    class_map: ArrayLike | None = None,
    center: bool = False,
    provenance: Provenance | None = None,
    level: float = 0.05,
) -> Detection:
    """Test the weights of a suspect's last linear layer against the carriers.

    Args:
        weight: (C, t) the suspect's last linear layer.
        alignment: from the marking network's features to the suspect's on clean images; None
            where the suspect is a head on the marking network itself.
        carriers: (K, d) the carriers of the marked classes.
        reference: aligned heads (C', d) of clean models, all classes. Carriers and head are
            projected on the complement of their span, where the ordinary class directions, which
            carry no mark, are gone; the null stays exact in d - rank dimensions.
        class_map: (K,) the suspect's class for each of the owner's, -1 for none; the identity by
            default. Made without looking at the carriers, as `match_classes` does.
        center: subtract the mean row first; to compare with log-probabilities.
        provenance: what is known of carriers, images and references; nothing by default.
        level: significance level, fixed beforehand.

    Returns:
        The detection.

    Raises:
        InputError: shapes do not match, a class map has a class that the suspect lacks, a row of
            the head vanishes, or the references span more than half of the dimensions.
    """
    head = weight.detach().double() if alignment is None else alignment.align(weight)
    prepared = prepare_head(
        head,
        alignment=alignment,
        reference=reference,
        class_map=class_map,
        center=center,
        provenance=provenance,
    )
    return detect(prepared, carriers, level=level)


def detect_logits(
    alignment: Alignment,
    carriers: ArrayLike,
    *,
    reference: Sequence[Tensor] = (),
    class_map: ArrayLike | None = None,
    center: bool | Literal["auto"] = "auto",
    provenance: Provenance | None = None,
    level: float = 0.05,
) -> Detection:
    """Test a suspect of which only outputs are known: the same head without its weights.

    The regression of logits on the marking network's features is the aligned head, so the test is
    the white-box test, equal to it digit for digit. Temperature does not matter.

    Args:
        alignment: fitted with the suspect's logits or log-probabilities as targets. Probabilities
            work too but weakly: give their logarithms.
        carriers: as in `detect_whitebox`, and so are the following.
        reference: aligned heads of clean models.
        class_map: the suspect's class for each of the owner's.
        center: subtract the mean row; "auto" does so for log-probabilities.
        provenance: what is known of carriers, images and references.
        level: significance level, fixed beforehand.

    Returns:
        The detection.

    Raises:
        InputError: as in `detect_whitebox`.
    """
    prepared = prepare_head(
        alignment.head,
        alignment=alignment,
        reference=reference,
        class_map=class_map,
        center=alignment.log_probs if center == "auto" else center,
        provenance=provenance,
    )
    return detect(prepared, carriers, level=level)


def detect(head: PreparedHead, carriers: ArrayLike, *, level: float = 0.05) -> Detection:
    """Test a prepared head against one set of carriers.

    Args:
        head: from `prepare_head`.
        carriers: (K, d).
        level: significance level, fixed beforehand.

    Returns:
        The detection.

    Raises:
        InputError: the carriers do not fit the head.
    """
    cosines = head.cosines(carriers)
    log_p = cosine_logp(cosines, head.d_eff)
    log10_p = float(fisher_logp(log_p)) / LN10
    mean, K = float(cosines.mean()), len(cosines)
    half = min_mean_cosine(K, head.d_eff, 0.025)
    evidence = Evidence(
        question="Was this model trained on the marked images?",
        statistic=f"Fisher's chi-squared over {K} classes",
        value=-2 * float(log_p.sum()),
        null="The model is independent of the carriers: it never saw the marked images.",
        log10_p=log10_p,
        method="exact",
        would_change=_would_change(log10_p, mean, K, head.d_eff, level),
        level=level,
        estimates=(Estimate("mean cosine", mean, mean - half, mean + half),),
        checks=head.checks,
    )
    stouffer = stouffer_logp(cosines, head.d_eff) / LN10
    return Detection(head.classes, cosines, log_p, head.d_eff, mean, log10_p, stouffer, evidence)


def _would_change(log10_p: float, mean: float, K: int, d: int, level: float) -> str:
    made = plan(K, d, p=level, mean_cosine=min(max(mean, -0.999), 0.999))
    threshold = f"a mean cosine of about {made.min_mean_cosine:.2g}"
    if log10_p <= math.log10(level):
        return f"Below {threshold}, with {K} classes in {d} dimensions, nothing would be detected."
    needed = f"{threshold[0].upper()}{threshold[1:]} would be detected"
    if made.classes_needed is None:
        return f"{needed}; here the head leans away from the carriers, if at all."
    return (
        f"{needed}; the one found, {mean:.2g}, would take about {made.classes_needed} classes, or "
        f"{made.dim_needed} dimensions."
    )


@dataclass(frozen=True)
class RecipientDetection:
    """Which recipient's copy the suspect was trained on.

    Attributes:
        detections: recipient -> their own detection; its evidence carries the corrected p.
        found: recipients detected after Holm's correction, strongest first.
        evidence: the strongest recipient's, as the answer to "which one?".
    """

    detections: dict[str, Detection]
    found: tuple[str, ...]
    evidence: Evidence


def detect_recipients(
    test: Callable[[Floats], Detection], recipients: Mapping[str, Floats]
) -> RecipientDetection:
    """Test the carriers of every recipient and correct for their number (Holm).

    Args:
        test: one test of the suspect, for example
            `lambda carriers: detect_logits(alignment, carriers)`.
        recipients: recipient -> carriers (K, d), independent of each other.

    Returns:
        The detections with corrected p-values.

    Raises:
        InputError: there is no recipient, or two have the same carriers.
    """
    names = list(recipients)
    if not names:
        raise InputError("there are no recipients: give at least one")
    owner_of: dict[bytes, str] = {}
    for name in names:
        if (other := owner_of.setdefault(np.asarray(recipients[name]).tobytes(), name)) != name:
            raise InputError(f"{other} and {name} have the same carriers: give each their own key")
    raw = {name: test(recipients[name]) for name in names}
    corrected = holm_logp([raw[name].log10_p * LN10 for name in names]) / LN10
    detections = {
        name: replace(
            raw[name],
            evidence=replace(
                raw[name].evidence,
                question=f"Was this model trained on {name}'s copy?",
                method=f"exact, Holm's correction for {len(names)} recipients",
                corrected_log10_p=float(value),
            ),
        )
        for name, value in zip(names, corrected, strict=True)
    }
    strongest = sorted(names, key=lambda name: raw[name].log10_p)
    found = tuple(n for n in strongest if detections[n].evidence.verdict == "detected")
    return RecipientDetection(detections, found, detections[strongest[0]].evidence)
