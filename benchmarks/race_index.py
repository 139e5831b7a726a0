"""Race of a million 8-byte codes: ours, decoded on the fly and as int8, and faiss' PQ.

Vectors and queries are uniform on the sphere of 24 dimensions, where the code is (24, r2 = 79) and
needs no transform; product quantisers are trained on 20,000 of the vectors. Everybody searches the
same queries, in batches of 1, 32 and 1,000, for k = 10, on the same number of threads. The 16
subquantisers of FastScan need 32 dimensions, which a random rotation fills. Each index is written
and read back, and what it finds is compared. `--memory NAME FILE` is what the script
calls itself with, to see the peak memory of one index alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import harness
from remanence.search.index.spread import SpreadIndex
from remanence.search.lattice.sphere import SphereLattice

if TYPE_CHECKING:
    from numpy.typing import NDArray

DIM, R2, K, TRAINED = 24, 79, 10, 20_000
BATCHES = (1, 32, 1000)


class Sphere:
    """The identity on unit vectors."""

    in_dim = out_dim = DIM
    digest = "0" * 64

    def embed(self, x: Tensor) -> Tensor:
        """Return the vectors."""
        return normalize(x, dim=1)


class Contestant(Protocol):
    """An index, however it is made."""

    def build(self, vectors: Tensor) -> None:
        """Train on some of the vectors and add all."""

    def search(self, queries: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return scores or distances (q, K), and ids (q, K)."""

    def save(self, path: Path) -> None:
        """Write a file."""

    def load(self, path: Path) -> None:
        """Read it back."""


class Ours:
    """A SpreadIndex."""

    def __init__(self, storage: Any, nlist: int = 0, nprobe: int | None = None) -> None:
        self.nprobe = nprobe
        self.index = SpreadIndex(Sphere(), SphereLattice(DIM, R2), storage=storage, nlist=nlist)

    def build(self, vectors: Tensor) -> None:
        """Train on some of the vectors and add all."""
        if self.index.nlist:
            self.index.train(vectors[: 40 * self.index.nlist])
        self.index.add(vectors)

    def search(self, queries: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return scores or distances (q, K), and ids (q, K)."""
        scores, ids = self.index.search(queries, K, nprobe=self.nprobe)
        return scores.numpy(), ids.numpy()

    def save(self, path: Path) -> None:
        """Write a file."""
        self.index.save(path)

    def load(self, path: Path) -> None:
        """Read it back."""
        self.index = SpreadIndex.load(path, Sphere())


class Faiss:
    """An index of faiss' factory."""

    def __init__(self, key: str) -> None:
        self.index = faiss.index_factory(DIM, key)

    def build(self, vectors: Tensor) -> None:
        """Train on some of the vectors and add all."""
        self.index.train(vectors[:TRAINED].numpy())
        self.index.add(vectors.numpy())

    def search(self, queries: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return scores or distances (q, K), and ids (q, K)."""
        scores, ids = self.index.search(queries.numpy(), K)
        return scores, ids

    def save(self, path: Path) -> None:
        """Write a file."""
        faiss.write_index(self.index, str(path))

    def load(self, path: Path) -> None:
        """Read it back."""
        self.index = faiss.read_index(str(path))


def contestants() -> dict[str, Contestant]:
    """Return everybody, ours first."""
    return {
        "ours, int8": Ours("int8"),
        "ours, codes": Ours("codes"),
        "ours, int8, 16 of 1024 lists": Ours("int8", 1024, 16),
        "ours, codes, 16 of 1024 lists": Ours("codes", 1024, 16),
        "faiss PQ8": Faiss("PQ8"),
        "faiss OPQ8,PQ8": Faiss("OPQ8,PQ8"),
        "faiss RR32,PQ16x4fs": Faiss("RR32,PQ16x4fs"),
    }


def drawn(n: int, seed: int) -> Tensor:
    """Draw vectors uniformly on the sphere."""
    return normalize(torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def lap(index: Contestant, queries: Tensor, batch: int, truth: NDArray[np.int64]) -> harness.Lap:
    """Search all queries in batches."""
    began = time.perf_counter()
    found = [index.search(part)[1] for part in queries.split(batch)]
    seconds = time.perf_counter() - began
    ids = np.concatenate(found)
    recall = float((ids == truth[: len(ids), None]).any(1).mean())
    return harness.Lap(
        len(queries), seconds, {"ms a batch": seconds / len(found) * 1e3, "recall@10": recall}
    )


def store(name: str, index: Contestant, path: Path, queries: Tensor) -> None:
    """Write an index, read it back, and print sizes, seconds and memory."""
    before = index.search(queries)
    began = time.perf_counter()
    index.save(path)
    saved = time.perf_counter()
    index.load(path)
    loaded = time.perf_counter()
    after = index.search(queries)
    same = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    command = [sys.executable, __file__, "--memory", name, str(path)]
    peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]  # noqa: S603 - this script
    print(
        f"{name}: {path.stat().st_size:,} bytes, written in {saved - began:.2f} s, read in "
        f"{loaded - saved:.2f} s, {'identical' if same else 'NOT IDENTICAL'} after; loading and a "
        f"batch of 1,000 take {peak} MB at most"
    )


def memory(name: str, path: Path) -> None:
    """Print by how many MB loading and searching raise the peak memory of this process."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    index, queries = contestants()[name], drawn(1000, 1)
    start = _peak()
    index.load(path)
    index.search(queries)
    print(f"{_peak() - start:.0f}")


def _peak() -> float:
    """Return this program's peak memory in MB; rusage would count what it was forked from."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    """Build, store and race."""
    options = harness.parser(__doc__)
    options.set_defaults(rounds=3)
    options.add_argument("--vectors", type=int, default=1_000_000)
    options.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.memory:
        memory(asked.memory[0], Path(asked.memory[1]))
        return
    facts = harness.environment(["torch", "faiss-cpu", "numba"], asked.threads)
    torch.set_num_threads(asked.threads)
    faiss.omp_set_num_threads(asked.threads)
    vectors, queries = drawn(asked.vectors, 0), drawn(1000, 1)
    truth = faiss.knn(queries.numpy(), vectors.numpy(), 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
    indexes = contestants()
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, index) in enumerate(indexes.items()):
            began = time.perf_counter()
            index.build(vectors)
            print(f"{name}: built in {time.perf_counter() - began:.1f} s")
            store(name, index, Path(folder) / str(number), queries)
    races = []
    for batch, count in zip(BATCHES, (8, 64, 1000), strict=True):
        laps = {
            name: partial(lap, index, queries[:count], batch, truth[:, 0])
            for name, index in indexes.items()
        }
        title = f"{asked.vectors:,} vectors, batches of {batch}, k = {K}"
        races.append(harness.race(title, laps, asked, unit="queries/s"))
    harness.finish(races, facts, asked)


if __name__ == "__main__":
    main()
