"""The report of `search describe`: what was found where, and what a whitening changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from remanence.jobs.search.describe_whitening import Learned
from remanence.kit.report import Cell, Report, curve_figure
from remanence.search.kernel_descriptor.spectrum import RANK

COLUMNS = 8  # patches beside each other


def build_report(
    source: str,
    results: Mapping[str, Any],
    eigenvalues: Tensor | None,
    shown: Sequence[Tensor],
    learned: Learned | None,
    convention: str,
    *,
    patches: bool,
) -> Report:
    """Write the report, but for the facts of the run.

    Args:
        source: What was described, in the user's words.
        results: What goes to `results.json`.
        eigenvalues: Of the raw descriptors' covariance, where they vary.
        shown: A few patches of each of a few pictures.
        learned: The whitening, where one was learned.
        convention: Of the descriptor.
        patches: They were given as patches.
    """
    count, flat = results["descriptors"], results["flat"]
    report = Report(f"Descriptors of {source}", f"{count:,} vectors of length {results['length']}")
    share = f" ({100 * flat / count:.1f} %)" if count else ""
    lost = (
        f"{flat:,}{share} are of flat patches, which show nothing: their vectors are 0 and valid "
        "is false."
    )
    if patches:
        report.text(f"{count:,} patches were described. {lost}")
    else:
        bare, skipped = results["without_keypoints"], results["skipped"]
        report.text(
            f"{results['images']:,} images gave {count:,} descriptors, {results['fewest']:,} to "
            f"{results['most']:,} each. {lost} {len(bare):,} images have no key points"
            f"{_named(bare)}; {len(skipped):,} could not be read and were left out"
            f"{_named(skipped)}."
        )
    if shown:
        report.figure(
            mosaic(shown),
            (
                "The first patches"
                if patches
                else "Patches of the strongest key points, a row for each of the first images"
            )
            + ", each stretched to its full contrast: what the "
            "descriptors see.",
            "rows of small grey patches",
        )
    if eigenvalues is not None:
        _spectrum(report, eigenvalues, results)
    if learned is not None:
        _whitening(report, learned)
    report.section("How to read the file")
    report.text(
        "descriptors.safetensors opens without pickle: safetensors.numpy.load_file gives vectors "
        "and image, the number of the image in the list of names in its metadata. Of pictures it "
        "also has xy and scale in pixels (the centre of the first pixel is 0, 0) and angle in "
        "radians, clockwise as displayed. Descriptors are compared by Euclidean distance or, "
        "which orders them alike, by inner product."
    )
    report.facts({"descriptor": convention})
    return report


def mosaic(shown: Sequence[Tensor]) -> Figure:
    """Draw rows of patches."""
    side = shown[0].shape[-1]
    lines = [part[i : i + COLUMNS] for part in shown for i in range(0, len(part), COLUMNS)]
    gap = max(1, side // 16)
    sheet = np.ones((len(lines) * (side + gap), COLUMNS * (side + gap)))
    for row, line in enumerate(lines):
        for column, patch in enumerate(line.reshape(-1, *line.shape[-2:]).numpy()):
            low, high = float(patch.min()), float(patch.max())
            top, left = row * (side + gap), column * (side + gap)
            stretched = (patch - low) / max(high - low, 1e-6)
            sheet[top : top + side, left : left + side] = stretched
    figure = Figure(figsize=(5, 5 * sheet.shape[0] / sheet.shape[1]), layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    return figure


def _spectrum(report: Report, eigenvalues: Tensor, results: Mapping[str, Any]) -> None:
    values, rank = eigenvalues.numpy(), results["effective_rank"]
    count = results["descriptors"] - results["flat"]
    report.section("How much the descriptors vary")
    report.text(
        f"The spectrum of the raw descriptors' covariance has an effective rank of {rank:.1f} out "
        f"of {len(values)} (the exponential of its entropy; Roy and Vetterli, 2007). The steeper "
        "it falls, the more of a distance comes from a few directions that all patches share, and "
        "the more a whitening changes."
    )
    kept = values > RANK
    figure = curve_figure(
        {"eigenvalue": (np.flatnonzero(kept) + 1, values[kept], None, None)},
        "direction",
        "variance, over the largest",
    )
    figure.axes[0].set_yscale("log")
    for line in figure.axes[0].lines:
        line.set_marker("")
    for text in figure.axes[0].texts:
        text.set_visible(False)
    report.figure(
        figure,
        f"Eigenvalues of the covariance of {count:,} raw descriptors, largest first.",
        "a falling curve of eigenvalues on a logarithmic axis",
    )


def _whitening(report: Report, learned: Learned) -> None:
    card = learned.card()
    report.section("The whitening")
    report.facts(
        {
            "file": "whitening.safetensors",
            "kind": card["kind"],
            "from length to length": " to ".join(map(str, card["length"])),
            "images": card["images"] or None,
            "descriptors": card["descriptors"],
            "matching pairs": card["pairs"],
            "seconds": card["seconds"],
            "for descriptors": card["convention"],
        }
    )
    if not learned.scores:
        report.text(
            "It was not evaluated: that takes pictures with at least two places that can be found "
            "again in warped copies."
        )
        return
    best = max(score.matching_map for score in learned.scores)
    report.table(
        ["descriptors", "matching mAP, %", "FPR95, %"],
        [
            [s.name, Cell(s.matching_map, "best" if s.matching_map == best else None), s.fpr95]
            for s in learned.scores
        ],
        "The same places in a picture and in five warped, blurred, brightened and noisy copies of "
        "it. mAP: right neighbours, ranked (higher is better). FPR95: pairs of different places "
        "accepted where 95 % of the right ones are (lower is better).",
    )
    named = ", ".join(learned.evaluated)
    if learned.same:
        report.text(
            f"Read with care: it was evaluated on {named}, from which it was also learned, since "
            "there were no other images with enough key points. On other pictures it will gain "
            "less."
        )
    else:
        report.text(
            f"Evaluated on {named}, with a whitening that was learned from the other images only. "
            "The file holds the one that was then learned from all of them. Where the others show "
            "the same scenes, these figures are too good."
        )


def _named(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f" ({', '.join(names[:3])}{more})"
