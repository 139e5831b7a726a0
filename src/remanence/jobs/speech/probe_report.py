"""The report of `speech probe`: how much is right, how sure that is, what is taken for what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from remanence.jobs.speech.probe_fit import Fitted, Spelled
from remanence.kit.report import Report, curve_figure
from remanence.kit.words import counted, duration
from remanence.speech.probe.accuracy import Accuracy

NAMED = 60  # classes whose names fit beside a picture
PAIRS = 10  # most frequent confusions that are listed


def sentence(results: Mapping[str, Any]) -> str:
    """Return the finding in one sentence."""
    if "per" in results:
        return (
            f"phone error rate {_percent(results['per'])}{_between(results['per_interval'])}, mean "
            f"over {counted(results['test_utterances'], 'utterance')}; "
            f"{_percent(results['per_pooled'])} of all phones{_unsure(results)}"
        )
    return (
        f"{_percent(results['accuracy'])} of {results['counted']} right"
        f"{_between(results['interval'])}; one answer for all has at most "
        f"{_percent(results['chance'])}{_unsure(results)}"
    )


def build_report(
    results: Mapping[str, Any], found: Fitted | Spelled, classes: Sequence[str], source: str
) -> Report:
    """Write the report, but for the facts of the run.

    Args:
        results: What goes to `results.json`.
        found: What the probe found.
        classes: Names of the classes.
        source: The features, in the user's words.
    """
    report = Report(f"What {source} tells: {results['target']}", sentence(results))
    used, there = results["train_utterances"], results["train_utterances_there"]
    report.text(
        f"A probe ({results['method']}) was fitted on {counted(used, 'utterance')}"
        + (f", drawn from {there:,}" if used < there else "")
        + f", {duration(60 * results['train_minutes'])}, and tested on "
        f"{results['test_utterances']:,} others, {duration(60 * results['test_minutes'])}. "
        "The features stayed as they were: what the probe finds was in them. "
        f"There are {results['classes']:,} classes."
    )
    report.text(
        f"There is {_unsure(results).removeprefix('; ')}."
        if _unsure(results)
        else f"Intervals hold 95 % and resample {results['interval_over']}, 2,000 times: they "
        f"tell how much the figure would move with other {results['interval_over']} to test on, "
        "not with others to learn from."
    )
    if results["files_without_labels"]:
        some = counted(results["files_without_labels"], "file")
        report.text(f"{some} without labels: left out.")
    for remark in results["remarks"]:
        report.text(f"{remark[0].upper()}{remark[1:]}.")
    if isinstance(found, Spelled):
        _spelling(report, results, found)
    else:
        _classes(report, results, found, classes)
    if found.losses:
        epochs = np.arange(1, len(found.losses) + 1)
        figure = curve_figure({"training": (epochs, found.losses, None, None)}, "epoch", "loss")
        report.figure(figure, "Mean loss of each epoch.", "a curve of the loss over epochs")
    return report


def _spelling(report: Report, results: Mapping[str, Any], found: Spelled) -> None:
    report.table(
        [
            "decoding",
            "PER, mean over utterances, %",
            "low",
            "high",
            "PER, pooled, %",
            "low",
            "high",
        ],
        [
            [
                name,
                100 * rate.mean,
                *_numbers(rate.mean_interval),
                100 * rate.pooled,
                *_numbers(rate.pooled_interval),
            ]
            for name, rate in (
                (f"prefix beam search, width {results['beam_width']}", found.beam),
                ("best path", found.greedy),
            )
        ],
        "Phone error rate: substitutions, insertions and deletions over the phones that were said.",
    )
    learn, spell = results["too_short_to_learn_from"], results["too_short_to_spell"]
    if learn or spell:
        report.text(
            f"CTC takes a frame for each phone, of every fourth frame of the features. "
            f"{counted(len(learn), 'utterance')} to learn from{_named(learn)} and {len(spell):,} "
            f"to test on{_named(spell)} have more phones than that: the first taught nothing, the "
            "others cannot come out right and count as they are."
        )
    rates = 100 * found.beam.edits / found.beam.lengths
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(rates, bins=min(30, max(5, len(rates) // 4)), color="#0072B2")
    axes.set_xlabel("phone error rate, %")
    axes.set_ylabel("utterances")
    axes.spines[["top", "right"]].set_visible(False)
    report.figure(figure, "Error rates of the test utterances.", "a histogram of error rates")


def _classes(
    report: Report, results: Mapping[str, Any], found: Fitted, classes: Sequence[str]
) -> None:
    rows: list[tuple[str, Accuracy]] = []
    if found.files is not None:
        rows.append(("files, by the vote of their windows", found.files))
    rows.append(("windows" if found.files is not None else "frames", found.frames))
    report.table(
        ["counted", "accuracy, %", "low", "high", "mean over classes, %", "chance, %", "number"],
        [
            [
                name,
                100 * own.accuracy,
                *_numbers(own.interval),
                100 * own.balanced,
                100 * own.chance,
                int(own.counts.sum()),
            ]
            for name, own in rows
        ],
        "Chance is what the best answer would get right that is the same for all that is tested.",
    )
    unseen = results["classes_not_in_training"]
    if unseen:
        report.text(
            f"Not learned from, so that test labels count as wrong: {len(unseen):,} of the classes"
            f"{_named(unseen)}."
        )
    if results.get("converged") is False:
        report.text("The fit stopped before it converged; its answer may still move a little.")
    confusion = rows[0][1].confusion
    report.figure(
        _confusion_figure(confusion, classes),
        "Rows are what was said, columns what the probe answered; each row's darkness adds up to "
        "one.",
        "a table of confusions as a picture, dark on the diagonal where answers are right",
    )
    off = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-off, axis=None, kind="stable")[:PAIRS]
    pairs = [divmod(int(i), len(classes)) for i in order if off.flat[i]]
    if pairs:
        said = confusion.sum(1)
        report.table(
            ["said", "taken for", "times", "of all, %"],
            [
                [classes[i], classes[j], int(off[i, j]), 100 * float(off[i, j] / said[i])]
                for i, j in pairs
            ],
            "The most frequent confusions.",
        )


def _confusion_figure(confusion: np.ndarray[Any, Any], classes: Sequence[str]) -> Figure:
    said = confusion.sum(1, keepdims=True)
    shares = confusion / np.maximum(said, 1)
    side = min(8.0, max(3.5, 0.22 * len(classes)))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("answered")
    axes.set_ylabel("said")
    if len(classes) <= NAMED:
        ticks = np.arange(len(classes))
        small = 8 if len(classes) <= 25 else 6
        axes.set_xticks(
            ticks, classes, fontsize=small, rotation=90 if max(map(len, classes)) > 2 else 0
        )
        axes.set_yticks(ticks, classes, fontsize=small)
    return figure


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _between(interval: Sequence[float]) -> str:
    low, high = interval
    return "" if math.isnan(low) else f" ({100 * low:.1f} to {100 * high:.1f})"


def _unsure(results: Mapping[str, Any]) -> str:
    """Say why there is no interval, where there is none."""
    interval = results["per_interval" if "per" in results else "interval"]
    if not any(math.isnan(value) for value in interval):
        return ""
    return f"; no interval: it takes two {results['interval_over']} to test on"


def _numbers(interval: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else 100 * value for value in interval]


def _named(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:3])}{f' and {len(names) - 3:,} more' if len(names) > 3 else ''})"
