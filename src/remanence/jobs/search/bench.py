"""`remanence search bench`: what so many bytes a vector buy, method by method, in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from remanence.errors import InputError
from remanence.jobs.options import check_options
from remanence.jobs.search.bench_methods import (
    FAMILIES,
    LONGEST,
    Data,
    Family,
    Method,
    Row,
    methods,
)
from remanence.jobs.search.bench_report import build_report, compare
from remanence.jobs.search.folder import Model, check_dimension, open_model
from remanence.kit.progress import bar, say
from remanence.kit.run import RunFolder, run_folder
from remanence.kit.vectors import Vectors, check_same_dimension, open_ids, open_vectors
from remanence.search.exact import ROWS, exact_neighbours
from remanence.search.rivals import using_threads

CHECKED = 20  # queries whose given ground truth is computed again


@dataclass(frozen=True, eq=False)
class Benched:
    """What `bench` leaves behind.

    Attributes:
        out: Run folder.
        rows: Every method at every byte count.
        results: What `results.json` holds.
    """

    out: Path
    rows: tuple[Row, ...]
    results: dict[str, Any]


def bench(
    base: str,
    queries: str,
    *,
    learn: str,
    out: Path,
    groundtruth: str | None = None,
    nbytes: list[int] | None = None,
    against: list[Family] | None = None,
    model: list[Path] | None = None,
    catalyzer_opq: bool = True,
    threads: int | None = None,
    seed: int = 0,
    resume: bool = False,
) -> Benched:
    """Compare codes of equal bytes on your own vectors: recall, bytes and time, in one run.

    Every method learns from the same vectors, codes the same base on the processor with the same
    threads, and is asked for the nearest vector of each query in Euclidean distance.

    Args:
        base: Vectors to find, as for search index; held in memory.
        queries: Vectors to look for.
        learn: Vectors to learn from, all of which are used.
        out: Run folder to create.
        groundtruth: Numbers of the nearest base vectors of each query, the nearest first, .ivecs or
            .npy; if not given, they are computed.
        nbytes: Bytes a vector; may be given several times. By default 4 and 8.
        against: Method to compare: pq, opq, rq, lsq, itq, pca (with a lattice); may be given
            several times. By default all.
        model: Folder that search train wrote; may be given several times.
        catalyzer_opq: Run OPQ on the models' outputs as well.
        threads: Threads of all methods; by default those of torch.
        seed: Seed of the order of the learn vectors, which every k-means starts from.
        resume: Go on with the interrupted run in OUT.partial, after its last finished method.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("out", "resume")}
    sizes = _check(options)
    with run_folder(out, "search bench", options, seed=seed, resume=resume) as run:
        sources = open_vectors(base), open_vectors(queries), open_vectors(learn)
        check_same_dimension(*sources)
        if len(sources[0]) < LONGEST:
            raise InputError(f"{base}: has {len(sources[0])} vectors; give at least {LONGEST}")
        models = _open_models(model or (), sources[0])
        dim = sources[0].shape[1]
        listed = methods(
            dim,
            sizes,
            against or FAMILIES,
            models,
            catalyzer_opq=catalyzer_opq,
        )
        if not listed:
            raise InputError(
                f"--against: none of these codes dimension {dim} in "
                f"{' or '.join(map(str, sizes))} bytes; give others or other --nbytes"
            )
        count = threads or torch.get_num_threads()
        state = run.load_state("bench") or {"rows": {}}
        with using_threads(count):
            data = _read(sources, groundtruth, state, run, count, seed)
            rows = _run(listed, data, state, run)
        results: dict[str, Any] = {
            "counts": {
                "learn": len(data.learn),
                "base": len(data.base),
                "queries": len(data.truth),
            },
            "dim": dim,
            "threads": count,
            "shared": _shared(data),
            "sizes": {
                str(size): compare(some, dim)
                for size in sizes
                if (some := [row for row in rows if row.nbytes == size])
            },
        }
        run.write_results(results)
        report = build_report(results, [source.source for source in sources], resumed=run.resumed)
        report.section("Run")
        report.facts(run.summary() | {"threads": str(count)})
        report.write(run.path("report.html"))
        for found in results["sizes"].values():
            say(found["advice"])
    return Benched(out, tuple(rows), results)


