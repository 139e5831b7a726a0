"""The report of `search match`: the verdict, both photographs with their matches, the overlay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from remanence.kit.report import Report
from remanence.search.kernel_descriptor.edits import Edit

SIDE = 560  # pixels of a photograph's longer side as drawn
DPI = 120
INLIERS, REJECTED = 150, 40  # lines that are drawn at most
SQUARES = 8  # of the checkerboard, along the longer side
GREEN, RED = "#3ddc84", "#ff5a4d"
WORDS = {
    "identity": "nothing changed",
    "flip": "mirrored",
    "perspective": "seen in perspective",
    "affine": "stretched or sheared",
    "rotation": "turned",
    "scale": "scaled",
    "crop": "cropped",
    "border": "with more around it",
    "shift": "shifted",
}


def draw_matches(
    photographs: Sequence[Image.Image],
    xy: tuple[NDArray[np.float64], NDArray[np.float64]],
    inliers: NDArray[np.bool_],
    *,
    matched: bool,
) -> Figure:
    """Draw both photographs side by side, and lines between matched places.

    Args:
        photographs: In RGB.
        xy: Places in pixels of each (K, 2).
        inliers: Which agree (K,), bool.
        matched: Whether their agreement counts; all are drawn as rejected otherwise.
    """
    shown, factors = zip(*(_reduced(one) for one in photographs), strict=True)
    height = max(one.shape[0] for one in shown)
    width = sum(one.shape[1] for one in shown) + 10
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    offset = shown[0].shape[1] + 10
    canvas[: shown[0].shape[0], : offset - 10] = shown[0]
    canvas[: shown[1].shape[0], offset:] = shown[1]
    ends = [(places + 0.5) * f - 0.5 for places, f in zip(xy, factors, strict=True)]
    ends[1] = ends[1] + [offset, 0]
    figure = Figure(figsize=(10, 10 * height / width), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas, interpolation="bilinear")
    right = inliers & matched
    for chosen, most, colour, alpha, line in (
        (~right, REJECTED, RED, 0.25, 0.5),
        (right, INLIERS, GREEN, 0.7, 0.7),
    ):
        # Evenly over the strongest to the weakest, so that drawing fewer favours none.
        kept = np.flatnonzero(chosen)
        kept = (
            kept[np.unique(np.linspace(0, len(kept) - 1, most).astype(int))] if len(kept) else kept
        )
        a, b = ends[0][kept], ends[1][kept]
        axes.plot([a[:, 0], b[:, 0]], [a[:, 1], b[:, 1]], color=colour, alpha=alpha, lw=line)
        for end in (a, b):
            axes.plot(end[:, 0], end[:, 1], ".", color=colour, alpha=alpha, markersize=3)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_axis_off()
    return figure


def draw_overlay(photographs: Sequence[Image.Image], homography: NDArray[np.float64]) -> Figure:
    """Draw a checkerboard of the second photograph and the first one brought onto it.

    Args:
        photographs: In RGB.
        homography: From pixels of the first to pixels of the second (3, 3).
    """
    (first, f1), (second, f2) = (_reduced(one) for one in photographs)
    height, width = second.shape[:2]
    shrink = _scaling(f2) @ homography @ np.linalg.inv(_scaling(f1))
    warped = cv2.warpPerspective(first, shrink, (width, height), flags=cv2.INTER_LINEAR)
    covered = cv2.warpPerspective(np.ones(first.shape[:2], np.uint8), shrink, (width, height))
    square = max(1, -(-max(height, width) // SQUARES))
    y, x = np.mgrid[:height, :width] // square
    board = ((x + y) % 2 == 0) & (covered > 0)
    figure = Figure(figsize=(7, 7 * height / width), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.where(board[..., None], warped, second), interpolation="bilinear")
    axes.set_axis_off()
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a picture."""
    figure.savefig(path, format="png", metadata={"Software": None})


