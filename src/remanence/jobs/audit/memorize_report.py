"""What `remanence audit memorize` found, as a page to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from remanence.kit.report import Report, curve_figure


def write_report(
    results: Mapping[str, Any], data: str, summary: Mapping[str, str], path: Path
) -> None:
    """Write the page.

    Args:
        results: What `results.json` holds.
        data: Image source of the pool.
        summary: Of the run.
        path: Where to write.
    """
    rows = results["settings"]
    report = Report(f"What {results['model']} can remember", "remanence audit memorize")
    report.text(
        f"The network ({results['parameters']:,} parameters) was trained to tell a set of images, "
        f"drawn at random from {data}, from the rest of the same pool of {results['pool']:,}. "
        f"{results['unseen']:,} images of the pool were never shown. As the set is arbitrary, only "
        "memory can tell its images from the others: an accuracy of 0.5 is chance, 1 is a set "
        "stored in full."
    )
    if results["repeated_images_left_out"]:
        report.text(
            f"{results['repeated_images_left_out']:,} images repeat another one pixel by pixel at "
            "this size and were left out."
        )
    report.section("What was remembered")
    report.figure(
        accuracy_figure(rows),
        "Balanced accuracy on the set and on images that were never shown, by the size of the set. "
        + _band(rows),
        "balanced accuracy by set size, one curve a transform",
    )
    report.table(
        [
            "transform",
            "set",
            "seed",
            "set in",
            "shown out",
            "unseen out",
            "balanced",
            "low",
            "high",
            "AUC",
        ],
        [
            [
                row["transform"],
                row["n"],
                row["seed"],
                *(row["clean"][k]["value"] for k in ("tpr", "tnr_seen", "tnr_unseen")),
                *(row["clean"]["balanced_accuracy"][k] for k in ("value", "low", "high")),
                row["clean"]["auc"]["value"],
            ]
            for row in rows
        ],
        "Share of the set answered in, of the other images shown in training and of those never "
        "shown answered out; balanced accuracy (set, unseen) with its 95% interval. Where the "
        "shown do better than the unseen, the network has learnt the others by heart, too.",
    )
    _add_bits(report, rows)
    _add_views(report, rows)
    _add_training(report, rows)
    if results["capacity"]:
        _add_capacity(report, results["capacity"])
    report.section("Run")
    report.facts(summary)
    report.write(path)


def _add_bits(report: Report, rows: list[dict[str, Any]]) -> None:
    report.section("In bits")
    report.table(
        [
            "transform",
            "set",
            "of",
            "seed",
            "bits",
            "bits an image",
            "bits a parameter",
            "Bloom filter, bits",
        ],
        [
            [
                row["transform"],
                row["n"],
                row["pool"],
                row["seed"],
                *(row[k] for k in ("stored_bits", "bits_per_image", "bits_per_parameter")),
                row["yardsticks"]["bloom_filter"],
            ]
            for row in rows
        ],
        "What the network's answers tell about which of the images shown are in the set; beside "
        "it a Bloom filter that errs as often on the others.",
    )
    yardsticks = {(row["n"], row["pool"]): row["yardsticks"] for row in rows}
    report.table(
        ["set", "of", "ideal code", "perceptron", "language model"],
        [
            [
                *key,
                *(y[k] for k in ("set_bits", "perceptron", "language_model")),
            ]
            for key, y in sorted(yardsticks.items())
        ],
        "To compare with, in bits: the set, ideally coded; what a perceptron of as many weights "
        "holds of random labels, 2 a weight; a GPT-style model of as many parameters of random "
        "strings, about 3.6 a parameter (arXiv 2505.24832).",
    )


def _add_views(report: Report, rows: list[dict[str, Any]]) -> None:
    names = [view["name"] for view in rows[0]["views"]]
    report.section("Transformed images")
    report.table(
        ["transform", "set", "seed", "as they are", *names],
        [
            [
                row["transform"],
                row["n"],
                row["seed"],
                row["clean"]["balanced_accuracy"]["value"],
                *(view["balanced_accuracy"]["value"] for view in row["views"]),
            ]
            for row in rows
        ],
        "Balanced accuracy when all images are transformed: is it the picture that was stored, or "
        "its pixels?",
    )


def _add_training(report: Report, rows: list[dict[str, Any]]) -> None:
    report.section("Was it trained enough?")
    report.table(
        ["transform", "set", "seed", "steps", "times shown", "training", "as is", "re-estimated"],
        [
            [
                row["transform"],
                row["n"],
                row["seed"],
                row["steps"],
                row["positive_epochs"],
                row["train_accuracy"],
                (row["clean"]["tpr"]["value"] + row["clean"]["tnr_seen"]["value"]) / 2,
                None
                if row["reestimated"] is None
                else (row["reestimated"]["tpr"]["value"] + row["reestimated"]["tnr_seen"]["value"])
                / 2,
            ]
            for row in rows
        ],
        "Balanced accuracy on images shown in training: over the last batches, in evaluation, and "
        "in evaluation with batch-norm statistics re-estimated. A training accuracy below 1 may "
        "rise with --steps; the set sizes it belongs to are no limit of the architecture. Where "
        "the last column is far above the one before, the running statistics are at fault.",
    )


def _add_capacity(report: Report, capacity: Mapping[str, Any]) -> None:
    report.section("Capacity")
    for change, curve in capacity.items():
        held, lost = curve["largest_held"], curve["smallest_lost"]
        if lost is None:
            text = f"sets of {held:,} and perhaps more are stored: the pool allows no larger ones"
        elif not held:
            text = f"not even a set of {lost:,} is stored"
        else:
            text = f"sets of {held:,} are stored, sets of {lost:,} are not"
        report.text(
            f"Transform {change}: {text} (balanced accuracy of {curve['target']:g}, mean of "
            f"{len(curve['points'][0]['balanced_accuracies'])} seeds)."
        )
        report.table(
            ["set", "balanced accuracy", "bits", "bits a parameter", "stored"],
            [
                [
                    point["n"],
                    point["balanced_accuracy"],
                    point["stored_bits"],
                    point["bits_per_parameter"],
                    "yes" if point["held"] else "no",
                ]
                for point in curve["points"]
            ],
            f"Every size tried, transform {change}.",
        )


def accuracy_figure(rows: list[dict[str, Any]]) -> Figure:
    """Balanced accuracy by set size, one curve a transform."""
    series = {}
    for change in dict.fromkeys(row["transform"] for row in rows):
        own = [row for row in rows if row["transform"] == change]
        sizes = sorted({row["n"] for row in own})
        found = [[row["clean"]["balanced_accuracy"] for row in own if row["n"] == n] for n in sizes]
        middle = [sum(e["value"] for e in each) / len(each) for each in found]
        one = len(found[0]) == 1
        low = [min(e["low" if one else "value"] for e in each) for each in found]
        high = [max(e["high" if one else "value"] for e in each) for each in found]
        series[change] = (sizes, middle, low, high)
    figure = curve_figure(series, "images in the set", "balanced accuracy")
    axes, ticks = figure.axes[0], sorted({row["n"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    return figure


def _band(rows: list[dict[str, Any]]) -> str:
    seeds = {row["seed"] for row in rows}
    return (
        "The band is the 95% interval."
        if len(seeds) == 1
        else f"Mean, lowest and highest of {len(seeds)} seeds."
    )
