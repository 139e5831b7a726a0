"""What `remanence audit dejavu` found, as figures, files and a page to read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from remanence.audit.dejavu import KSResult, Test, displayed
from remanence.audit.evidence import Evidence
from remanence.jobs.audit.dejavu_found import Found, Scores
from remanence.jobs.audit.evidence_report import add_evidence, add_explored
from remanence.kit.report import Cell, Report, Value, curve_figure

ASKS: dict[Test, str] = {
    "ks": "whether the network's largest confidence is distributed alike over both sets",
    "ks1": "whether the network is more confident on the candidates than on the references",
    "mw": "whether the network is more confident on the candidates than on the references, by rank",
    "mw_loss": "whether the network fits the labels of the candidates better than those of the "
    "references, by rank",
    "calibrated": "the same of the labels' margins, less what networks say that saw neither set",
    "learned": "whether noise takes longer to change the network's answer on the candidates, by a "
    "regressor that is always tried on images it was not fitted to",
}
SHIFT = (
    "Candidates and references differ before the network is asked: there is a shift between the "
    "two sets. A difference in the network's answers is then to be expected whatever it was "
    "trained on, and nothing follows about membership. Draw both sets from one source, prepared "
    "in one way, and repeat the test."
)
MEANS = {
    "detected": "The network treats the candidates as it treats what it was trained on, more than "
    "chance explains: they, or a part of them, were in training, or in that of a network that it "
    "learnt from.",
    "not detected": "The network does not treat the candidates otherwise than images that it "
    "never saw, as far as this test can tell. That is no proof that none was in training.",
    "not interpretable": "Nothing follows about training: an assumption of the test does not hold.",
}
CURVE_POINTS = 400


def write_scores(found: Found, path: Path) -> None:
    """Write a row for each tested sample: its score and, for candidates, its contribution."""
    parts = []
    for name, sets in found.sets.items():
        for samples, scores, contribution in zip(
            (sets.candidate, sets.reference),
            found.scores[name],
            (found.contribution[name], None),
            strict=True,
        ):
            n = len(samples)
            parts.append(
                pa.table(
                    {
                        "hypothesis": pa.array([name] * n, pa.string()),
                        "set": pa.array([samples.role] * n, pa.string()),
                        "id": pa.array(samples.ids, pa.string()),
                        "label": pa.array(
                            [None] * n if samples.labels is None else samples.labels, pa.int64()
                        ),
                        "score": pa.array(scores),
                        "contribution": pa.array(
                            [None] * n if contribution is None else contribution, pa.float64()
                        ),
                    }
                )
            )
    pq.write_table(pa.concat_tables(parts), path)


def write_report(
    found: Found, options: Mapping[str, Any], summary: Mapping[str, str], path: Path
) -> None:
    """Write the page."""
    asked = options["candidate"] or "each data set"
    report = Report(f"Was {asked} in training?", "remanence audit dejavu")
    network = f"the network {options['model']}" if options["model"] else "a network, by its outputs"
    report.text(
        f"Asked of {network}. The declared test ({found.test}) asks {ASKS[found.test]}"
        f"{', by bets on single pairs' if found.wealth else ''}. It rests "
        "on the references: they must be of the candidates' source, prepared in the same way, and "
        "never used in training or for any choice."
    )
    for name, evidence in found.evidence.items():
        if name:
            report.section(name)
        _add_one(report, found, name, evidence)
    if "" in found.evidence:
        _add_besides(report, found)
    else:
        _add_table(report, found)
    report.section("Each image")
    report.text(
        "scores.parquet holds the score of every image that was tested and, for candidates, its "
        "contribution: the share of references that it scores above, less one half. The mean of "
        "the contributions is what a rank test sees. They say where a finding comes from and are "
        "no verdicts on single images: half of all images that were never in training contribute "
        "above 0."
    )
    report.section("Run")
    report.facts(summary)
    report.write(path)


def _add_one(report: Report, found: Found, name: str, evidence: Evidence) -> None:
    report.text(MEANS[evidence.verdict])
    add_evidence(report, evidence)
    if any("same distribution" in c.assumption or "alike" in c.assumption for c in evidence.failed):
        report.verdict(None, SHIFT, "shift")
    candidate, reference = found.scores[name]
    distance = found.distance[name]
    report.figure(
        distribution_figure(candidate, reference, distance, found.members),
        f"Share of images with a score up to each value. Members score higher, so a leak moves the "
        f"candidates' curve to the right. The curves are furthest apart at D = {distance.d:.3f}, "
        f"at the score {distance.location:.3g}.",
        f"distribution functions of candidate and reference scores, D {distance.d:.3f}",
    )
    counts = found.sets[name].counts
    report.table(
        ["images", "candidates", "references"],
        [
            ["given", counts["candidates"], counts["references"]],
            ["left out: known to be in training", counts["candidates_known_to_be_trained_on"], 0],
            [
                "left out: nearly repeat one of the other set",
                counts["candidates_near_a_reference"],
                counts["references_near_a_candidate"],
            ],
            ["tested", len(candidate), len(reference)],
        ],
        "duplicates.parquet names every image that has a duplicate."
        + (
            ""
            if found.sets[name].groups is None
            else " Duplicates within a set count as one observation: clusters are permuted."
        ),
    )
    if known := counts["candidates_known_to_be_trained_on"]:
        report.text(
            f"{known:,} of {counts['candidates']:,} candidates are pixel by pixel among the known "
            "training images: of these it is certain. The test asks about the others."
        )


def _add_besides(report: Report, found: Found) -> None:
    if not found.wealth:
        _add_power(report, found)
    if found.absence is not None:
        report.section("Has it been removed?")
        report.text(
            "Not to detect a leak is no proof of its absence. This test asks for the proof: it "
            '"detects" absence where the leaked fraction is shown to be below the margin.'
        )
        decided = {"detected": True, "not detected": False, "not interpretable": None}
        verdict = found.absence.verdict
        report.verdict(decided[verdict], found.absence.answer, verdict)
        low, high = found.absence.estimates[0].low, found.absence.estimates[0].high
        report.text(
            f"{found.absence.question} The leaked fraction lies between {low:.1%} and {high:.1%} "
            f"({found.absence.estimates[0].confidence:.0%} interval); absence is shown where the "
            f"whole interval lies within the margin. {found.absence.would_change}"
        )
    if found.exploratory:
        report.section("Other tests")
        add_explored(report, found.exploratory)
    if found.wealth:
        report.section("The bets")
        report.figure(
            wealth_figure(found.wealth, found.evidence[""].level),
            "A gambler who bets that candidates score above references multiplies the stake by "
            "this much. Where the sets are exchangeable, the stake ever reaches the dashed line "
            "with probability of at most the level: one may look at any time.",
            "wealth of the bets by number of pairs",
        )
    if found.alarms is not None:
        report.section("False alarms")
        report.text(
            f"References tested against other references: {found.alarms}. Every such finding is "
            "false; their rate should be the level or less."
        )


def _add_power(report: Report, found: Found) -> None:
    report.section("How small a leak would be found?")
    if found.power is None:
        report.text(
            "This needs some images that were certainly in training (--known-members): from them "
            "follow the leaked fraction and the smallest leak that the test can find. Without "
            "them, a test that detects nothing says little."
        )
        return
    if found.power.smallest is None:
        report.text(
            "The known training images score no higher than the references: on this network the "
            "test cannot find a leak of any size. A stronger test may (mw_loss, calibrated)."
        )
        return
    if found.fraction is not None:
        shown = displayed(found.fraction)
        report.text(
            f"Estimated share of the tested candidates that were in training: {shown.value:.1%} "
            f"({shown.confidence:.0%} interval {shown.low:.1%} to {shown.high:.1%})."
        )
    smallest = found.power.smallest
    report.text(
        f"With as many images, a leak of {smallest:.1%} is found about every second time."
        if smallest <= 1
        else "With as many images, not even a full leak is found every second time: give more."
    )
    report.table(
        ["leaked fraction", "images a side"],
        [[f"{leak:.0%}", needed] for leak, needed in found.power.needed.items()],
        "Candidates and references, each, with which the test finds a leak four times in five.",
    )


def _add_table(report: Report, found: Found) -> None:
    report.section("All hypotheses")
    rows: list[list[Value | Cell]] = [
        [
            name,
            len(found.scores[name][0]),
            found.distance[name].d,
            evidence.value,
            f"{10**evidence.log10_p:.2g}",
            f"{evidence.p:.2g}",
            evidence.verdict,
        ]
        for name, evidence in found.evidence.items()
    ]
    statistic = next(iter(found.evidence.values())).statistic
    report.table(
        ["data set", "candidates", "D", statistic, "p", "p, corrected", "verdict"],
        rows,
        "Each data set is compared with held-out images of its own. The p-values are corrected "
        "for their number (Holm), so that the chance of any false finding is at most the level.",
    )


def distribution_figure(
    candidate: Scores, reference: Scores, distance: KSResult, members: Scores | None = None
) -> Figure:
    """Empirical distribution functions, with D drawn where it is reached."""
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    curves = [("references", reference, "#0072B2", "-"), ("candidates", candidate, "#D55E00", "-")]
    if members is not None:
        curves.append(("known members", members, "#009E73", "--"))
    for name, scores, colour, style in curves:
        ordered, heights = np.sort(scores), np.arange(1, len(scores) + 1) / len(scores)
        kept = np.unique(np.linspace(0, len(scores) - 1, CURVE_POINTS).astype(int))
        axes.step(
            ordered[kept], heights[kept], style, where="post", color=colour, label=name, lw=1.6
        )
    at = distance.location
    ends = [float(np.mean(scores <= at)) for scores in (candidate, reference)]
    axes.vlines(at, min(ends), max(ends), color="black", linewidth=1.4)
    axes.annotate(
        f"D = {distance.d:.3f}",
        (at, max(ends)),
        xytext=(-6, 2),
        textcoords="offset points",
        ha="right",
    )
    # A few far scores would press the rest together.
    pooled = np.concatenate([scores for _, scores, *_ in curves])
    low, high = np.quantile(pooled, [0.002, 0.998])
    margin = 0.02 * (high - low) or 1.0
    axes.set_xlim(low - margin, high + margin)
    axes.set_xlabel("score, higher for what looks more trained on")
    axes.set_ylabel("share of images")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    return figure


def wealth_figure(wealth: tuple[tuple[int, float], ...], level: float) -> Figure:
    """Wealth of the bets by pairs, with the line at which they decide."""
    pairs, log_wealth = zip(*wealth, strict=True)
    figure = curve_figure(
        {"wealth": (pairs, [value / math.log(10) for value in log_wealth], None, None)},
        "pairs",
        "log10 of the wealth",
    )
    figure.axes[0].axhline(-math.log10(level), color="#888888", linestyle=(0, (4, 3)), linewidth=1)
    return figure
