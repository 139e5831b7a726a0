"""The report of `remanence speech abx`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from remanence.jobs.speech.abx_scores import BySide, Scored, no_error, of_what
from remanence.kit.report import Cell, Report
from remanence.kit.words import counted

MOST = 45  # phones of a heat map, names of a bar chart
HARDEST = 10
COLOURS = {"within": "#0072B2", "across": "#D55E00"}
SAID = {
    "within": "within speakers (A, B and X of one speaker)",
    "across": "across speakers (X of another speaker than A and B)",
}


def build_report(results: Mapping[str, Any], scored: Mapping[str, BySide]) -> Report:
    """Write the report, but for the facts of the run.

    Args:
        results: What goes to `results.json`.
        scored: Of `first` and, where there is one, `second` features, by side.
    """
    first = scored["first"]
    said = ", ".join(f"{side} {results['first'][side]['error']:.2f} %" for side in first)
    report = Report(f"ABX error: {said}", f"{results['features']['first']}; chance is 50 %")
    report.text(
        "X and A are tokens of one phone, B is a token of another. The features err where X is "
        "nearer to B than to A, by dynamic time warping; a tie is half an error. Nothing is "
        "trained. Intervals are of 95 % over speakers: what to expect of other speakers."
    )
    names = results["features"]
    rows = []
    for name in scored:
        rows += [_row(names[name], side, results[name][side]) for side in scored[name]]
    report.table(
        ["features", "side", "error, %", "95 %", "standard error", "speakers", "cells", "triplets"],
        rows,
        "Cells are sets of A, B and X: "
        + "; ".join(SAID[side] for side in first)
        + f". The error is the mean {_mean(results['aggregate'])}.",
    )
    for name in scored:
        for side, row in results[name].items():
            if not row["error"]:
                text = of_what(side, name, scored)
                report.text(f"{text.capitalize()}: {no_error(row)}.")
    for sentence in results["doubts"]:
        report.text(f"Take care: {sentence}")
    for remark in results["remarks"]:
        report.text(f"{remark[0].upper()}{remark[1:]}.")
    if "second" in scored:
        _comparison(report, results)
    report.section("Hardest pairs")
    for side, one in first.items():
        _pairs(report, side, one)
    report.section("Speakers")
    bars = _speakers(first)
    report.figure(
        bars,
        "Error of each speaker of A and B"
        + (f", of the {MOST} worst" if bars.get_label() == "cut" else "")
        + "; per_speaker.csv has the figures. The line is the error over all.",
        "errors by speaker",
    )
    report.section("What was scored")
    listed = results["items"]
    report.facts(_facts(results))
    report.table(
        ["", *first],
        [
            [text, *(results["first"][side][key] for side in first)]
            for text, key in (
                ("items to score", "items"),
                ("left out: shorter than a frame", "items_without_frames"),
                ("in no cell: nothing like them to compare with", "items_in_no_cell"),
            )
        ],
        f"Listed: {counted(listed['listed'], 'item')} in {counted(listed['files'], 'file')}. "
        f"Other files that have features, and no items: {listed['files_without_items']:,}.",
    )
    return report


def _row(name: str, side: str, found: Mapping[str, Any]) -> list[Any]:
    return [
        name,
        side,
        round(found["error"], 2),
        _interval(found),
        "unknown" if math.isnan(found["stderr"]) else f"{found['stderr']:.2f}",
        found["speakers"],
        found["cells"],
        found["triplets"],
    ]


def _interval(found: Mapping[str, Any], sign: str = "") -> str:
    if math.isnan(found["low"]):
        return "unknown"
    return f"{found['low']:{sign}.2f} to {found['high']:{sign}.2f}"


def _mean(aggregate: str) -> str:
    return {
        "librilight": "over contexts (and speakers of X), then speakers, then pairs of phones",
        "zerospeech2017": "over contexts, then (pairs of) speakers, then pairs of phones",
        "weighted": "over triplets",
    }[aggregate]


def _comparison(report: Report, results: Mapping[str, Any]) -> None:
    report.section("Comparison")
    for side, found in results["comparison"].items():
        if math.isnan(found["p"]):
            report.verdict(None, f"{side.capitalize()} speakers: {found['verdict']}")
        else:
            told = found["p"] < 0.05
            report.verdict(
                told,
                f"{side.capitalize()} speakers: {found['verdict']}",
                "differ" if told else "not told apart",
            )
    report.table(
        ["side", "difference, points", "95 %", "p", "cells", "speakers"],
        [
            [
                side,
                round(found["difference"], 2),
                _interval(found, "+"),
                None if math.isnan(found["p"]) else float(f"{found['p']:.2g}"),
                found["cells"],
                found["speakers"],
            ]
            for side, found in results["comparison"].items()
        ],
        f"Error of {results['features']['first']} less that of {results['features']['second']}, "
        "cell by cell on the same items; speakers are left out one after the other (jackknife, "
        "Student's t). The test of two sides is not corrected for asking twice.",
    )


def _pairs(report: Report, side: str, one: Scored) -> None:
    table = one.result.table("pair")
    hardest = sorted(table.items(), key=lambda row: -row[1])[:HARDEST]
    report.table(
        ["A and X", "B", "error, %"],
        [[p, q, Cell(round(100 * error, 2))] for (p, q), error in hardest],
        f"The {len(hardest)} hardest of {len(table):,} ordered pairs, {side} speakers; "
        "per_pair.csv has all.",
    )
    report.figure(
        _heat_map(table),
        f"Errors in per cent, {side} speakers; white where no cell compares the two."
        + (f" The {MOST} hardest phones." if len({p for p, _ in table}) > MOST else ""),
        f"errors by pair of phones, {side} speakers",
    )


def _heat_map(table: Mapping[tuple[str, ...], float]) -> Figure:
    phones = sorted({phone for pair in table for phone in pair})
    if len(phones) > MOST:
        mean = {
            phone: np.mean([e for pair, e in table.items() if phone in pair]) for phone in phones
        }
        phones = sorted(sorted(phones, key=lambda phone: -mean[phone])[:MOST])
    place = {phone: i for i, phone in enumerate(phones)}
    values = np.full((len(phones), len(phones)), np.nan)
    for (p, q), error in table.items():
        if p in place and q in place:
            values[place[p], place[q]] = 100 * error
    side = min(max(3.2, 0.2 * len(phones) + 1.5), 9.0)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    most = max(float(np.nanmax(values)), 1.0)
    edges = np.arange(len(phones) + 1) - 0.5
    drawn = axes.pcolormesh(edges, edges, values, cmap="Blues", vmin=0, vmax=most)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_xticks(range(len(phones)), phones, rotation=90, fontsize=8)
    axes.set_yticks(range(len(phones)), phones, fontsize=8)
    axes.set_xlabel("B")
    axes.set_ylabel("A and X")
    if len(phones) <= 14:
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = value > 0.6 * most
                axes.text(
                    j, i, f"{value:.0f}", ha="center", va="center", fontsize=7,
                    color="white" if dark else "black",
                )  # fmt: skip
    figure.colorbar(drawn, ax=axes, label="error, %", shrink=0.7)
    return figure


def _speakers(found: BySide) -> Figure:
    tables = {side: one.result.table("speaker") for side, one in found.items()}
    last = list(tables.values())[-1]
    names = sorted({key for table in tables.values() for key in table},
                   key=lambda key: -last.get(key, 0.0))  # fmt: skip
    shown = names[:MOST]
    figure = Figure(figsize=(5, 0.9 + 0.2 * len(tables) * len(shown)), layout="constrained")
    figure.set_label("cut" if len(names) > MOST else "")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    thick = 0.8 / len(tables)
    for i, (side, table) in enumerate(tables.items()):
        at = np.arange(len(shown)) + (i - (len(tables) - 1) / 2) * thick
        widths = [100 * table.get(key, math.nan) for key in shown]
        axes.barh(at, widths, thick, color=COLOURS[side], label=side)
        axes.axvline(100 * found[side].result.error, color=COLOURS[side], linewidth=1)
    axes.set_yticks(range(len(shown)), [key[0] for key in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("error, %")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _facts(results: Mapping[str, Any]) -> dict[str, object]:
    facts: dict[str, object] = {
        "items": results["items"]["source"],
        "phones": results["items"]["phones"],
        "speakers": results["items"]["speakers"],
        "distance of frames": results["distance"],
        "frames a second": ", ".join(f"{rate:g}" for rate in results["frame_rate"].values()),
        "context": {
            "within": "phones with the same neighbours",
            "any": "any neighbours",
        }[results["context"]],
        "frames of an item": {
            "inclusive": "all whose centres lie in it",
            "librilight": "all whose centres lie in it but the last, as Libri-light's code does",
        }[results["slicing"]],
    }
    return facts | {name: value for name, value in _draws(results) if value}


def _draws(results: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    found = []
    for side, row in results["first"].items():
        if row["draws"] > 1:
            said = (
                f"standard error of the draw {row['draw_stderr']:.3f} points, by {row['draws']} "
                "draws; the error is that of the first"
            )
            found.append((f"what was drawn, {side}", said))
    return found
