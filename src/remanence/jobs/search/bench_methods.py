"""The methods that `remanence search bench` compares, each run by one protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from remanence.errors import InputError
from remanence.jobs.search.folder import Model, stored_bytes, trained_in, trained_on
from remanence.search.catalyzer.linear import PcaTransform
from remanence.search.exact import exact_neighbours
from remanence.search.index.spread import SpreadIndex
from remanence.search.index.transform import Transform
from remanence.search.lattice.code import SphericalCode
from remanence.search.rivals import caveat, rivals, run_rival

Family = Literal["pq", "opq", "rq", "lsq", "itq", "pca"]
FAMILIES: tuple[Family, ...] = get_args(Family)
CATALYZER, CATALYZER_OPQ = "catalyzer", "catalyzer + OPQ"
LONGEST = 100  # results looked at for each query
SOME = 4096  # vectors that a rival is tried with
ROWS = 16_384  # vectors added at a time, as to the rivals
SHORT = {"SphereLattice": "lattice", "E8Shell": "E8", "SignCode": "signs"}

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Data:
    """What all methods share.

    Attributes:
        learn: Vectors to learn from (m, d), float32.
        base: Vectors to find (n, d).
        queries: (q, d).
        truth: Number of each query's nearest base vector (q,).
        threads: Of faiss and torch.
        scratch: Folder for files that are measured and removed.
    """

    learn: NDArray[np.float32]
    base: NDArray[np.float32]
    queries: NDArray[np.float32]
    truth: NDArray[np.int64]
    threads: int
    scratch: Path


@dataclass(frozen=True, eq=False)
class Row:
    """What one method did.

    Attributes:
        name: For the table.
        family: What kind it is; unquantised ones are of no family.
        nbytes: The budget that it belongs to.
        ranks: Place of the true nearest in each query's list (q,), from 0; 100 where it is not
            there.
        stored: Bytes a vector, as stored.
        model: Bytes that do not grow with the base: codebooks, rotation, weights.
        n_train: Vectors it was learned from, where that is known.
        train_seconds: Time to learn; of a catalyzer that of its own run, validation included.
        encode_seconds: Time to code the base, mapping included.
        search_seconds: Time to answer all queries, mapping included.
        failed: Why it could not be run; all figures are then None or empty.
        note: What must be said of it.
    """

    name: str
    family: str | None
    nbytes: int
    ranks: NDArray[np.int64]
    stored: float | None = None
    model: int | None = None
    n_train: int | None = None
    train_seconds: float | None = None
    encode_seconds: float | None = None
    search_seconds: float | None = None
    failed: str | None = None
    note: str = ""

    def figures(self) -> dict[str, Any]:
        """Return all but the ranks, as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "ranks"}


@dataclass(frozen=True)
class Method:
    """A method that is still to be run.

    Attributes:
        name: For the table.
        family: Its kind, or None where nothing is quantised.
        nbytes: The budget.
        run: Gives the row.
    """

    name: str
    family: str | None
    nbytes: int
    run: Callable[[Data, Tell], Row]

    def attempt(self, data: Data, tell: Tell) -> Row:
        """Run it; what cannot be run becomes a row that says why."""
        try:
            return self.run(data, tell)
        except InputError as error:
            none = np.zeros(0, np.int64)
            return Row(self.name, self.family, self.nbytes, none, failed=str(error))


def methods(
    dim: int,
    nbytes: Sequence[int],
    against: Sequence[Family],
    models: Sequence[tuple[str, Model]],
    *,
    catalyzer_opq: bool,
) -> list[Method]:
    """List what is compared, byte count by byte count.

    Args:
        dim: Dimension of the vectors.
        nbytes: Byte counts.
        against: Kinds of rivals.
        models: Trained models, and their names.
        catalyzer_opq: Run OPQ on the catalyzers' outputs too.
    """
    found = []
    for size in nbytes:
        for rival in rivals(dim, size):
            kind = _family(rival.key)
            if kind in against:
                found.append(Method(rival.name, kind, size, _rival(rival.name, rival.key, size)))
                if kind == "pca":
                    kept = int(rival.key.removeprefix("PCA").split(",")[0])
                    name = f"PCA to {kept}, not quantised"
                    found.append(Method(name, None, size, _plain_pca(name, kept, size)))
        for label, model in models:
            found += _of_model(label, model, size, opq=catalyzer_opq)
    return found


def _family(key: str) -> Family:
    return next(kind for kind in FAMILIES if key.lower().startswith(kind))


def _of_model(label: str, model: Model, size: int, *, opq: bool) -> Iterator[Method]:
    if size not in model.codes:
        known = " and ".join(map(str, model.codes))
        name = f"{label} + lattice"
        why = f"{model.folder} has codes of {known} bytes a vector; train with this number too"

        def refuse(_data: Data, _tell: Tell) -> Row:
            raise InputError(why)

        yield Method(name, CATALYZER, size, refuse)
        return
    transform, code = model.choose(size)
    learned = trained_on(model.folder)
    name = f"{label} + {SHORT[type(code).__name__]}"
    yield Method(name, CATALYZER, size, _coded(name, model, size, transform, code))
    if opq:
        for rival in rivals(code.dim, size):
            if rival.key.startswith("OPQ"):
                name = f"{label} + {rival.name}"
                run = _rival(
                    name,
                    rival.key,
                    size,
                    transform,
                    family=CATALYZER_OPQ,
                    weights=_bytes(model),
                )
                yield Method(name, CATALYZER_OPQ, size, run)
    name = f"{label} in {code.dim}, not quantised"
    yield Method(name, None, size, _plain(name, size, transform, _bytes(model), learned))


