"""Evidence as a reviewer reads it: what was asked, what was assumed, the answer, how sure."""

from __future__ import annotations

from collections.abc import Sequence

from remanence.audit.evidence import Evidence
from remanence.kit.report import Cell, Report

_HELD = {True: Cell("holds"), False: Cell("does not hold", "bad"), None: Cell("open")}


def add_evidence(report: Report, evidence: Evidence) -> None:
    """Write one test's evidence into the current section of a report."""
    decided = {"detected": True, "not detected": False, "not interpretable": None}
    report.verdict(decided[evidence.verdict], evidence.answer, evidence.verdict)
    report.facts(
        {
            "question": evidence.question,
            "null hypothesis": evidence.null,
            "statistic": f"{evidence.statistic} = {evidence.value:.6g}",
            "p-value": f"{evidence.p_text.removeprefix('= ')}, {evidence.method}",
            "level": f"{evidence.level:g}, fixed before the data were seen",
        }
    )
    if evidence.estimates:
        report.table(
            ["how sure", "estimate", "low", "high", "confidence"],
            [[e.name, e.value, e.low, e.high, f"{e.confidence:.0%}"] for e in evidence.estimates],
            "Effect sizes with their confidence intervals.",
        )
    if evidence.checks:
        report.table(
            ["what was assumed", "found", "figures"],
            [[check.assumption, _HELD[check.holds], check.finding] for check in evidence.checks],
            "An assumption that does not hold makes the answer not interpretable, whatever the "
            "p-value.",
        )
    report.text(f"What would change the verdict: {evidence.would_change}")


def add_explored(report: Report, explored: Sequence[Evidence]) -> None:
    """Write further tests of the same data as one table, marked as exploratory."""
    if not explored:
        return
    report.table(
        ["test", "value", "p", "computed"],
        [[e.statistic, e.value, e.p_text.removeprefix("= "), e.method] for e in explored],
        "Exploratory: the verdict above rests on the test that was declared beforehand; these "
        "were looked at besides and are not corrected for each other.",
    )
