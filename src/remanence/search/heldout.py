"""How well codes find the neighbours of vectors that nothing learned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from remanence.errors import InputError
from remanence.search.exact import exact_neighbours, recall_at
from remanence.search.index.spread import SpreadIndex

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from remanence.search.catalyzer.network import Catalyzer, Embedding
    from remanence.search.lattice.code import SphericalCode

RANKS = (1, 10, 100)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Queries, and a base to find their neighbours in.

    Attributes:
        base: Vectors (n, in_dim), float32.
        queries: Vectors (q, in_dim), float32.
        truth: Number of each query's nearest base vector, by Euclidean distance of the inputs,
            (q,), int64.
    """

    base: Tensor
    queries: Tensor
    truth: NDArray[np.int64]

    @classmethod
    def of(cls, base: Tensor, queries: Tensor) -> HeldOut:
        """Find the truth.

        Raises:
            InputError: The base has fewer than 100 vectors, the dimensions differ, or a row is not
                finite.
        """
        if len(base) < max(RANKS):
            raise InputError(f"{len(base)} vectors to search among: give at least {max(RANKS)}")
        truth, _ = exact_neighbours(queries.numpy(), base.numpy(), 1)
        return cls(base, queries, truth[:, 0])

    def found(self, embedding: Embedding, code: SphericalCode | None) -> NDArray[np.int64]:
        """Return the 100 base vectors that a search puts first (q, 100).

        Args:
            embedding: Map to the sphere.
            code: What base vectors are rounded to, queries being compared as they are; None for
                base vectors as they are.
        """
        if code is None:
            asked, stored = (embedding.embed(x).numpy() for x in (self.queries, self.base))
            return exact_neighbours(asked, stored, max(RANKS))[0]
        index = SpreadIndex(embedding, code, storage="int8")
        index.add(self.base)
        ids: NDArray[np.int64] = index.search(self.queries, max(RANKS))[1].numpy()
        return ids


@dataclass(frozen=True)
class Score:
    """Recall of one code of a catalyzer.

    Attributes:
        dim: Dimension of the sphere's space.
        r2: Squared norm of the code's points.
        nbytes: Bytes of a code.
        floats: Recall@1, @10 and @100 of the outputs before they are rounded.
        quantised: The same with the base in codes.
    """

    dim: int
    r2: int
    nbytes: int
    floats: tuple[float, ...]
    quantised: tuple[float, ...]

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Score:
        """Rebuild one from `dataclasses.asdict`, by way of JSON or not."""
        recalls = {name: tuple(plain[name]) for name in ("floats", "quantised")}
        return cls(plain["dim"], plain["r2"], plain["nbytes"], **recalls)


def score(
    catalyzer: Catalyzer, codes: Sequence[SphericalCode], held_out: HeldOut
) -> tuple[Score, ...]:
    """Measure each code of a catalyzer, on one set of queries."""
    plain: dict[int, tuple[float, ...]] = {}
    scores = []
    for code in codes:
        embedding = catalyzer.at(code.dim)
        if code.dim not in plain:
            plain[code.dim] = _recalls(held_out.found(embedding, None), held_out)
        rounded = _recalls(held_out.found(embedding, code), held_out)
        scores.append(Score(code.dim, code.r2, code.nbytes, plain[code.dim], rounded))
    return tuple(scores)


def recall_at_10(scores: Sequence[Score]) -> float:
    """Return what is maximised: recall@10 with the base in codes, the mean over the codes."""
    return sum(each.quantised[1] for each in scores) / len(scores)


def merit(scores: Sequence[Score]) -> tuple[float, float]:
    """Return what orders choices: recall@10 as above, and between equal ones recall@1."""
    return recall_at_10(scores), sum(each.quantised[0] for each in scores) / len(scores)


def split(
    vectors: Tensor, share: float, *, most: int = 5000, seed: int = 0
) -> tuple[Tensor, HeldOut, HeldOut]:
    """Hold vectors out: a base, queries to choose by, and queries to report by.

    Whatever is chosen by the first queries looks better on them than it is; the second are looked
    at once, at the end.

    Args:
        vectors: (n, in_dim), float32.
        share: Share of the vectors to hold out; a sixth of them each become queries.
        most: Queries of each of the two sets, at most.
        seed: Of the draw.

    Returns:
        The vectors to train on, in their order, and both sets, with one base.

    Raises:
        InputError: The base has fewer than 100 vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(vectors), generator=generator)
    held = round(share * len(vectors))
    asked = min(held // 6, most)
    if held - 2 * asked < max(RANKS):
        raise InputError(
            f"a share of {share:.3g} of {len(vectors)} vectors leaves {held - 2 * asked} to search "
            f"among: give more vectors, or hold out at least {1.5 * max(RANKS) / len(vectors):.2g}"
        )
    base = vectors[order[2 * asked : held]]
    choosing, reporting = (
        HeldOut.of(base, vectors[order[start : start + asked]]) for start in (0, asked)
    )
    return vectors[order[held:].sort().values], choosing, reporting


def _recalls(found: NDArray[np.int64], held_out: HeldOut) -> tuple[float, ...]:
    return tuple(recall_at(found, held_out.truth, RANKS).values())
