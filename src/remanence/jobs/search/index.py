"""`remanence search index`: vectors in a few bytes each, to be found again (arXiv 1806.03198)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from remanence.errors import InputError
from remanence.jobs.options import check_options
from remanence.jobs.search.folder import (
    INDEX,
    Model,
    check_dimension,
    open_index,
    open_model,
    read_ids,
    save_index,
    stored_bytes,
)
from remanence.jobs.search.index_report import build_report
from remanence.kit.devices import launch
from remanence.kit.progress import bar, say
from remanence.kit.run import RunFolder, run_folder
from remanence.kit.vectors import CHUNK, Vectors, open_vectors
from remanence.search.index import file
from remanence.search.index.spread import Kind, SpreadIndex

A_LIST = 256  # vectors that a centroid is learned from, as many as faiss's k-means looks at
LOOKED_AT = 10_000  # vectors whose rounding is measured


@dataclass(frozen=True, eq=False)
class Indexed:
    """What `index` leaves behind.

    Attributes:
        out: Run folder.
        index: The index, as written to `out / "index.safetensors"`.
        results: What `results.json` holds.
    """

    out: Path
    index: SpreadIndex
    results: dict[str, Any]


def index(
    model: Path,
    *base: str,
    out: Path,
    nbytes: int | None = None,
    nlist: int | None = None,
    storage: Kind | None = None,
    ids: Path | None = None,
    onto: Path | None = None,
    remove: Path | None = None,
    merge: list[Path] | None = None,
    faiss: bool = False,
    seed: int = 0,
) -> Indexed:
    """Store vectors in a few bytes each, so that their nearest neighbours can be found.

    Each vector goes through the model's catalyzer and is rounded to a point of a sphere, whose
    number is kept. The folder OUT holds the index, and what queries need of the model.

    Args:
        model: Folder that `search train` wrote, or an index that has a copy of it.
        base: Vectors: digits, .fvecs, .bvecs, .npy, .npz, .fbin, .safetensors or .parquet, added
            in order; @START:STOP behind a name takes some rows.
        out: Run folder to create.
        nbytes: Bytes a vector, one of those that the model was trained for. If not given, 8, or the
            only one.
        nlist: Inverted lists, of which a search looks at a few; 0 for none. If not given, 0.
        storage: How a search holds the vectors in memory: codes takes the fewest bytes, int8 a byte
            a dimension and less time. Files are of one size. If not given, codes.
        ids: Ids of the base vectors, .npy, .ivecs or .txt; if not given, they number on from 0 or
            from the largest id there was.
        onto: Index to add to; a copy of it is made, with its own bytes, lists and storage.
        remove: Ids to remove from that copy, before anything is added.
        merge: Index, made with the same model, whose vectors are added under their ids; may be
            given several times.
        faiss: Write index.faiss too, a plain faiss index that gives the same scores to embedded
            queries; a byte a dimension.
        seed: Seed of the lists.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k != "out"}
    _check(options)
    device = launch(1, "32-true").device
    with run_folder(out, "search index", options, seed=seed) as run:
        opened = open_model(model, device)
        sources = [open_vectors(source) for source in base]
        for source in sources:
            check_dimension(source, opened.catalyzer.in_dim, opened.folder)
        count = sum(len(source) for source in sources)
        names = None if ids is None else read_ids(ids, count)
        gone = None if remove is None else read_ids(remove)
        if onto is None:
            transform, code = opened.choose(nbytes)
            made = SpreadIndex(
                transform, code, storage=storage or "codes", nlist=nlist or 0, seed=seed
            )
        else:
            made = open_index(onto, device, opened)
        results: dict[str, Any] = {"before": len(made), "removed": 0, "not_there": 0}
        if gone is not None:
            results["removed"] = made.remove(torch.from_numpy(gone))
            results["not_there"] = len(np.unique(gone)) - results["removed"]
        if nlist:
            made.train(torch.from_numpy(_sample(sources, A_LIST * nlist, seed)))
        kept = len(made)
        for other in merge or ():
            made.merge(open_index(other, device, opened))
        results["merged"] = len(made) - kept
        seconds = _add(made, sources, names, run, device)
        save_index(run.partial, made, opened)
        if faiss:
            _write_faiss(made, run.path("index.faiss"))
        results |= _measured(made, opened, sources, seconds, run, seed)
        run.write_results(results)
        report = build_report(results, [source.source for source in sources], faiss=faiss)
        report.section("Run")
        report.facts(run.summary())
        report.write(run.path("report.html"))
        taken = results["bytes_a_vector"]
        say(f"{len(made):,} vectors, {taken:.4g} bytes each; {count:,} added in {seconds:.1f} s")
    return Indexed(out, made, results)


