"""What else so many bytes a vector buy: faiss's codes and PCA with a lattice, under one protocol.

All learn from the same vectors, code the same base and answer the same queries for the nearest
neighbours in the squared Euclidean distance of the input space.

| key | is |
|---|---|
| `PQ8` | product quantiser, 8 bytes |
| `OPQ8_32,PQ8` | learned rotation to 32 dimensions first (Ge et al., CVPR 2013) |
| `RQ8x8` | residual quantiser: codewords of full dimension, chosen greedily with a beam |
| `LSQ8x8` | additive quantiser, chosen by local search (Martinez et al., ECCV 2018) |
| `ITQ64,LSH` | signs after a learned rotation, Hamming distance (Gong et al., CVPR 2011) |
| `PCA24,lattice79` | `PcaTransform`, then `SphereLattice` of that squared radius |

RQ and LSQ compare queries with decoded vectors, which is exact and stores nothing beside the codes;
faiss's faster tables need a norm for each vector.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import faiss
import numpy as np
import torch

from remanence.errors import InputError
from remanence.search.catalyzer.linear import PcaTransform
from remanence.search.lattice.counting import radius_for_bits
from remanence.search.lattice.sphere import SphereLattice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import ArrayLike, NDArray

CENTROIDS = 256  # of one byte; no fewer vectors can be learned from
ROWS = 16_384  # vectors coded or decoded at a time
SPARSE = 10  # training vectors a codeword from which LSQ is itself


@dataclass(frozen=True)
class Rival:
    """One way to code vectors.

    Attributes:
        name: For a table.
        key: For `run_rival`; all but the lattice's are faiss index_factory strings.
    """

    name: str
    key: str


@dataclass(frozen=True, eq=False)
class Found:
    """What a rival found, and what it cost.

    Attributes:
        ids: Numbers of base vectors (q, k), int64, best first.
        train_seconds: Time to learn.
        encode_seconds: Time to code the base.
        search_seconds: Time to answer all queries in one batch, decoding included.
        bytes_a_vector: Growth of the stored index by the base, over n; nothing is left out.
        model_bytes: Size of the stored index while empty: codebooks, rotation, header.
        n_train: Vectors learned from.
    """

    ids: NDArray[np.int64]
    train_seconds: float
    encode_seconds: float
    search_seconds: float
    bytes_a_vector: float
    model_bytes: int
    n_train: int


def rivals(dim: int, nbytes: int) -> list[Rival]:
    """List the rivals that can code vectors of a dimension in so many bytes each.

    A rotation or a PCA may keep fewer dimensions, and how many are best depends on the data: each
    number stands as a rival of its own, so that none is chosen by looking at the answer.

    Args:
        dim: Dimension of the vectors.
        nbytes: Bytes a vector.

    Returns:
        The rivals; a product quantiser is left out where nbytes does not divide dim.

    Raises:
        InputError: An argument is below 1.
    """
    if dim < 1 or nbytes < 1:
        raise InputError(f"{nbytes} bytes for dimension {dim}: give at least 1 of each")
    b = nbytes
    known = [Rival("PQ", f"PQ{b}")] if dim % b == 0 else []
    rotated = sorted({4 * b, 8 * b, dim - dim % b}, reverse=True)
    known += [Rival(f"OPQ to {d}", f"OPQ{b}_{d},PQ{b}") for d in rotated if 0 < d <= dim]
    known += [Rival("RQ", f"RQ{b}x8"), Rival("LSQ", f"LSQ{b}x8")]
    if 8 * b <= dim:
        known.append(Rival("ITQ", f"ITQ{8 * b},LSH"))
    for kept in (4 * b, 3 * b):  # 2 and 2.7 bits a dimension
        if 2 <= kept <= dim:
            r2 = radius_for_bits(kept, 8 * b)
            known.append(Rival(f"PCA to {kept} + lattice", f"PCA{kept},lattice{r2}"))
    return known


def caveat(key: str, n_train: int) -> str:
    """Return what must be said of a rival that learned from so few vectors; "" where nothing must.

    LSQ solves for all its codewords at once, by least squares with next to no ridge: with about as
    many vectors as codewords it learns these by heart. On SIFT descriptors at 4 bytes (1,024
    codewords) its recall@10 beside that of RQ is 2 against 59 % from 1,000 vectors, 66 against 69
    from 4,000, 78 against 73 from 20,000. faiss's defaults stand, as nobody asked for others.
    """
    known = re.fullmatch(r"LSQ(\d+)x8", key, re.ASCII)
    if known is None or n_train >= (least := SPARSE * CENTROIDS * int(known[1])):
        return ""
    return (
        f"LSQ of {known[1]} bytes learns {n_train:,} vectors by heart and does badly on others: "
        f"it wants {least:,} or more"
    )


def run_rival(
    key: str,
    train: ArrayLike,
    base: ArrayLike,
    queries: ArrayLike,
    k: int,
    *,
    threads: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> Found:
    """Learn, code a base and search it.

    Args:
        key: Of a `Rival`.
        train: Vectors to learn from (n_train, d), at least 256; all are used, as float32, as all
            that follow. (OPQ turns on at most 256,000; RQ's beams are sampled down to as many.)
        base: Vectors to code (n, d).
        queries: (q, d).
        k: Neighbours to find, 1 to n.
        threads: Of faiss and torch; both get their own number back afterwards.
        progress: Called with a stage (train, encode or search), the vectors done and all of them,
            at its start and as it goes on.

    Returns:
        What it found. Equal arguments give equal numbers on one machine.

    Raises:
        InputError: The key is unknown or does not fit the dimension, shapes do not match, a row is
            not finite, there is too little to learn from, a count is out of range, or faiss
            refuses.
    """
    learn, stored, asked = (
        _table(x, what) for x, what in ((train, "training"), (base, "base"), (queries, "query"))
    )
    dim = learn.shape[1]
    if not dim == stored.shape[1] == asked.shape[1]:
        raise InputError(
            f"training, base and query vectors of dimensions {dim}, {stored.shape[1]} and "
            f"{asked.shape[1]}: give vectors of one kind"
        )
    if len(learn) < CENTROIDS:
        raise InputError(f"{len(learn)} training vectors: give at least {CENTROIDS}")
    if not 1 <= k <= len(stored) or threads < 1:
        raise InputError(f"{k} of {len(stored)} base vectors, {threads} threads: give at least 1")
    tell = progress or (lambda _stage, _done, _total: None)
    coder = _open(key, dim)
    with using_threads(threads):
        tell("train", 0, len(learn))
        started = time.perf_counter()
        coder.train(learn)
        trained = time.perf_counter()
        tell("train", len(learn), len(learn))
        model_bytes = coder.stored_bytes()
        tell("encode", 0, len(stored))
        encode_seconds = 0.0
        for start in range(0, len(stored), ROWS):
            part = stored[start : start + ROWS]
            began = time.perf_counter()
            coder.add(part)
            encode_seconds += time.perf_counter() - began
            tell("encode", start + len(part), len(stored))
        bytes_a_vector = (coder.stored_bytes() - model_bytes) / len(stored)
        tell("search", 0, len(asked))
        began = time.perf_counter()
        ids = coder.search(asked, k)
        search_seconds = time.perf_counter() - began
        tell("search", len(asked), len(asked))
    return Found(
        ids=ids,
        train_seconds=trained - started,
        encode_seconds=encode_seconds,
        search_seconds=search_seconds,
        bytes_a_vector=bytes_a_vector,
        model_bytes=model_bytes,
        n_train=len(learn),
    )


class _Coder(Protocol):
    """What the protocol needs of a rival."""

    def train(self, x: NDArray[np.float32]) -> None: ...
    def add(self, x: NDArray[np.float32]) -> None: ...
    def search(self, x: NDArray[np.float32], k: int) -> NDArray[np.int64]: ...
    def stored_bytes(self) -> int: ...


def _open(key: str, dim: int) -> _Coder:
    lattice = re.fullmatch(r"PCA(\d+),lattice(\d+)", key, re.ASCII)
    if lattice is not None:
        kept, r2 = int(lattice[1]), int(lattice[2])
        if kept > dim:
            raise InputError(f"{key}: keeps more than the {dim} dimensions there are")
        return _Lattice(kept, r2)
    known = r"PQ\d+|OPQ\d+_\d+,PQ\d+|RQ\d+x8|LSQ\d+x8|ITQ\d+,LSH"
    if re.fullmatch(known, key, re.ASCII) is None:
        raise InputError(f"rival {key!r}: give the key of one that `rivals` lists")
    try:
        return _Faiss(faiss.index_factory(dim, key), key)
    except RuntimeError as error:
        raise InputError(f"{key}: does not fit vectors of dimension {dim}") from error


class _Faiss:
    """A flat index of faiss."""

    def __init__(self, index: Any, key: str) -> None:
        self.index = index
        self.code: Any = index
        self.rotation: Any = None
        if isinstance(index, faiss.IndexPreTransform):
            chain: Any = index.chain  # faiss's stubs take it for a list
            self.rotation = faiss.downcast_VectorTransform(chain.at(0))
            self.code = faiss.downcast_index(index.index)
        self.additive = isinstance(self.code, faiss.IndexAdditiveQuantizer)
        self.key = key

    def train(self, x: NDArray[np.float32]) -> None:
        # By default faiss samples 256 vectors a centroid, and warns on the terminal below 39.
        most = max(256, -(-len(x) // CENTROIDS))
        quantizer: Any = getattr(self.code, "pq", None) or getattr(self.code, "rq", None)
        clusterings = [] if quantizer is None else [quantizer.cp]
        if hasattr(self.code, "do_polysemous_training"):
            # Seconds of renumbering the centroids for a Hamming filter that is not used here.
            self.code.do_polysemous_training = False
        if isinstance(self.rotation, faiss.OPQMatrix):
            # Its own quantiser, for its settings; held here, as faiss does not own it.
            self.inner = faiss.ProductQuantizer(self.code.d, quantizer.M, quantizer.nbits)
            self.rotation.pq = self.inner
            self.rotation.max_train_points = max(len(x), self.rotation.max_train_points)
            clusterings.append(self.inner.cp)
        elif isinstance(self.rotation, faiss.ITQTransform):
            self.rotation.max_train_per_dim = -(-len(x) // x.shape[1])
        for clustering in clusterings:
            clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, most
        with _refusals(self.key):
            self.index.train(x)

    def add(self, x: NDArray[np.float32]) -> None:
        with _refusals(self.key):
            self.index.add(x)

    def search(self, x: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        if not self.additive:
            with _refusals(self.key):
                ids: NDArray[np.int64] = self.index.search(x, k)[1]
            return ids
        # As the index's own search, which decodes the base once a query.
        return _search_decoded(
            self.index.reconstruct_n,
            self.index.ntotal,
            x,
            k,
            faiss.METRIC_L2,
        )

    def stored_bytes(self) -> int:
        return len(faiss.serialize_index(self.index))


class _Lattice:
    """PCA, and the spherical lattice on its outputs."""

    def __init__(self, kept: int, r2: int) -> None:
        self.kept, self.code = kept, SphereLattice(kept, r2)
        self.codes = torch.empty((0, self.code.nbytes), dtype=torch.uint8)

    def train(self, x: NDArray[np.float32]) -> None:
        self.pca = PcaTransform.fit(torch.from_numpy(x), self.kept)

    def add(self, x: NDArray[np.float32]) -> None:
        new = self.code.encode(self.pca.embed(torch.from_numpy(x)))
        self.codes = torch.cat([self.codes, new])

    def search(self, x: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        return _search_decoded(
            lambda start, n: self.code.decode(self.codes[start : start + n]).numpy(),
            len(self.codes),
            self.pca.embed(torch.from_numpy(x)).numpy(),
            k,
            faiss.METRIC_INNER_PRODUCT,
        )

    def stored_bytes(self) -> int:
        model = (self.pca.mean, self.pca.projection)
        return self.codes.nbytes + sum(tensor.nbytes for tensor in model)


def _search_decoded(
    decode: Callable[[int, int], NDArray[np.float32]],
    count: int,
    queries: NDArray[np.float32],
    k: int,
    metric: int,
) -> NDArray[np.int64]:
    """Compare queries with decoded vectors, a chunk at a time."""
    best = faiss.ResultHeap(len(queries), k, keep_max=metric == faiss.METRIC_INNER_PRODUCT)
    for start in range(0, count, ROWS):
        rows = decode(start, min(ROWS, count - start))
        costs, ids = faiss.knn(queries, rows, min(k, len(rows)), metric=metric)
        best.add_result(costs, ids + start)
    best.finalize()
    return np.asarray(best.I)


@contextmanager
def _refusals(key: str) -> Iterator[None]:
    """Make what faiss throws, which arrives as a RuntimeError, a line to read."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(f"{key}: faiss refuses: {' '.join(str(error).split())}") from error


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Give faiss and torch so many threads, and their own number back afterwards."""
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(count)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before[0])
        torch.set_num_threads(before[1])


def _table(values: ArrayLike, what: str) -> NDArray[np.float32]:
    rows = np.ascontiguousarray(values, np.float32)
    if rows.ndim != 2 or not rows.size:
        raise InputError(f"{what} vectors of shape {rows.shape}: give (n, d), at least one")
    finite = np.isfinite(rows).all(1)
    if not finite.all():
        raise InputError(f"{what} row {finite.argmin()} holds NaN or infinity: leave it out")
    return rows
