"""The report of `remanence learn fixres`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from remanence.kit.report import Cell, Report, curve_figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from remanence.kit.run import RunFolder


def write(run: RunFolder, results: dict[str, Any]) -> None:
    """Write `report.html` from the figures of `results.json`."""
    rows = results["candidates"]
    base, chosen = rows[results["base"]], rows[results["chosen"]]
    comparison = results["comparison"]
    report = Report(f"FixRes: {base['network']}", "remanence learn fixres")
    report.text(
        f"Trained at {base['train_size']} pixels and tested there without adaptation, the network "
        f"is right on {percent(base['accuracy'])} of {results['images']:,} images. Chosen on "
        f"{results['selection_images']:,} other images: test at {chosen['size']} pixels, "
        f"scope {chosen['scope']}: {percent(chosen['accuracy'])}."
    )
    low, high = comparison["difference_interval_95"]
    report.verdict(
        None if low <= 0 <= high else low > 0,
        f"The chosen setting is better than the network as trained: "
        f"{100 * comparison['difference']:+.2f} points (95 % interval {100 * low:+.2f} to "
        f"{100 * high:+.2f}), McNemar's exact test p = {comparison['mcnemar_p']:.2g} "
        f"({comparison['only_this_right']} images only the chosen setting gets right, "
        f"{comparison['only_base_right']} only the other).",
    )
    report.section("Accuracy by test size")
    report.figure(
        curve_figure(
            _curves(rows, base), "test size, pixels", "top-1 accuracy, %", _marks(results)
        ),
        "Bands are 95 % intervals of each point (Wilson). The same network and images throughout; "
        "the sizes were chosen on other images.",
        "accuracy against test size, before and after adaptation",
    )
    report.section("How large objects look")
    for geometry in results["geometry"]:
        report.text(_explain(geometry))
    report.section("Activations")
    report.table(
        ["test size", "zeros, %", "standard deviation", "mean"],
        [
            [row["size"], 100 * row["zero_fraction"], row["std"], row["mean"]]
            for row in results["activations"]
        ],
        "The pooled embedding that enters the head, not adapted, on selection images: with more "
        "cells to average over, a larger test size gives fewer exact zeros and a smaller spread.",
    )
    report.section("Every setting")
    report.table(
        [
            "train size",
            "test size",
            "crop",
            "scope",
            "accuracy, %",
            "low",
            "high",
            "selection, %",
            "calibration error",
            "GMACs",
            "latency, ms",
            "activations, MiB",
            "Pareto",
        ],
        [_row(i, row, results) for i, row in enumerate(rows)],
        "Accuracy on the reported images with its 95 % interval, and on the selection images. "
        "Pareto: none is more accurate on the selection images at equal or lower cost.",
    )
    report.text(
        f"The chosen setting costs {chosen['gmacs'] / max(base['gmacs'], 1e-12):.2f} times the "
        f"multiply-adds of the network as trained, {chosen['latency_ms']:.3g} ms against "
        f"{base['latency_ms']:.3g} ms for one image."
    )
    _more(report, results)
    report.section("Run")
    report.facts(run.summary())
    report.write(run.path("report.html"))


def percent(share: float) -> str:
    """Write a share as a percentage with two decimals."""
    return f"{100 * share:.2f} %"


def _curves(
    rows: Sequence[dict[str, Any]], base: dict[str, Any]
) -> dict[str, tuple[list[float], list[float], list[float], list[float]]]:
    curves = {}
    for key in dict.fromkeys((r["train_size"], r["crop_pct"], r["scope"]) for r in rows):
        train_size, crop_pct, scope = key
        points = sorted(
            (r for r in rows if (r["train_size"], r["crop_pct"], r["scope"]) == key),
            key=lambda r: r["size"],
        )
        name = "not adapted" if scope == "none" else scope
        if train_size != base["train_size"]:
            name += f", trained at {train_size}"
        if crop_pct != base["crop_pct"]:
            name += f", crop {crop_pct:g}"
        curves[name] = (
            [p["size"] for p in points],
            [100 * p["accuracy"] for p in points],
            [100 * p["interval_95"][0] for p in points],
            [100 * p["interval_95"][1] for p in points],
        )
    return curves


def _marks(results: dict[str, Any]) -> dict[str, float]:
    geometry = results["geometry"][0]
    return {"train": geometry["train_size"], "equal size": geometry["equalising_size"]}


def _explain(geometry: dict[str, Any]) -> str:
    return (
        f"Trained at {geometry['train_size']} pixels with random resized crops and tested at the "
        f"same size, objects in these images look {geometry['ratio_geometric']:.3f} times as large "
        f"as in training (geometric mean; arithmetic {geometry['ratio_arithmetic']:.3f}, harmonic "
        f"{geometry['ratio_harmonic']:.3f}). They would look the same at "
        f"{geometry['equalising_size']:.0f} pixels; the nearest multiple of the network's stride "
        f"of {geometry['stride']} is {geometry['recommended']}. The median shorter side of the "
        f"images is {geometry['median_short_side']:.0f} pixels: beyond it, images are enlarged."
    )


def _row(index: int, row: dict[str, Any], results: dict[str, Any]) -> list[Any]:
    accuracy = 100 * row["accuracy"]
    return [
        row["train_size"],
        row["size"],
        row["crop_pct"],
        row["scope"] + (" (as trained)" if index == results["base"] else ""),
        Cell(accuracy, "best") if index == results["chosen"] else accuracy,
        100 * row["interval_95"][0],
        100 * row["interval_95"][1],
        100 * row["accuracy_selection"],
        row["calibration_error"],
        row["gmacs"],
        row["latency_ms"],
        row["activation_mib"],
        "yes" if row["pareto"] else "",
    ]


def _more(report: Report, results: dict[str, Any]) -> None:
    comparisons = []
    if "fused" in results:
        fused = results["fused"]
        sizes = " + ".join(str(size) for size in fused["sizes"])
        comparisons.append([f"fused {sizes} ({fused['fuse']}) against as trained", fused])
    for name, compared in results.get("also", {}).items():
        comparisons.append([f"{name}: chosen against as trained", compared])
    if "paired_with" in results:
        comparisons.append(["chosen against the predictions given", results["paired_with"]])
    if comparisons:
        report.section("Further comparisons")
        report.table(
            ["what", "images", "accuracy, %", "other, %", "difference", "low", "high", "McNemar p"],
            [
                [
                    name,
                    c["images"],
                    100 * c["accuracy"],
                    100 * c["accuracy_base"],
                    100 * c["difference"],
                    100 * c["difference_interval_95"][0],
                    100 * c["difference_interval_95"][1],
                    c["mcnemar_p"],
                ]
                for name, c in comparisons
            ],
            "Differences in points, on the same images, with 95 % intervals.",
        )
    if "real" in results:
        report.section("Reassessed labels")
        report.table(
            ["network", "images", "accuracy, %", "low", "high"],
            [
                [
                    name,
                    found["images"],
                    100 * found["accuracy"],
                    100 * found["interval_95"][0],
                    100 * found["interval_95"][1],
                ]
                for name, found in results["real"].items()
            ],
            "An image counts as right if the prediction is among its labels; images without any "
            "label are left out.",
        )