def build_report(
    paths: tuple[Path, Path],
    results: Mapping[str, Any],
    homography: NDArray[np.float64] | None,
    edit: Edit | None,
    drawn: Figure,
    overlay: Figure | None,
    tolerance: float,
) -> Report:
    """Write the report, but for the facts of the run.

    Args:
        paths: Of both photographs.
        results: What goes to `results.json`.
        homography: Where they match.
        edit: What it consists of.
        drawn: From `draw_matches`.
        overlay: From `draw_overlay`, where they match.
        tolerance: Of an inlier, pixels.
    """
    matched = results["matched"]
    report = Report(f"{paths[0].name} and {paths[1].name}", "Do they show one scene?")
    words, _, sentence = results["answer"].partition(": ")
    report.verdict(matched, sentence[0].upper() + sentence[1:] + ".", words)
    report.text(_alarms(results))
    if edit is not None:
        report.text(_in_words(edit))
    report.figure(
        drawn,
        "Matches that agree on the homography are green, up to "
        f"{INLIERS} of them; a few of those that do not are faint and red."
        if matched
        else f"Some of the {results['matches']:,} matches of single places; they do not agree.",
        "both photographs side by side, with lines between matched places",
    )
    if overlay is not None:
        report.figure(
            overlay,
            "The first photograph brought onto the second, in alternate squares: where edges run "
            "on from square to square, the homography holds.",
            "a checkerboard of both photographs",
        )
    if homography is not None:
        report.section("Homography")
        report.text(
            "From pixels of the first to pixels of the second photograph, x to the right and y "
            "down, the centre of the first pixel at 0, 0; also in homography.txt."
        )
        report.table(
            ["", "x", "y", "1"],
            [
                [n, *row]
                for n, row in zip(
                    ("x'", "y'", "w"),
                    ([f"{v:.8g}" for v in row] for row in homography),
                    strict=True,
                )
            ],
        )
    report.section("How it was decided")
    counts = results["keypoints"]
    report.text(
        f"{counts[0]:,} and {counts[1]:,} key points were found and described by kernel local "
        f"descriptors ({results['descriptors']}); {results['matches']:,} were matched. A "
        "homography was fitted by MAGSAC++; matches within "
        f"{tolerance:g} pixels of it, in the coarser photograph, agree. A homography explains a "
        "flat scene, a far one, or a camera that only turns: photographs of one scene that is "
        "neither may share no homography, or only for a part of them."
    )
    return report


def _alarms(results: Mapping[str, Any]) -> str:
    allowed = f"{10 ** results['log10_false_alarms_allowed']:g}"
    found = results["log10_false_alarms"]
    if found is None:
        return (
            "There were too few matches to ask how often chance would do as well: a homography "
            "always fits four of them."
        )
    number = f"{10**found:.2g}" if abs(found) < 4 else f"10^{found:.0f}"
    return (
        f"The number of false alarms is {number}: so many pairs of unrelated photographs, with as "
        "many matches that fell by chance, would be expected to agree as well, for each pair "
        f"looked at. The limit is {allowed}."
    )


def _in_words(edit: Edit) -> str:
    parts = ", ".join(WORDS[part] for part in edit.parts)
    return (
        f"From the first to the second: {parts}. Lengths change by a factor of {edit.scale:.3g} at "
        f"the centre, which turns by {edit.rotation:.1f} degrees clockwise and moves by "
        f"{edit.shift[0]:+.1f} pixels right and {edit.shift[1]:+.1f} down; directions differ in "
        f"scale by a factor of {edit.stretch:.3g}, and perspective moves a corner by "
        f"{edit.perspective:.1f} pixels. The second shows {100 * edit.kept:.0f} % of the first, "
        f"which fills {100 * edit.covered:.0f} % of it."
    )


def _reduced(photograph: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Pixels of a smaller copy, and its pixels a pixel of the photograph along x and y."""
    width, height = photograph.size
    share = min(1.0, SIDE / max(width, height))
    size = max(1, round(width * share)), max(1, round(height * share))
    small = np.array(photograph.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))
    return small, np.array([size[0] / width, size[1] / height])


def _scaling(factor: NDArray[np.float64]) -> NDArray[np.float64]:
    x, y = factor
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
