"""What the scores of `remanence audit membership` show: evidence, rates, posterior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from remanence.audit.evidence import Check, Estimate, Evidence
from remanence.audit.membership import (
    ATTACKS,
    MIN_SIDE,
    Calibrator,
    Decision,
    EpsilonBound,
    References,
    Reliability,
    Roc,
    clustered_auc,
    combine,
    decide,
    epsilon_lower_bound,
    evaluate,
    mann_whitney_log10_p,
    power_statement,
    reliability,
)
from remanence.errors import InputError
from remanence.jobs.audit.membership_attacks import FURTHER
from remanence.jobs.audit.membership_samples import Samples
from remanence.kit.progress import track

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Labels = NDArray[np.int64]
Source = Literal["references", "a half of the samples", "nothing"]


@dataclass(frozen=True, eq=False)
class Units:
    """What is counted: samples, or groups of them.

    Attributes:
        rows: (M,) rows of the samples that are evaluated.
        member: (U,) True for members.
        labels: (U,) class of each unit, or None where there are no true labels or a group has
            several classes.
        groups: (M,) names; None where every sample counts for itself.
    """

    rows: NDArray[np.int64]
    member: Bools
    labels: Labels | None
    groups: NDArray[np.str_] | None

    def __len__(self) -> int:
        return len(self.member)

    def gather(self, scores: Floats, member: Bools) -> tuple[Floats, Bools]:
        """Scores and memberships (U,) of units from those of samples (M,)."""
        if self.groups is None:
            return scores, member
        joined = combine(scores, member, self.groups)
        return joined.scores, joined.member

    def spread(self, values: Floats) -> Floats:
        """Values (M,) of samples from those of their units (U,)."""
        if self.groups is None:
            return values
        spread: Floats = values[np.unique(self.groups, return_inverse=True)[1]]
        return spread


@dataclass(frozen=True, eq=False)
class Measured:
    """What one attack found.

    Attributes:
        attack: Its name.
        scores: (U,) of the units.
        scores_of_samples: (M,) of the samples in them.
        member: (U,) True for members.
        roc: Every rate on all units.
        transfer: The decision at a threshold that was fixed elsewhere, or None.
        log10_p: Of the rank test.
        source: Where threshold and calibration come from.
        epsilon: Lower bound, or None with too few units.
        posterior: (U,) P(member) at the prior that was asked for, or None.
        calibrators: One, or two where each half of the samples was calibrated on the other.
        reliability: How far the posterior can be taken at its word, or None.
    """

    attack: str
    scores: Floats
    scores_of_samples: Floats
    member: Bools
    roc: Roc
    transfer: Decision | None
    log10_p: float
    source: Source
    epsilon: EpsilonBound | None
    posterior: Floats | None
    calibrators: tuple[Calibrator, ...]
    reliability: Reliability | None


def count_units(samples: Samples, evaluated: Bools) -> Units:
    """Lay out the units: groups where they were given, else samples.

    Raises:
        InputError: Fewer than 30 units a side are left.
    """
    rows, member = np.flatnonzero(evaluated), samples.member[evaluated]
    labels = samples.signals.labels[evaluated] if samples.labelled else None
    groups = None if samples.groups is None else samples.groups[evaluated]
    if groups is not None:
        _, first, of_group = np.unique(groups, return_index=True, return_inverse=True)
        if labels is not None:
            whole = bool((labels == labels[first][of_group]).all())
            labels = labels[first] if whole else None
        member = member[first]
    fewest = min(int(member.sum()), int((~member).sum()))
    if fewest < MIN_SIDE:
        what = "samples" if groups is None else "groups"
        raise InputError(f"{fewest} {what} a side are left: give at least {MIN_SIDE}")
    return Units(rows, member, labels, groups)


def measure(
    attack: str,
    scores: Floats,
    units: Units,
    references: References | None,
    notes: list[str],
    *,
    fprs: Sequence[float],
    prior: float,
    seed: int,
) -> Measured:
    """Measure one attack: rates, rank test, transferred threshold, posterior, epsilon.

    Args:
        attack: Its name.
        scores: (N,) of all samples.
        units: What is counted.
        references: The references, if any.
        notes: Takes up what could not be computed.
        fprs: False positive rates to report.
        prior: Share of members that the posterior assumes.
        seed: Of the halves.
    """
    member = units.member
    of_samples = scores[units.rows]
    own, _ = units.gather(of_samples, _members(units))
    roc = evaluate(own, member, fprs, group_by=units.labels)
    log10_p = mann_whitney_log10_p(own, member)
    share = float(member.mean())
    elsewhere = _leave_one_model_out(attack, units, references, notes)
    if elsewhere is not None:
        there = evaluate(*elsewhere, fprs)
        calibrator = Calibrator.fit(*elsewhere)
        tried = [r.threshold for r in (*there.tpr_at, *there.tnr_at)] + [there.oracle.threshold]
        return Measured(
            attack,
            own,
            of_samples,
            member,
            roc,
            decide(own, member, there.oracle.threshold),
            log10_p,
            "references",
            epsilon_lower_bound(own, member, thresholds=np.unique(tried)),
            calibrator.posterior(own, prior),
            (calibrator,),
            reliability(calibrator.posterior(own, share), member),
        )
    first = _half(member, seed)
    if first is None:
        return Measured(
            attack, own, of_samples, member, roc, None, log10_p, "nothing", None, None, (), None
        )
    threshold = evaluate(own[first], member[first], fprs).oracle.threshold
    halves = (first, ~first)
    calibrators = tuple(Calibrator.fit(own[half], member[half]) for half in halves)
    posterior, at_share = np.empty(len(own)), np.empty(len(own))
    for half, calibrator in zip(halves, calibrators, strict=True):
        posterior[~half] = calibrator.posterior(own[~half], prior)
        at_share[~half] = calibrator.posterior(own[~half], share)
    return Measured(
        attack,
        own,
        of_samples,
        member,
        roc,
        decide(own[~first], member[~first], threshold),
        log10_p,
        "a half of the samples",
        epsilon_lower_bound(own, member, seed=seed),
        posterior,
        calibrators,
        reliability(at_share, member),
    )


def evidence_of(
    measured: Measured, samples: Samples, units: Units, level: float, checks: tuple[Check, ...] = ()
) -> Evidence:
    """Put one attack's figures as evidence; checks belong to the primary attack."""
    n, k = int(units.member.sum()), int((~units.member).sum())
    what = "groups" if units.groups is not None else "samples"
    model = "the audited model" if samples.network is None else samples.network.name
    power = power_statement(n, k, (), level=level)
    estimates: list[Estimate] = [measured.roc.auc]
    for rate in measured.roc.tpr_at:
        resolved = "" if rate.resolved else f", not resolved by {k:,} non-members"
        name = f"TPR at FPR {rate.limit:g}{resolved}"
        estimates.append(Estimate(name, rate.value, rate.low, rate.high))
    if measured.transfer is not None:
        estimates.append(measured.transfer.balanced_accuracy)
    if measured.epsilon is not None:
        bound = measured.epsilon.epsilon
        estimates.append(
            Estimate("epsilon, lower bound", bound, bound, np.inf, measured.epsilon.confidence)
        )
    return Evidence(
        question=f"Were the members, as a set, part of what {model} was trained on?",
        statistic=f"AUC of {measured.attack}",
        value=measured.roc.auc.value,
        null="the scores of members are no higher than those of non-members",
        log10_p=measured.log10_p,
        method=f"one-sided Mann-Whitney rank test of {n:,} against {k:,} {what}",
        would_change=(
            "non-members that were trained on, or that differ from the members in more than the "
            "training, would take a detection away. With these numbers an AUC below "
            f"{power.auc:.3f} is missed more often than one time in five: a stronger attack or "
            "more data may detect what this run did not."
        ),
        level=level,
        estimates=tuple(estimates),
        checks=checks,
    )


