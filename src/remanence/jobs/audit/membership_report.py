"""The report of `remanence audit membership`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from remanence.audit.evidence import Evidence
from remanence.audit.membership import Power, posterior_bound
from remanence.jobs.audit.evidence_report import add_evidence, add_explored
from remanence.jobs.audit.membership_attacks import describe_attack
from remanence.jobs.audit.membership_evidence import Measured, Units
from remanence.jobs.audit.membership_figures import roc_figure, score_figure
from remanence.kit.report import Report
from remanence.kit.run import RunFolder

MOST_ROWS = 30


def write(
    run: RunFolder,
    results: Mapping[str, Any],
    evidence: Evidence,
    explored: Sequence[Evidence],
    measured: Sequence[Measured],
    units: Units,
    power: Power,
    names: Sequence[str],
) -> None:
    """Write `report.html`.

    Args:
        run: Run folder.
        results: What `results.json` holds.
        evidence: Of the primary attack.
        explored: Of the others.
        measured: Figures of all attacks, the primary one first.
        units: What was counted.
        power: What so many units can show.
        names: What to call each unit (U,).
    """
    primary, samples = measured[0], results["samples"]
    report = Report(f"Membership audit: {samples['model']}", "remanence audit membership")
    report.text(
        f"Members: {samples['members']} ({samples['member_count']:,} samples). Non-members: "
        f"{samples['nonmembers']} ({samples['nonmember_count']:,} samples). Primary attack, "
        f"declared beforehand: {primary.attack}."
    )
    add_evidence(report, evidence)
    report.section("How to read this answer")
    for paragraph in _reading(results, evidence):
        report.text(paragraph)
    report.section("How well members are told from non-members")
    _attacks(report, measured)
    add_explored(report, explored)
    report.section("Single samples")
    _singles(report, results, primary, units, names)
    if primary.roc.groups:
        report.section("By class")
        _classes(report, results["classes"])
    report.section("Differential privacy")
    _privacy(report, primary)
    report.section("What so many samples can show")
    report.text(
        f"{power} At lower false positive rates than one over the number of non-members, a rate "
        "cannot be measured at all; the table says so where it applies."
    )
    if results["references"] is not None:
        report.section("Reference models")
        _references(report, results)
    if results["notes"]:
        report.section("Notes")
        for note in results["notes"]:
            report.text(note)
    report.section("Run")
    report.facts(run.summary())
    report.write(run.path("report.html"))


def _reading(results: Mapping[str, Any], evidence: Evidence) -> list[str]:
    says = {
        "detected": (
            "Detected means: scores of this model are higher for the members than for the "
            "non-members, by more than chance explains at the level above. If the two sets differ "
            "in nothing but the training, the model was trained on members, or on something that "
            "holds them."
        ),
        "not detected": (
            "Not detected means: this attack, on so many samples, found no difference that chance "
            "would not explain. It does not show that the members were not used, nor that a "
            "stronger attack would find nothing."
        ),
        "not interpretable": (
            "Not interpretable means: an assumption of the test was found not to hold, so that "
            "neither a low nor a high p-value says whether the members were used. Mend what the "
            "table names and run the audit again."
        ),
    }
    found = [
        says[evidence.verdict],
    ]
    found.append(
        "The verdict is about the members as a set. For a single sample there is only the "
        "probability in scores.parquet, which depends on the share of members that is assumed "
        f"beforehand (here {results['calibration']['prior']:g})."
    )
    accuracy = results["samples"]["accuracy"]
    if accuracy is not None:
        found.append(
            f"The model classifies {accuracy['members']:.2%} of the members and "
            f"{accuracy['nonmembers']:.2%} of the non-members correctly."
        )
    grouped = results["grouped_auc"]
    if grouped is not None:
        found.append(
            "Groups are counted, not samples: a group's score is the mean over its samples. AUC "
            f"of single samples {grouped['value']:.3f}, with an interval that counts groups from "
            f"{grouped['low']:.3f} to {grouped['high']:.3f}."
        )
    return found


def _attacks(report: Report, measured: Sequence[Measured]) -> None:
    rates = measured[0].roc.tpr_at
    ends, last = ["attack", "AUC", "low", "high"], ["low", "high", "threshold from"]
    report.table(
        [*ends, *(f"TPR at {r.limit:g}, %" for r in rates), "balanced accuracy", *last],
        [_row(one) for one in measured],
        "Area under the ROC curve with DeLong's 95 % interval; share of members found at false "
        "positive rates, in brackets where there are too few non-members to measure that rate "
        "and the figure is the share found without any false positive; balanced accuracy at a "
        "threshold that was fixed elsewhere, never on the samples it is measured on.",
    )
    report.figure(
        roc_figure(measured),
        "Members found against non-members wrongly called members, both on a logarithmic scale. "
        "The dotted line is guessing.",
        "receiver operating characteristic of every attack",
    )
    report.figure(
        score_figure(measured[0]),
        f"Scores of {measured[0].attack}; the outer hundredths are drawn into the outer bars.",
        "histograms of the scores of members and non-members",
    )
    report.table(
        ["attack", "source and what it sees"],
        [[one.attack, describe_attack(one.attack)] for one in measured],
    )
    for one in measured:
        if one.attack in ("malt", "malt-loss") and one.roc.tnr_at:
            rate = one.roc.tnr_at[0]
            report.text(
                f"At most {rate.limit:g} of the members called non-members, {one.attack} clears "
                f"{rate.value:.2%} of the non-members ({rate.low:.2%} to {rate.high:.2%}): a "
                "measure of risk that needs no reference model (arXiv 2510.19773), lower where "
                "models leak less."
            )
            break


def _row(one: Measured) -> list[Any]:
    auc, transfer = one.roc.auc, one.transfer
    rates = [
        f"{100 * r.value:.2f}" if r.resolved else f"[{100 * r.value:.2f}]" for r in one.roc.tpr_at
    ]
    balanced = None if transfer is None else transfer.balanced_accuracy
    ends = [None] * 3 if balanced is None else [balanced.value, balanced.low, balanced.high]
    return [one.attack, auc.value, auc.low, auc.high, *rates, *ends, one.source]


def _singles(
    report: Report,
    results: Mapping[str, Any],
    primary: Measured,
    units: Units,
    names: Sequence[str],
) -> None:
    found, calibration = primary.reliability, results["calibration"]
    if primary.posterior is None or found is None:
        report.text(
            "No probabilities are given: calibrating them needs reference models with members of "
            "their own, or at least 60 samples a side."
        )
        return
    temperatures = " and ".join(
        "infinite" if t is None else f"{t:.3g}" for t in calibration["temperature"]
    )
    report.text(
        f"P(member) is a logistic function of the score of {primary.attack}, fitted on "
        f"{primary.source}, at a prior of {calibration['prior']:g}. Its temperature, one over the "
        f"slope, is {temperatures} in units of the score; an infinite one means that a higher "
        "score was no sign of membership there. At the true share of members, its Brier score is "
        f"{found.brier:.4f} (always answering that share: {found.brier_prior:.4f}) and its "
        f"expected calibration error {found.ece:.3f}."
    )
    if found.brier >= found.brier_prior:
        report.text("It is no better than answering the share of members for everyone.")
    report.table(
        ["P(member) from", "to", "samples", "mean", "members among them", "low", "high"],
        [
            [
                row.low,
                row.high,
                row.n,
                row.predicted,
                row.observed.value,
                row.observed.low,
                row.observed.high,
            ]
            for row in found.rows
        ],
        "What was predicted and what is so, in ten groups of equal size, at the true share of "
        "members.",
    )
    top = np.argsort(-primary.posterior, kind="stable")[:10]
    report.table(
        ["most member-like", "given as", "score", "P(member)"],
        [
            [
                names[i],
                "member" if units.member[i] else "non-member",
                float(primary.scores[i]),
                float(primary.posterior[i]),
            ]
            for i in top
        ],
        "The ten highest probabilities, members or not. All of them are in scores.parquet.",
    )


def _classes(report: Report, rows: Sequence[Mapping[str, Any]]) -> None:
    largest = sorted(rows, key=lambda row: -min(row["members"], row["nonmembers"]))[:MOST_ROWS]
    report.table(
        ["class", "members", "non-members", "AUC", "low", "high"],
        [
            [
                row["class"],
                row["members"],
                row["nonmembers"],
                *(row["auc"][end] if row["auc"] else None for end in ("value", "low", "high")),
            ]
            for row in rows
            if row in largest
        ],
        "Of the primary attack, where a class has 30 samples a side. Intervals are not corrected "
        f"for the number of classes.{_more(len(rows))}",
    )


def _more(count: int) -> str:
    if count <= MOST_ROWS:
        return ""
    return f" The {MOST_ROWS} largest of {count:,} classes; all are in results.json."


def _privacy(report: Report, primary: Measured) -> None:
    bound = primary.epsilon
    if bound is None:
        report.text("No bound is given: it needs at least 60 samples a side, or reference models.")
        return
    shown = (
        f"Epsilon is at least {bound.epsilon:.3f}"
        if bound.epsilon > 0
        else "Nothing is shown about epsilon (the lower bound is 0)"
    )
    report.text(
        f"{shown}, at delta {bound.delta:g} and with confidence {bound.confidence:.0%}: a training "
        "with a smaller epsilon would not give these rates. The threshold was fixed on "
        f"{primary.source}. The bound takes the scores of samples under one model as independent, "
        "which is not strictly so; read it as an estimate, not as a proof."
    )
    report.text(
        "The other way round, a training that is private with epsilon 1 keeps P(member) at or "
        f"below {posterior_bound(1.0):.3f} for a prior of one half, whatever the attack."
    )


def _references(report: Report, results: Mapping[str, Any]) -> None:
    found, accuracy = results["references"], results["samples"]["accuracy"]
    fewest, most = found["trained_on_each_sample"]
    per_sample = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    report.text(
        f"{found['count']} reference models ({found['how']}); each sample was in the training set "
        f"of {per_sample} of them. They are the yardstick of what a model would say of a sample "
        "that it was, or was not, trained on. Where they were drawn without regard to who is a "
        "member, a poor likeness costs power but raises no false alarm; thresholds and "
        "probabilities carry over only as far as the likeness goes."
    )
    if accuracy is not None and found["accuracy_in"] is not None:
        report.table(
            ["accuracy, %", "on what it was trained on", "on the rest"],
            [
                ["references", 100 * found["accuracy_in"], 100 * found["accuracy_out"]],
                [
                    "audited model, members and non-members",
                    100 * accuracy["members"],
                    100 * accuracy["nonmembers"],
                ],
            ],
            "The nearer the two rows, the better the likeness.",
        )
