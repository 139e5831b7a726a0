"""What `remanence audit mark` shows for its work: figures, pictures, and what could be detected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from remanence.audit import radioactive as ra
from remanence.kit.images import Images
from remanence.kit.report import Report

AMPLIFIED = 10
# Of a larger photograph the centre is shown, pixel by pixel.
_SHOWN = 160
_PICTURES = 6
_LEVELS = (0.05, 1e-4, 1e-10)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of a marking, from the manifest's rows."""
    marked = [row for row in rows if row["marked"]]
    psnr = np.array([row["psnr"] for row in marked])
    dot = np.array([row["dot"] for row in marked])
    move = np.array([row["move"] for row in marked])
    changed = np.isfinite(psnr)
    cosine = np.divide(dot, move, out=np.zeros_like(dot), where=move > 0)
    return {
        "images": len(rows),
        "marked": len(marked),
        "unchanged": int((~changed).sum()),
        "psnr_mean": float(psnr[changed].mean()) if changed.any() else None,
        "psnr_percentile_5": float(np.percentile(psnr[changed], 5)) if changed.any() else None,
        "largest_change": max(row["linf"] for row in marked),
        "dot_mean": float(dot.mean()),
        "dot_positive": float((dot > 0).mean()),
        "cosine_median": float(np.median(cosine)),
    }


def pictures(images: Images, rows: Sequence[Mapping[str, Any]], folder: Path) -> Figure:
    """Draw some marked images: as they were, as they are, and the difference enlarged."""
    marked = [row for row in rows if row["marked"]]
    spread = np.unique(np.linspace(0, len(marked) - 1, min(_PICTURES, len(marked))).astype(int))
    shown = [marked[i] for i in spread]
    figure = Figure(figsize=(1.15 * len(shown) + 0.9, 3.6), layout="constrained")
    axes = figure.subplots(3, len(shown), squeeze=False)
    for column, row in enumerate(shown):
        before = _centre(np.asarray(images.image(row["row"])))
        with Image.open(folder / row["path"]) as opened:
            after = _centre(np.asarray(opened))
        change = 127.5 + AMPLIFIED * (after.astype(float) - before)
        for line, picture in enumerate((before, after, change.clip(0, 255).astype(np.uint8))):
            axes[line, column].imshow(picture, interpolation="nearest")
            axes[line, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(row["class"][:14], fontsize=8)
        axes[2, column].set_xlabel(f"{row['psnr']:.1f} dB", fontsize=8)
    for line, name in enumerate(("original", "marked", f"change x {AMPLIFIED}")):
        axes[line, 0].set_ylabel(name, fontsize=8)
    return figure


def _centre(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    top, left = (max(0, (side - _SHOWN) // 2) for side in pixels.shape[:2])
    return pixels[top : top + _SHOWN, left : left + _SHOWN]


def mark_report(
    source: str,
    results: Mapping[str, Any],
    pictured: Figure,
    config: ra.MarkConfig,
    *,
    feasible: bool,
) -> Report:
    """Write the report, but for the facts of the run.

    Args:
        source: What was marked, in the user's words.
        results: What goes to `results.json`.
        pictured: From `pictures`.
        config: How images were marked.
        feasible: Whether the features move towards the carriers.

    Returns:
        The report, its last section begun.
    """
    report = Report(f"Marking of {source}", "remanence audit mark")
    report.text(
        f"{results['marked']:,} of {results['images']:,} images were marked, so that a network "
        "trained on them can later be recognised. No label was changed. PSNR against the original "
        f"pixels: mean {_db(results['psnr_mean'])}, 5th percentile "
        f"{_db(results['psnr_percentile_5'])}; no pixel changed by more than "
        f"{results['largest_change']} of 255 grey levels; {results['unchanged']} marked images "
        "came out unchanged."
    )
    report.verdict(
        feasible,
        "Seen through fresh random crops, the features moved along their secret carrier by "
        f"{results['dot_mean']:.3g} on average, in the right direction for "
        f"{100 * results['dot_positive']:.0f} % of the images; the median cosine between a "
        "feature's change and its carrier is "
        f"{results['cosine_median']:.2f} (below {ra.LEAST_COSINE}, training on the marks will "
        "hardly show).",
        "marks took" if feasible else "marks hardly took",
    )
    report.section("How it looks")
    report.figure(
        pictured,
        f"Marked images at native size (the centre of large ones). Last row: what was changed, "
        f"{AMPLIFIED} times as strong; grey means no change.",
        "original images, marked images and their enlarged differences",
    )
    report.section("What it takes to detect")
    K, d = results["marked_classes"], results["dim"]
    report.text(
        "A network trained on the images is tested by the cosine, in each class, between the row "
        "of its last layer and the class's carrier. An innocent network's mean cosine over "
        f"{K} marked classes in {d} dimensions is 0 with standard deviation "
        f"{1 / np.sqrt(K * d):.3g}."
    )
    report.table(
        ["to reach a p-value of", "mean cosine needed", "for 80 % chance of detection"],
        [
            [f"{p:g}", plan.min_mean_cosine, plan.detectable]
            for p in _LEVELS
            if (plan := ra.plan(K, d, p=p))
        ],
        "The thresholds hold for any network. Reference models raise the cosine that is found, for "
        "they take the ordinary class directions out; they do not lower the thresholds.",
    )
    report.text(
        "What will not be detected: a network whose mean cosine stays below these figures. That is "
        "the rule for few classes and small marked shares: with ten classes, networks trained from "
        "scratch on a few per cent of marked images are not told from innocent ones, and only "
        "heads trained on the marking network's own features, or large marked shares, are. "
        "Images that were shrunk, recompressed, relabelled, or used to train without their "
        "labels keep less of the mark or none. That nothing is found never shows that the images "
        "were not used."
    )
    report.section("What to keep and what to give away")
    report.facts(
        {
            "to publish": "images/ and public.json, before anyone could have trained",
            "to keep secret": f"{results['key']}, manifest.parquet and this report",
            "commitment": results["commitment"],
        }
    )
    report.text(
        "The commitment binds the key and the manifest without telling either. Published now, it "
        "shows later that the carriers were not chosen after seeing a model. Whoever has the key "
        "can find the marks and remove them; whoever has the manifest knows which images to leave "
        "out. If the key is lost, nothing can be detected."
    )
    report.section("Run")
    report.facts(
        {
            "optimiser": f"{config.optimizer}, {config.iterations} steps of {config.lr:g}",
            "bounds": f"{config.radius:g} grey levels a pixel"
            + ("" if config.target_psnr is None else f", PSNR {config.target_psnr:g} dB"),
            "seen through": str(config.augment),
        }
    )
    return report


def _db(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.1f} dB"