def _check(options: Mapping[str, Any]) -> None:
    """Refuse options that cannot work, before anything is opened."""
    check_options(options)
    sources = options["base"], options["onto"], options["merge"]
    if not any(sources):
        raise InputError("BASE: give vectors to store, or --onto or --merge with an index")
    if options["onto"] is None and options["remove"] is not None:
        raise InputError("--remove: give the index to remove from as --onto")
    for name in ("nbytes", "nlist", "storage"):
        if options["onto"] is not None and options[name] is not None:
            raise InputError(f"--{name}: an index that is added to keeps its own; leave it out")
    if options["ids"] is not None and not options["base"]:
        raise InputError("--ids: names the vectors of BASE, and none are given")
    if options["nlist"] and not options["base"]:
        raise InputError("--nlist: lists are learned from the vectors of BASE; give some")


def _sample(sources: Sequence[Vectors], most: int, seed: int) -> NDArray[np.float32]:
    """Draw vectors at random from all sources."""
    ends = np.cumsum([len(source) for source in sources])
    drawn = np.random.default_rng(seed).permutation(ends[-1])[:most]
    drawn.sort()
    parts = []
    for source, stop in zip(sources, ends, strict=True):
        start = stop - len(source)
        here = drawn[(drawn >= start) & (drawn < stop)]
        parts.append(source.take(here - start))
    found: NDArray[np.float32] = np.concatenate(parts)
    return found


def _add(
    made: SpreadIndex,
    sources: Sequence[Vectors],
    names: NDArray[np.int64] | None,
    run: RunFolder,
    device: torch.device,
) -> float:
    """Add all vectors, a chunk at a time; return the seconds."""
    if not sources:
        return 0.0
    # Kernels are compiled when first called, which is no part of the rate.
    made.code.encode(made.transform.embed(torch.from_numpy(sources[0].rows(0, 1)).to(device)))
    done, began = 0, time.perf_counter()
    with bar("index", sum(len(source) for source in sources)) as progress:
        for source in sources:
            started = time.perf_counter()
            for rows in source.chunks(CHUNK):
                some = None if names is None else torch.from_numpy(names[done : done + len(rows)])
                made.add(torch.from_numpy(rows).to(device), some)
                done += len(rows)
                progress.advance(len(rows))
            took = time.perf_counter() - started
            run.log(stage="add", source=source.source, vectors=len(source), seconds=took)
    return time.perf_counter() - began


def _write_faiss(made: SpreadIndex, path: Path) -> None:
    import faiss

    faiss.write_index(made.to_faiss(), str(path))


def _measured(
    made: SpreadIndex,
    model: Model,
    sources: Sequence[Vectors],
    seconds: float,
    run: RunFolder,
    seed: int,
) -> dict[str, Any]:
    """Return what the index takes and how well its code fits."""
    added, code, path = sum(len(source) for source in sources), made.code, run.path(INDEX)
    stored = stored_bytes(path)
    rounding: dict[str, Any] | None = None
    if sources:
        looked = torch.from_numpy(_sample(sources, LOOKED_AT, seed))
        even = torch.randn(len(looked), code.dim, generator=torch.Generator().manual_seed(seed))
        rounding = {
            "vectors": len(looked),
            "cosine": _cosine(made, made.transform.embed(looked)),
            "uniform": _cosine(made, torch.nn.functional.normalize(even, dim=1)),
        }
    return {
        "vectors": len(made),
        "added": added,
        "model": str(model.folder),
        "code": file.describe(code) | {"bits": code.bits, "nbytes": code.nbytes},
        "storage": made.storage,
        "bytes": asdict(stored),
        "bytes_a_vector": stored.a_vector(len(made)),
        "seconds": seconds,
        "rate": added / seconds if seconds else None,
        "rounding": rounding,
        "lists": _balance(path, made.nlist) if made.nlist else None,
    }


def _cosine(made: SpreadIndex, units: torch.Tensor) -> float:
    """Return the mean cosine between unit vectors (n, dim) and what their codes stand for."""
    code = made.code
    decoded = code.dequantize(code.quantize(units))
    return float((units.double() * decoded.double()).sum(1).mean())


def _balance(path: Path, nlist: int) -> dict[str, Any]:
    """Return how evenly the vectors of an index file are spread over its lists."""
    with safe_open(path, "numpy") as opened:
        sizes = np.bincount(opened.get_tensor("lists"), minlength=nlist)
    total = int(sizes.sum())
    return {
        "nlist": nlist,
        "empty": int((sizes == 0).sum()),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "largest": int(sizes.max()),
        # 1 where all lists are alike: how many times more vectors a search looks at.
        "imbalance": float(nlist * np.square(sizes / total).sum()) if total else None,
        "sizes": np.sort(sizes)[::-1].tolist(),
    }