def _check(options: Mapping[str, Any]) -> list[int]:
    """Refuse options that cannot work, before anything is opened; return the byte counts."""
    check_options(options)
    sizes = sorted(set(options["nbytes"] or (4, 8)))
    if not 1 <= sizes[0] <= sizes[-1] <= 64:
        wrong = next(size for size in sizes if not 1 <= size <= 64)
        raise InputError(f"--nbytes {wrong}: give 1 to 64 bytes a vector")
    for kind in options["against"] or ():
        if kind not in FAMILIES:
            raise InputError(f"--against {kind}: give one of {', '.join(FAMILIES)}")
    return sizes


def _open_models(folders: Sequence[Path], base: Vectors) -> list[tuple[str, Model]]:
    found = []
    for folder in folders:
        opened = open_model(folder, torch.device("cpu"))
        check_dimension(base, opened.catalyzer.in_dim, folder)
        alone = [one.name for one in folders].count(folder.name) == 1
        name = "" if len(folders) == 1 else f" {folder.name if alone else folder}"
        found.append((f"catalyzer{name}", opened))
    return found


def _read(
    sources: tuple[Vectors, Vectors, Vectors],
    groundtruth: str | None,
    state: dict[str, Any],
    run: RunFolder,
    threads: int,
    seed: int,
) -> Data:
    """Read all vectors, and the ground truth or what was computed of it before."""
    base, queries, learn = (source.array() for source in sources)
    if groundtruth is not None:
        truth = _given(groundtruth, base, queries)
    elif "truth" in state:
        truth = state["truth"].numpy()
    else:
        truth = _exact(base, queries)
        state["truth"] = torch.from_numpy(truth)
        run.save_state("bench", state)
    order = np.random.default_rng(seed).permutation(len(learn))
    return Data(learn[order], base, queries, truth, threads, run.partial)


def _exact(base: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.int64]:
    with bar("ground truth", len(base)) as progress:

        def parts() -> Iterator[NDArray[np.float32]]:
            for start in range(0, len(base), ROWS):
                yield base[start : start + ROWS]
                progress.advance(min(ROWS, len(base) - start))

        return exact_neighbours(queries, parts(), 1)[0][:, 0]


def _given(
    source: str, base: NDArray[np.float32], queries: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Read a ground truth, and compute a little of it again."""
    truth = open_ids(source, below=len(base))[:, 0]
    if len(truth) != len(queries):
        raise InputError(
            f"{source}: neighbours of {len(truth)} queries, but there are {len(queries)}; give "
            "those of the same queries"
        )
    some = np.unique(np.linspace(0, len(queries) - 1, CHECKED).astype(np.int64))
    ids, nearest = exact_neighbours(queries[some], base, 1)
    gaps = queries[some].astype(np.float64) - base[truth[some]]
    for at, query in enumerate(some):
        if float(np.square(gaps[at]).sum()) > (1 + 1e-3) * float(nearest[at, 0]):
            raise InputError(
                f"{source}: says that vector {truth[query]} is nearest to query {query}, but "
                f"{ids[at, 0]} is nearer; give the ground truth of this base, by Euclidean distance"
            )
    return truth


def _run(listed: Sequence[Method], data: Data, state: dict[str, Any], run: RunFolder) -> list[Row]:
    """Run the methods that an interrupted run did not finish; keep each result for `--resume`."""
    kept = state["rows"]
    run.keep_metrics({"method": len(kept)})
    rows = []
    with bar("methods", len(listed), done=len(kept)) as progress:
        for method in listed:
            key = f"{method.nbytes} {method.name}"
            if key not in kept:
                title = f"{method.nbytes} bytes, {method.name}"

                def tell(stage: str, done: int, total: int, title: str = title) -> None:
                    progress.note(f"{title}: {stage} {done / total:.0%}")

                tell("train", 0, 1)
                row = method.attempt(data, tell)
                kept[key] = row.figures() | {"ranks": torch.from_numpy(row.ranks)}
                # Logged first: a line too many is dropped when the run goes on.
                run.log(stage="method", step=len(kept), **row.figures())
                run.save_state("bench", state)
                progress.advance()
                said = row.failed or f"recall@1 {(row.ranks == 0).mean():.1%}"
                say(f"{title}: {said}" + f"; {row.note}" * bool(row.note))
            held = dict(kept[key])
            rows.append(Row(**(held | {"ranks": held["ranks"].numpy()})))
        progress.note("")
    return rows


def _shared(data: Data) -> dict[str, int]:
    """Count vectors that stand in two of the sets."""
    learn, base, queries = (
        {hash(row.tobytes()) for row in each} for each in (data.learn, data.base, data.queries)
    )
    return {
        "learn and base": len(learn & base),
        "learn and queries": len(learn & queries),
        "base and queries": len(base & queries),
    }
