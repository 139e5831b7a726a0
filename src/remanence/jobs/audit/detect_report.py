"""What `remanence audit detect` shows: the evidence, the classes behind it, and its power."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from remanence.audit import radioactive as ra
from remanence.audit.evidence import Evidence
from remanence.jobs.audit.evidence_report import add_evidence, add_explored
from remanence.kit.report import Report

_LN10 = np.log(10)


def class_rows(
    detection: ra.Detection, owner: Sequence[str], suspect: Sequence[str], mapped: Sequence[int]
) -> list[dict[str, Any]]:
    """Describe each tested class: its names, cosine and p-value."""
    return [
        {
            "class": owner[k],
            "suspect_class": suspect[mapped[k]] if len(suspect) else str(mapped[k]),
            "cosine": float(cosine),
            "log10_p": float(log_p / _LN10),
        }
        for k, cosine, log_p in zip(
            detection.classes, detection.cosines, detection.log_p, strict=True
        )
    ]


def cosine_figure(detection: ra.Detection) -> Figure:
    """Draw the classes' cosines over the law that they follow by chance."""
    d = detection.d_eff
    reach = max(4.5 / np.sqrt(d), 1.15 * float(np.abs(detection.cosines).max()))
    reach = min(reach, 1.0)
    x = np.linspace(-reach, reach, 400)
    density = stats.beta((d - 1) / 2, (d - 1) / 2, loc=-1, scale=2).pdf(x)
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.fill_between(x, density, color="#888888", alpha=0.3, linewidth=0)
    top = float(density[np.isfinite(density)].max())
    axes.vlines(detection.cosines, 0, 0.35 * top, color="#0072B2", linewidth=1.4)
    axes.axvline(
        detection.mean_cosine, color="#D55E00", linewidth=1.6, linestyle=(0, (4, 3)), zorder=3
    )
    axes.annotate(
        "mean of the classes",
        (detection.mean_cosine, 1),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="bottom",
        fontsize=8,
        color="#D55E00",
    )
    axes.set(xlabel="cosine between head and carrier", yticks=[], xlim=(-reach, reach))
    axes.set_ylim(0, 1.08 * top)
    return figure


def detect_report(
    suspect: str,
    evidence: Evidence,
    detection: ra.Detection,
    results: Mapping[str, Any],
    explored: Sequence[Evidence],
    decoys: Evidence | None,
) -> Report:
    """Write the report, but for the facts of the run.

    Args:
        suspect: What the user wrote.
        evidence: The test that was declared, which decides.
        detection: The detection behind it.
        results: What goes to `results.json`.
        explored: Other computations of the same test.
        decoys: The decoy test, where it was asked for.

    Returns:
        The report, its last section begun.
    """
    report = Report(f"Was {suspect} trained on marked images?", "remanence audit detect")
    add_evidence(report, evidence)
    if "recipients" in results:
        report.section("Which recipient")
        report.table(
            ["recipient", "mean cosine", "p", "p, corrected", "verdict"],
            [
                [
                    r["recipient"],
                    r["mean_cosine"],
                    _p(r["log10_p"]),
                    _p(r["log10_p_corrected"]),
                    r["verdict"],
                ]
                for r in results["recipients"]
            ],
            "Every recipient's carriers were tested; the correction is Holm's.",
        )
    report.section("Class by class")
    report.figure(
        cosine_figure(detection),
        "Each line is the cosine of one class with its carrier. The grey area is the exact law of "
        f"such a cosine for an innocent network, in {detection.d_eff} dimensions.",
        "cosines of the classes over the density of cosines by chance",
    )
    report.table(
        ["class", "suspect's class", "cosine", "p"],
        [
            [row["class"], row["suspect_class"], row["cosine"], _p(row["log10_p"])]
            for row in results["per_class"]
        ],
        "One-sided p-value of each class. Alone they mean little; Fisher's method combines them.",
    )
    report.section("How sure")
    power = results["power"]
    report.text(
        f"With {power['num_classes']} classes in {power['dim']} dimensions, a mean cosine of "
        f"{power['detectable']:.3g} is detected at level {evidence.level:g} with a chance of 80 %. "
        "A weaker mark is likely to be missed, so that not to detect one does not show that the "
        "images were not used."
    )
    rates = results["calibration"]["rejection_rates"]
    report.table(
        ["level", "share of p-values at or below it"],
        [[level, rate] for level, rate in rates.items()],
        f"The same test of the same head with {results['calibration']['draws']:,} random carrier "
        "sets that nobody used: the two columns should agree.",
    )
    add_explored(report, explored)
    if decoys is not None:
        report.section("The decoy test")
        report.text(
            "A second test, which looks at the suspect's answers only: held-out images were marked "
            "with the real carriers and with decoys. It is not corrected for the first, on "
            "which alone the verdict above rests."
        )
        add_evidence(report, decoys)
    report.section("How it was measured")
    report.facts(results["measured"])
    report.section("Run")
    return report


def _p(log10_p: float) -> str:
    return f"{10**log10_p:.2g}" if log10_p > -4 else f"10^{log10_p:.1f}"
