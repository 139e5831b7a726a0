"""Race of the spherical lattice's codec: nearest point, number of a point, point of a number.

Ours, ours in torch as it runs on a GPU (on the processor here), and faiss's ZnSphereCodec get the
same unit vectors. The column `cosine` is the mean over the vectors that are rounded or decoded, and
must be alike. faiss numbers points in another order, so each decodes its own codes. Shells
that faiss cannot number are left out; so are larger codes than its 64 bits.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import torch
from torch import Tensor

import harness
from remanence.search.lattice.sphere import SphereLattice

if TYPE_CHECKING:
    from collections.abc import Callable

SHELLS = [(24, 79), (16, 21), (32, 36)]


class Ours:
    """The lattice as users call it."""

    name = "ours"

    def __init__(self, dim: int, r2: int) -> None:
        self.lattice = SphereLattice(dim, r2)

    def nearest(self, x: Tensor) -> Any:
        """Return the points of vectors."""
        return self.lattice.quantize(x)

    def encode(self, points: Any) -> Any:
        """Return the codes of points."""
        return self.lattice.rank(points)

    def decode(self, codes: Any) -> Any:
        """Return the points of codes."""
        return self.lattice.unrank(codes)

    def values(self, points: Any) -> Tensor:
        """Return points as float tensor."""
        return torch.as_tensor(points).float()


class InTorch(Ours):
    """The same without compiled code."""

    name = "ours, torch"

    def nearest(self, x: Tensor) -> Any:
        """Return the points of vectors, in pieces as on a GPU."""
        rows = max(2**21 // (len(self.lattice.leaders) + x.shape[1]), 1)
        return torch.cat([self.lattice._match(part) for part in x.split(rows)])  # noqa: SLF001 - the path that CUDA tensors take

    def encode(self, points: Any) -> Any:
        """Return the codes of points."""
        return self.lattice._ranking._rank(points)[0]  # noqa: SLF001 - likewise

    def decode(self, codes: Any) -> Any:
        """Return the points of codes."""
        return self.lattice._ranking._unrank(codes)[0]  # noqa: SLF001 - likewise


class Faiss(Ours):
    """faiss.ZnSphereCodec."""

    name = "faiss ZnSphereCodec"

    def __init__(self, dim: int, r2: int) -> None:
        self.codec = faiss.ZnSphereCodec(dim, r2)
        self.dim = dim

    def nearest(self, x: Tensor) -> Any:
        """Return the points of vectors."""
        rows = x.numpy()
        points, scores = np.empty_like(rows), np.empty(len(rows), np.float32)
        self.codec.search_multi(
            len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(points), faiss.swig_ptr(scores)
        )
        return points

    def encode(self, points: Any) -> Any:
        """Return the codes of points."""
        codes = np.empty(len(points), np.uint64)
        self.codec.encode_multi(len(points), faiss.swig_ptr(points), faiss.swig_ptr(codes))
        return codes

    def decode(self, codes: Any) -> Any:
        """Return the points of codes."""
        points = np.empty((len(codes), self.dim), np.float32)
        self.codec.decode_multi(len(codes), faiss.swig_ptr(codes), faiss.swig_ptr(points))
        return points


def lap(work: Callable[[], Any], x: Tensor, values: Callable[[Any], Tensor] | None) -> harness.Lap:
    """Time a piece of work on vectors."""
    began = time.perf_counter()
    done = work()
    seconds = time.perf_counter() - began
    facts = {"us a vector": 1e6 * seconds / len(x)}
    if values is not None:
        facts["cosine"] = torch.cosine_similarity(values(done), x).mean().item()
    return harness.Lap(len(x), seconds, facts)


def main() -> None:
    """Race the three steps on each shell."""
    options = harness.parser(__doc__)
    options.add_argument("--vectors", type=int, default=200_000)
    asked = options.parse_args()
    facts = harness.environment(["torch", "faiss-cpu", "numba"], asked.threads)
    torch.set_num_threads(asked.threads)
    faiss.omp_set_num_threads(asked.threads)
    races = []
    for dim, r2 in SHELLS:
        generator = torch.Generator().manual_seed(0)
        x = torch.nn.functional.normalize(
            torch.randn(asked.vectors, dim, generator=generator), dim=1
        )
        contestants = [kind(dim, r2) for kind in (Ours, InTorch, Faiss)]
        laps: dict[str, dict[str, Callable[[], harness.Lap]]] = {
            "nearest point": {},
            "encode": {},
            "decode": {},
        }
        for one in contestants:
            points = one.nearest(x)
            codes = one.encode(points)
            laps["nearest point"][one.name] = partial(lap, partial(one.nearest, x), x, one.values)
            laps["encode"][one.name] = partial(lap, partial(one.encode, points), x, None)
            laps["decode"][one.name] = partial(lap, partial(one.decode, codes), x, one.values)
        for step, runs in laps.items():
            title = f"{step}: dimension {dim}, squared radius {r2}"
            races.append(harness.race(title, runs, asked, unit="vectors/s"))
    harness.finish(races, facts, asked)


if __name__ == "__main__":
    main()
