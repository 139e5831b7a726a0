"""What `remanence audit layers` found, as a file and a page to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from remanence.audit.dejavu import DepthProfile, Protocol
from remanence.audit.evidence import Evidence
from remanence.jobs.audit.evidence_report import add_evidence
from remanence.kit.images import Images
from remanence.kit.report import Report, curve_figure

PROTOCOLS: dict[Protocol, str] = {
    "head": "a new linear head is trained on each layer with the public images; candidates that "
    "lie better in their class than others do look like members",
    "classifier": "a linear classifier of members and non-members is trained on each layer, and "
    "tried on candidates that it was not fitted to: some members have to be known",
    "transfer": "a linear classifier of members and non-members is trained on a shadow network "
    "whose members are known; a linear map, fitted on the public images, carries the layer there",
}


def write_scores(
    names: Sequence[str],
    scores: NDArray[np.float64],
    images: Mapping[str, Images],
    path: Path,
) -> None:
    """Write a row for each candidate with its score at every depth."""
    sides = [images["members"], images["nonmembers"]]
    columns: dict[str, Any] = {
        "set": pa.array(["member"] * len(sides[0]) + ["nonmember"] * len(sides[1])),
        "id": pa.array([name for side in sides for name in side.ids]),
        "label": pa.array(np.concatenate([side.labels for side in sides])),
    }
    columns |= {f"score_{name}": pa.array(row) for name, row in zip(names, scores, strict=True)}
    pq.write_table(pa.table(columns), path)


def build_report(found: DepthProfile, evidence: Evidence, name: str) -> Report:
    """Write what was found; the caller adds the run and writes the file."""
    title = f"Do the layers of {name} reveal its training images?"
    report = Report(title, "remanence audit layers")
    report.text(
        f"{found.members:,} images that the network was trained on were compared with "
        f"{found.nonmembers:,} that it was not; {found.public:,} further images served as public. "
        f"Protocol {found.protocol}: {PROTOCOLS[found.protocol]}. The deepest layer, "
        f"{found.layers[-1].layer}, was declared before the data were seen."
    )
    add_evidence(report, evidence)
    report.section("Depth profile")
    depths = [each.depth for each in found.layers]
    aucs = [each.auc for each in found.layers]
    figure = curve_figure(
        {"AUC": (depths, [e.value for e in aucs], [e.low for e in aucs], [e.high for e in aucs])},
        "depth (0 is the input)",
        "AUC, members against non-members",
    )
    figure.axes[0].axhline(0.5, color="#888888", linestyle=(0, (4, 3)), linewidth=1)
    figure.axes[0].set_xticks(depths)
    report.figure(
        figure,
        "Area under the ROC curve at each depth with its 95% interval; 0.5, dashed, is chance. At "
        "the input nothing may be revealed: there, only a difference between the sets would show.",
        "AUC of membership by depth",
    )
    report.table(
        ["depth", "layer", "features", "AUC", "low", "high"],
        [
            [each.depth, each.layer, each.dim, each.auc.value, each.auc.low, each.auc.high]
            for each in found.layers
        ],
    )
    report.section("Does it grow with depth?")
    report.verdict(
        {"detected": True, "not detected": False, "not interpretable": None}[found.trend.verdict],
        found.trend.answer,
        found.trend.verdict,
    )
    slope = found.trend.estimates[0]
    report.text(f"{slope}. {found.trend.question} Tested by {found.trend.method}.")
    return report