def _rival(
    name: str,
    key: str,
    size: int,
    transform: Transform | None = None,
    *,
    family: str | None = None,
    weights: int = 0,
) -> Callable[[Data, Tell], Row]:
    """Run a rival on the vectors, or on what a transform of so many bytes makes of them."""

    def run(data: Data, tell: Tell) -> Row:
        (learn, _), (base, mapped), (queries, asked) = (
            _embed(transform, each) for each in (data.learn, data.base, data.queries)
        )
        if "lattice" in key:  # its kernels are compiled when first called, which is no part of it
            run_rival(key, learn[:SOME], base[:1], queries[:1], 1, threads=data.threads)
        found = run_rival(key, learn, base, queries, LONGEST, threads=data.threads, progress=tell)
        return Row(
            name=name,
            family=family or _family(key),
            nbytes=size,
            ranks=ranks(found.ids, data.truth),
            stored=found.bytes_a_vector,
            model=found.model_bytes + weights,
            n_train=found.n_train,
            train_seconds=found.train_seconds,
            encode_seconds=found.encode_seconds + mapped,
            search_seconds=found.search_seconds + asked,
            note=caveat(key, found.n_train),
        )

    return run


def _coded(
    name: str, model: Model, size: int, transform: Transform, code: SphericalCode
) -> Callable[[Data, Tell], Row]:
    """Run a trained catalyzer and its code."""

    def run(data: Data, tell: Tell) -> Row:
        base, queries = torch.from_numpy(data.base), torch.from_numpy(data.queries)
        first = SpreadIndex(transform, code)  # compiles the kernels, which is no part of it
        first.add(base[:1])
        first.search(queries[:1], 1)
        made = SpreadIndex(transform, code)
        began = time.perf_counter()
        for start in range(0, len(base), ROWS):
            made.add(base[start : start + ROWS])
            tell("encode", min(start + ROWS, len(base)), len(base))
        encoded = time.perf_counter()
        tell("search", 0, len(queries))
        _, ids = made.search(queries, LONGEST)
        searched = time.perf_counter()
        path = data.scratch / "bench.safetensors"
        made.save(path)
        stored = stored_bytes(path)
        path.unlink()
        return Row(
            name=name,
            family=CATALYZER,
            nbytes=size,
            ranks=ranks(ids.numpy(), data.truth),
            stored=stored.a_vector(len(made)),
            model=_bytes(model),
            n_train=trained_on(model.folder),
            train_seconds=trained_in(model.folder),
            encode_seconds=encoded - began,
            search_seconds=searched - encoded,
        )

    return run


def _plain(
    name: str, size: int, transform: Transform, model: int, n_train: int | None
) -> Callable[[Data, Tell], Row]:
    """Search the outputs of a map as they are: what its codes could reach at best."""

    def run(data: Data, tell: Tell) -> Row:
        base, mapped = _embed(transform, data.base)
        queries, asked = _embed(transform, data.queries)
        tell("search", 0, len(queries))
        began = time.perf_counter()
        ids, _ = exact_neighbours(queries, base, LONGEST)
        return Row(
            name=name,
            family=None,
            nbytes=size,
            ranks=ranks(ids, data.truth),
            stored=4.0 * transform.out_dim,
            model=model,
            n_train=n_train,
            encode_seconds=mapped,
            search_seconds=time.perf_counter() - began + asked,
        )

    return run


def _plain_pca(name: str, kept: int, size: int) -> Callable[[Data, Tell], Row]:
    def run(data: Data, tell: Tell) -> Row:
        began = time.perf_counter()
        pca = PcaTransform.fit(torch.from_numpy(data.learn), kept)
        seconds = time.perf_counter() - began
        model = pca.mean.nbytes + pca.projection.nbytes
        row = _plain(name, size, pca, model, len(data.learn))(data, tell)
        return replace(row, train_seconds=seconds)

    return run


def _embed(
    transform: Transform | None, x: NDArray[np.float32]
) -> tuple[NDArray[np.float32], float]:
    """Map vectors; return the seconds too."""
    if transform is None:
        return x, 0.0
    began = time.perf_counter()
    mapped: NDArray[np.float32] = transform.embed(torch.from_numpy(x)).numpy()
    return mapped, time.perf_counter() - began


def _bytes(model: Model) -> int:
    return sum(value.nbytes for value in model.catalyzer.state_dict().values())


def ranks(ids: NDArray[np.int64], truth: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the place of the true nearest (q,) in lists (q, k), from 0; k if it is not there."""
    same = ids == truth[:, None]
    places: NDArray[np.int64] = np.where(same.any(1), same.argmax(1), ids.shape[1])
    return places
