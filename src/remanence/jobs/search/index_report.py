"""The report of `remanence search index`: what was stored, in how many bytes, and how well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from remanence.kit.report import Report

CODES = {"SphereLattice": "spherical lattice", "E8Shell": "Gosset shell", "SignCode": "signs"}
COUNTS = {
    "before": "there before",
    "removed": "removed",
    "merged": "merged from other indexes",
    "added": "added",
}
PARTS = {
    "codes": "codes",
    "ids": "ids, where they are not 0, 1, 2 ...",
    "lists": "list of each vector",
    "centroids": "centroids of the lists",
}


def build_report(results: Mapping[str, Any], sources: Sequence[str], *, faiss: bool) -> Report:
    """Write the report, but for the facts of the run.

    Args:
        results: What goes to `results.json`.
        sources: What was added, as the user wrote it.
        faiss: Whether a plain faiss index was written.
    """
    code, stored = results["code"], results["bytes"]
    report = Report(
        f"{results['vectors']:,} vectors in {results['bytes_a_vector']:.4g} bytes each",
        f"{', '.join(sources) or 'no new vectors'}; {stored['total']:,} bytes in all",
    )
    kind = CODES[code["kind"]]
    report.text(
        f"Each vector was mapped to the unit sphere in {code['dim']} dimensions by the catalyzer "
        f"of {results['model']} and rounded to the nearest point of a fixed code ({kind}, squared "
        f"norm {code['r2']}), whose number takes {code['bits']} bits. The code has no codebook and "
        "was not fitted to these vectors. Queries are mapped alike and not rounded."
    )
    report.table(
        ["vectors", "count"],
        [
            *([what, results[name]] for name, what in COUNTS.items() if results[name]),
            ["now", results["vectors"]],
        ],
    )
    if results["not_there"]:
        report.text(f"{results['not_there']:,} ids to remove were not in the index.")
    if results["rate"] is not None:
        report.text(
            f"{results['rate']:,.0f} vectors a second were read, mapped and encoded: "
            f"{results['seconds']:.2f} s for {results['added']:,}."
        )
    report.section("Bytes")
    report.table(
        ["part", "bytes", "bytes a vector"],
        [
            *(
                [PARTS[name], size, size / results["vectors"] if results["vectors"] else None]
                for name, size in stored["parts"].items()
            ),
            ["header", stored["header"], None],
            ["the file", stored["total"], None],
        ],
        "The file's own bytes. The catalyzer beside it does not grow with the vectors.",
    )
    _rounding(report, results["rounding"])
    if results["lists"] is not None:
        _lists(report, results["lists"])
    report.section("How to use it")
    report.text(
        "remanence search query, with this folder and a file of queries, finds the nearest "
        "vectors; remanence search index --onto this folder adds to a copy of it."
    )
    if faiss:
        report.text(
            "index.faiss needs faiss alone. Its queries are the catalyzer's outputs, which in "
            f'Python are Catalyzer.load("catalyzer.safetensors").at({code["dim"]}).embed(queries), '
            "and its scores are those of this index. It takes a byte a dimension, "
            f"{code['dim']} a vector."
        )
    return report


def _rounding(report: Report, found: Mapping[str, Any] | None) -> None:
    if found is None:
        return
    report.section("Rounding")
    report.table(
        ["vectors", "mean cosine"],
        [
            ["these, after the catalyzer", found["cosine"]],
            ["spread evenly at random", found["uniform"]],
        ],
        f"Mean cosine between a vector and the point it is rounded to, over {found['vectors']:,} "
        "vectors drawn at random.",
    )
    report.text(
        "The code is made for vectors that are spread evenly. A first figure well below the second "
        "says that these are not, and a larger weight of KoLeo in training may help; it says "
        "nothing of whether neighbours stay neighbours, which only recall shows."
    )


def _lists(report: Report, found: Mapping[str, Any]) -> None:
    report.section("Inverted lists")
    report.table(
        ["lists", "empty", "smallest", "median", "largest", "imbalance"],
        [
            [
                found[name]
                for name in ("nlist", "empty", "smallest", "median", "largest", "imbalance")
            ]
        ],
        "Vectors in a list. The imbalance is how many times more vectors a search looks at than if "
        "all lists were alike, queries being like the base.",
    )
    figure = Figure(figsize=(5, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    sizes = np.array(found["sizes"])
    axes.step(np.arange(1, len(sizes) + 1), sizes, where="mid", color="#0072B2", linewidth=1.4)
    axes.axhline(sizes.mean(), color="#888888", linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xlabel="list, by falling size", ylabel="vectors", ylim=(0, None))
    report.figure(
        figure,
        "Sizes of the lists; the dashed line is their mean.",
        "number of vectors in each list, by falling size",
    )