def declared(samples: Samples, measured: Measured) -> tuple[Check, ...]:
    """The assumptions that no look at the data can prove, and the direction of the scores."""
    checks = [
        Check(
            "No non-member was in the training set.",
            None,
            "stated by whoever ran this audit; the data cannot show it",
        ),
        measured.roc.sign,
    ]
    if samples.groups is None:
        checks.append(
            Check(
                "Samples of one side are independent of each other.",
                None,
                "no groups were given; where several samples come from one person or scene, give "
                "--member-groups and --nonmember-groups",
            )
        )
    return tuple(checks)


def grouped_auc(primary: Measured, units: Units) -> Estimate | None:
    """AUC of single samples where groups are counted, with an interval that counts groups."""
    if units.groups is None:
        return None
    found = clustered_auc(primary.scores_of_samples, _members(units), units.groups)
    return Estimate("AUC of single samples", found.value, found.low, found.high, found.confidence)


def _members(units: Units) -> Bools:
    """Memberships (M,) of the evaluated samples."""
    if units.groups is None:
        return units.member
    inside: Bools = units.member[np.unique(units.groups, return_inverse=True)[1]]
    return inside


def _leave_one_model_out(
    attack: str, units: Units, references: References | None, notes: list[str]
) -> tuple[Floats, Bools] | None:
    """Scores of every reference as the target of the others, with its own members."""
    if references is None or attack in FURTHER:
        return None
    references = references.select(units.rows)
    if not references.member.any():
        return None
    found = []
    try:
        many = references.loss.size > 10**6
        for k in track(range(len(references)), f"calibrate {attack}", show=many):
            target, others, member = references.leave_out(k)
            found.append(units.gather(ATTACKS[attack]().score(target, others), member))
    except InputError as error:
        notes.append(f"{attack}: cannot be calibrated on the references ({error}).")
        return None
    scores, members = (np.concatenate(part) for part in zip(*found, strict=True))
    if min(members.sum(), (~members).sum()) < MIN_SIDE:
        return None
    return scores, members


def _half(member: Bools, seed: int) -> Bools | None:
    """A random half of the units, as many of each side as it goes; None with fewer than 60."""
    if min(member.sum(), (~member).sum()) < 2 * MIN_SIDE:
        return None
    rng, first = np.random.default_rng(seed), np.zeros(len(member), dtype=bool)
    for side in (member, ~member):
        rows = rng.permutation(np.flatnonzero(side))
        first[rows[: len(rows) // 2]] = True
    return first
