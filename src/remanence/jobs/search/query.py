"""`remanence search query`: the nearest vectors of an index, and how often they are true."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
from cyclopts import Parameter
from numpy.typing import NDArray

from remanence.errors import InputError
from remanence.jobs.options import check_options
from remanence.jobs.search.folder import check_dimension, open_index
from remanence.kit.devices import launch
from remanence.kit.progress import bar, say
from remanence.kit.report import Report
from remanence.kit.run import RunFolder, run_folder
from remanence.kit.statistics import proportion_interval
from remanence.kit.vectors import Vectors, open_ids, open_vectors, save_vectors
from remanence.search.exact import recall_hits
from remanence.search.index.spread import SpreadIndex

ROWS = 8192  # queries answered at a time; stored codes are decoded once for them all
RECALLS = (1, 10, 100)


@dataclass(frozen=True, eq=False)
class Queried:
    """What `query` leaves behind, for q queries.

    Attributes:
        out: Run folder.
        ids: (q, k), int64, best first; -1 where fewer were found.
        scores: (q, k), float32, cosines, falling; -inf where fewer were found.
        results: What `results.json` holds.
    """

    out: Path
    ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    results: dict[str, Any]


def query(
    index: Path,
    queries: str,
    *,
    out: Path,
    k: Annotated[int, Parameter(name=["--k", "-k"])] = 100,
    nprobe: int | None = None,
    symmetric: bool = False,
    groundtruth: str | None = None,
) -> Queried:
    """Find the nearest vectors of an index.

    The folder OUT holds ids.npy and scores.npy, best first, and ids.ivecs where the ids fit.

    Args:
        index: Folder that `search index` wrote.
        queries: Vectors, as for the index.
        out: Run folder to create.
        k: Vectors to find for each query.
        nprobe: Inverted lists to look at, where the index has them; if not given, the square root
            of their number.
        symmetric: Round queries too and count the bits in which codes differ; for codes of signs.
        groundtruth: Ids of the true nearest vectors of each query, the nearest first, .ivecs or
            .npy: shows how often they are found.
    """
    options: dict[str, Any] = {name: v for name, v in locals().items() if name != "out"}
    check_options(options)
    device = launch(1, "32-true").device
    with run_folder(out, "search query", options) as run:
        asked = open_vectors(queries)
        opened = open_index(index, device)
        check_dimension(asked, opened.transform.in_dim, index)
        if k > len(opened):
            raise InputError(f"--k {k}: {index} holds {len(opened):,} vectors; give at most that")
        truth = None if groundtruth is None else _truth(groundtruth, asked)
        seconds = _search(opened, asked, run, k=k, nprobe=nprobe, symmetric=symmetric)
        ids = np.load(run.path("ids.npy"), mmap_mode="r")
        scores = np.load(run.path("scores.npy"), mmap_mode="r")
        if ids.max() <= np.iinfo(np.int32).max:
            save_vectors(run.path("ids.ivecs"), ids)
        results: dict[str, Any] = {
            "queries": len(asked),
            "vectors": len(opened),
            "k": k,
            "seconds": seconds,
            "rate": len(asked) / seconds,
            "short": int((ids[:, -1] < 0).sum()),
            "recall": None if truth is None else recalls(ids, truth),
            "truth_not_there": None
            if truth is None
            else int((~np.isin(truth, opened.ids.numpy())).sum()),
        }
        run.write_results(results)
        report = _report(results, queries, index, opened)
        report.section("Run")
        report.facts(run.summary())
        report.write(run.path("report.html"))
        found = ", ".join(
            f"recall@{r} {each['share']:.1%}" for r, each in (results["recall"] or {}).items()
        )
        say(f"{len(asked):,} queries in {seconds:.2f} s" + (f"; {found}" if found else ""))
    return Queried(
        out,
        np.load(out.expanduser() / "ids.npy", mmap_mode="r"),
        np.load(out.expanduser() / "scores.npy", mmap_mode="r"),
        results,
    )


def recalls(ids: NDArray[np.int64], truth: NDArray[np.int64]) -> dict[int, dict[str, float]]:
    """Return 1-recall@R with its 95 % interval, for each usual R up to k.

    Args:
        ids: (q, k), best first.
        truth: True nearest of each query (q,).
    """
    hits = recall_hits(ids, truth, [r for r in RECALLS if r <= ids.shape[1]])
    found = {}
    for r, hit in hits.items():
        low, high = proportion_interval(int(hit.sum()), len(hit))
        found[r] = {"share": float(hit.mean()), "low": low, "high": high}
    return found


def _truth(source: str, queries: Vectors) -> NDArray[np.int64]:
    truth = open_ids(source)
    if len(truth) != len(queries):
        raise InputError(
            f"{source}: neighbours of {len(truth)} queries, but {queries.source} has "
            f"{len(queries)}; give those of the same queries"
        )
    return truth[:, 0]


def _search(opened: SpreadIndex, asked: Vectors, run: RunFolder, **how: Any) -> float:
    """Answer all queries into `ids.npy` and `scores.npy`; return the seconds."""
    # Kernels are compiled when first called, which is no part of the rate.
    opened.search(torch.from_numpy(asked.rows(0, 1)), **how)
    seconds = 0.0
    shape = len(asked), how["k"]
    with (
        _npy(run.path("ids.npy"), np.int64, shape) as ids,
        _npy(run.path("scores.npy"), np.float32, shape) as scores,
        bar("query", len(asked)) as progress,
    ):
        for rows in asked.chunks(ROWS):
            began = time.perf_counter()
            found, names = opened.search(torch.from_numpy(rows), **how)
            seconds += time.perf_counter() - began
            ids.write(names.numpy().tobytes())
            scores.write(found.numpy().tobytes())
            progress.advance(len(rows))
    return seconds


def _npy(path: Path, dtype: type[np.generic], shape: tuple[int, int]) -> BinaryIO:
    """Begin a .npy file, whose rows follow: a full disk is then an error, as no map's is."""
    stream = path.open("wb")
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream


def _report(results: Mapping[str, Any], queries: str, index: Path, opened: SpreadIndex) -> Report:
    count, k = results["queries"], results["k"]
    report = Report(
        f"The {k:,} nearest vectors of {count:,} queries",
        f"{queries} in {index}, {results['vectors']:,} vectors",
    )
    if results["recall"] is None:
        report.text(
            "No ground truth was given, so that nothing is known of how many are the true nearest; "
            "--groundtruth takes it."
        )
    else:
        report.table(
            ["R", "recall@R, %", "low", "high"],
            [
                [r, *(100 * each[name] for name in ("share", "low", "high"))]
                for r, each in results["recall"].items()
            ],
            "How often the true nearest vector, by the ground truth, is among the first R found, "
            f"over {count:,} queries; intervals of 95 % (Wilson).",
        )
        if results["truth_not_there"]:
            report.text(
                f"The true nearest of {results['truth_not_there']:,} queries is not in the index: "
                "is this the ground truth of these vectors?"
            )
    report.text(
        f"{results['rate']:,.0f} queries a second, {results['seconds']:.2f} s for all, in batches "
        f"of up to {ROWS:,}, mapping included. Scores are cosines between a query, mapped to the "
        f"sphere in {opened.code.dim} dimensions, and the stored points; they order the results "
        "and are no distances of the vectors themselves."
    )
    if results["short"]:
        report.text(
            f"For {results['short']:,} queries the lists held fewer than {k:,} vectors; the places "
            "left hold id -1. A larger --nprobe looks at more lists."
        )
    return report
