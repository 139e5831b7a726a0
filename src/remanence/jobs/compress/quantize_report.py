"""The report of a compression: what was kept, what was lost, and what others would have lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure

from remanence.compress.network.finetune import CurvePoint
from remanence.compress.network.pipeline import Compressed
from remanence.compress.planning.plan import Plan
from remanence.compress.planning.size import Size
from remanence.jobs.compress.inputs import Inputs
from remanence.jobs.compress.measured import Measured
from remanence.jobs.compress.subject import Subject
from remanence.kit.report import Report, curve_figure

LOST = 0.3  # relative output error from which a layer hardly does its work any more


@dataclass(frozen=True)
class Finding:
    """All that a run found.

    Attributes:
        subject: The network.
        inputs: The data.
        plan: How each layer is stored.
        compressed: The search's result.
        size: Bytes of the file.
        measured: The float network first, then the compressed one, then the controls.
        curve: Held-out KL while tuning.
        shares: Held-out KL with one layer in float, by layer.
        notice: Why channels were not reordered.
    """

    subject: Subject
    inputs: Inputs
    plan: Plan
    compressed: Compressed
    size: Size
    measured: tuple[Measured, ...]
    curve: tuple[CurvePoint, ...]
    shares: tuple[tuple[str, float], ...]
    notice: str

    def results(self) -> dict[str, Any]:
        """Return the figures for `results.json`."""
        return {
            "size": asdict(self.size) | {"total": self.size.total, "ratio": self.size.ratio},
            "measured": [_plain(each) for each in self.measured],
            "layers": [asdict(each) for each in self.compressed.report],
            "kept": {kept.name: kept.reason for kept in self.plan.kept},
            "norms_reestimated": self.compressed.norms_reestimated,
            "curve": [asdict(point) for point in self.curve],
            "sensitivity": dict(self.shares),
            "notice": self.notice,
            "samples": self.inputs.counts,
        }


def build_report(finding: Finding, paper_bytes: int) -> Report:
    """Write the report.

    Args:
        finding: What the run found.
        paper_bytes: Size as the paper counts it.
    """
    size, counts = finding.size, finding.inputs.counts
    report = Report(
        f"{finding.subject.name}, {size.ratio:.1f} times smaller",
        f"{size.total:,} bytes instead of {size.uncompressed:,}",
    )
    report.text(_summary(finding))
    report.table(
        ["network", "bytes", "accuracy, %", "95 %", "lost, points", "95 %", "KL, nats",
         "same answer, %"],
        [_row(each) for each in finding.measured],
        f"Measured on {counts['test']:,} test samples that nothing else looked at; intervals of "
        "95 %, those of the loss paired with the float network. KL is that of the answers to the "
        "float network's. All but the float network are files of one size.",
    )  # fmt: skip
    if len(finding.measured) > 2 and finding.measured[0].accuracy is not None:
        report.figure(
            _bars(finding.measured),
            "Accuracy on the test samples, with 95 % intervals.",
            "accuracy of the float network, the compressed one and the controls",
        )
    report.section("Bytes")
    report.table(
        ["part", "bytes", "share, %"],
        [
            [name, value, 100 * value / size.total]
            for name, value in (
                ("codes", size.codes),
                ("codebooks", size.codebooks),
                ("layers kept in float, norms, biases", size.other),
                ("names, shapes, description", size.header),
                ("the file", size.total),
            )
        ],
        "The file's own size, to the byte. The paper's accounting, which leaves out the header and "
        f"counts the rest in float32, gives {paper_bytes:,} bytes.",
    )
    report.section("Layers")
    _layers(report, finding)
    if finding.curve:
        report.section("Tuning")
        report.figure(
            curve_figure(
                {
                    "held-out KL": (
                        [point.step for point in finding.curve],
                        [point.holdout_kl for point in finding.curve],
                        None,
                        None,
                    )
                },
                "step",
                "KL to the float network, nats",
            ),
            f"KL on {counts['held out']:,} held-out samples while the codewords were trained; the "
            "state with the lowest was kept. No label was used.",
            "held-out KL by step",
        )
    report.section("How it was done")
    report.text(
        f"Moments of each layer's inputs came from {counts['calibration']:,} samples, each layer "
        "seeing what the quantised layers before it leave. "
        + (
            "Batch norm statistics were estimated anew, which lowered the held-out KL. "
            if finding.compressed.norms_reestimated
            else ""
        )
        + (f"Channels were not all reordered: {finding.notice}. " if finding.notice else "")
        + "`remanence compress inspect` shows what the file holds, `remanence compress expand` "
        "makes a plain checkpoint of it, and `remanence.compress.load` opens it."
    )
    return report


def _summary(finding: Finding) -> str:
    ours = finding.measured[1]
    said = f"The file is {finding.size.ratio:.1f} times smaller than the weights in float32. "
    if ours.accuracy is not None and ours.difference is not None:
        low, high = ours.difference.interval
        said += (
            f"Accuracy is {ours.accuracy[0]:.1%}, {100 * ours.difference.difference:+.1f} points "
            f"({100 * low:+.1f} to {100 * high:+.1f}) against the float network's "
            f"{finding.measured[0].accuracy[0]:.1%}. "  # type: ignore[index]  # both have labels
        )
    elif ours.agreement is not None and finding.subject.detector:
        said += f"{ours.agreement:.1%} of the float network's sure detections are found again. "
    elif ours.agreement is not None:
        said += (
            "No labels of the network's own classes tell its accuracy; it gives the float "
            f"network's answer on {ours.agreement:.1%} of the test samples. "
        )
    if finding.subject.detector:
        said += "A detector has no logits to repeat, and so its codewords were not trained. "
    lost = [each.name for each in finding.compressed.report if each.output_error > LOST]
    if lost:
        said += (
            f"{len(lost)} layers lose more than {LOST:.0%} of their output, first {lost[0]}; keep "
            "them in float (--keep), or give them smaller blocks or more codewords. "
        )
    return said


def _row(each: Measured) -> list[Any]:
    accuracy: list[float | str | None] = [None, None]
    lost: list[float | str | None] = [None, None]
    if each.accuracy is not None:
        value, low, high = (100 * x for x in each.accuracy)
        accuracy = [value, f"{low:.1f} to {high:.1f}"]
    if each.difference is not None and each.name != "float":
        low, high = (100 * x for x in each.difference.interval)
        lost = [-100 * each.difference.difference, f"{-high:.1f} to {-low:.1f}"]
    same = None if each.agreement is None else 100 * each.agreement
    return [each.name, each.bytes, *accuracy, *lost, each.kl, same]


def _layers(report: Report, finding: Finding) -> None:
    searched = {each.name: each for each in finding.compressed.report}
    shares = dict(finding.shares)
    rows = []
    noted = any(row["note"] for row in finding.plan.table())
    for row in finding.plan.table():
        found = searched.get(str(row["layer"]))
        rows.append(
            [
                row["layer"],
                row["shape"],
                row["block"] or None,
                row["codewords"] or None,
                row["bytes"],
                row["bits_per_weight"],
                None if found is None else 100 * found.output_error,
                None if found is None else 100 * found.weight_error,
                *([shares.get(str(row["layer"]))] if shares else []),
                *([row["note"]] if noted else []),
            ]
        )
    report.table(
        ["layer", "weight", "block", "codewords", "bytes", "bits a weight", "output error, %",
         "weight error, %", *(["KL in float"] if shares else []), *(["note"] if noted else [])],
        rows,
        "Errors are squared and relative: of the layer's output on the calibration set against "
        "what it aimed at, and of its weights. The search minds the first, not the second."
        + (" KL in float: what is left of the KL with this layer in float." if shares else ""),
    )  # fmt: skip
    report.figure(
        _errors(finding.compressed.report),
        "Where it hurts: relative squared error of each layer's output, in order of execution.",
        "output error by layer",
    )


def _bars(measured: Sequence[Measured]) -> Figure:
    shown = [each for each in measured if each.accuracy is not None]
    figure = Figure(figsize=(6.4, 0.42 * len(shown) + 0.9))
    axes = figure.subplots()
    for place, each in enumerate(reversed(shown)):
        assert each.accuracy is not None
        value, low, high = (100 * x for x in each.accuracy)
        colour = {"float": "0.45", "compressed": "C0"}.get(each.name, "0.75")
        axes.barh(place, value, color=colour, height=0.62)
        axes.errorbar(value, place, xerr=[[value - low], [high - value]], color="0.2", capsize=2)
    axes.set_yticks(range(len(shown)), [each.name for each in reversed(shown)])
    axes.set_xlabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _errors(layers: Sequence[Any]) -> Figure:
    many = len(layers) > 24
    figure = Figure(figsize=(6.4, (0.17 if many else 0.3) * len(layers) + 0.9))
    axes = figure.subplots()
    places = range(len(layers))
    axes.barh(places, [100 * each.output_error for each in layers], color="C0", height=0.7)
    axes.set_yticks(places, [each.name for each in layers], fontsize=6 if many else 9)
    axes.invert_yaxis()
    axes.set_xlabel("output error, %")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _plain(each: Measured) -> dict[str, Any]:
    found = asdict(each)
    if each.difference is not None:
        found["difference"] = {
            "points": 100 * each.difference.difference,
            "low": 100 * each.difference.interval.low,
            "high": 100 * each.difference.interval.high,
            "p_value": each.difference.p_value,
        }
    return found
