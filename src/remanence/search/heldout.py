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

    from remanence.search.catalyzer.network import Catalyzer
    from remanence.search.index.transform import Transform
    from remanence.search.lattice.code import SphericalCode

RANKS = (1, 10, 100)
SATURATED = 0.9  # recall@10 from which methods are too much alike in it
CHOOSING, REPORTING = 30_000, 200_000  # vectors to search among, at most
QUERIES = 25  # of each set, at least


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Queries, and a base to find their neighbours in.

    Attributes:
        base: Vectors (n, in_dim), float32.
        queries: Vectors (q, in_dim), float32.
        truth: Number of each query's nearest base vector, by Euclidean distance of the inputs,
            (q,), int64.
        learned: How many of the base were learned from.
    """

    base: Tensor
    queries: Tensor
    truth: NDArray[np.int64]
    learned: int = 0

    @classmethod
    def of(cls, base: Tensor, queries: Tensor, *, learned: int = 0) -> HeldOut:
        """Find the truth, exactly.

        Args:
            base: Vectors (n, in_dim), float32.
            queries: Vectors (q, in_dim), float32, none of them learned from.
            learned: How many of the base were learned from.

        Raises:
            InputError: The base has fewer than 100 vectors, the dimensions differ, or a row is not
                finite.
        """
        if len(base) < max(RANKS):
            raise InputError(f"{len(base)} vectors to search among: give at least {max(RANKS)}")
        truth, _ = exact_neighbours(queries.numpy(), base.numpy(), 1)
        return cls(base, queries, truth[:, 0], learned)

    def found(self, embedding: Transform, code: SphericalCode | None) -> NDArray[np.int64]:
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


def telling_rank(best: float) -> int:
    """Return the R whose recall tells methods apart: 10, or 1 where most is found among ten.

    Among few vectors recall@10 comes close to 1 for whatever is half good.

    Args:
        best: The best recall@10 of all that is compared.
    """
    return 10 if best < SATURATED else 1


def mean_recall(scores: Sequence[Score], rank: int) -> float:
    """Return recall@R with the base in codes, the mean over the codes; R is one of `RANKS`."""
    return sum(each.quantised[RANKS.index(rank)] for each in scores) / len(scores)


def merit(scores: Sequence[Score], rank: int) -> tuple[float, float]:
    """Return what orders choices: mean recall at the rank that tells, then at the other one."""
    return mean_recall(scores, rank), mean_recall(scores, 1 if rank == 10 else 10)


def split(
    vectors: Tensor, share: float, *, most: int = 5000, seed: int = 0
) -> tuple[Tensor, HeldOut, HeldOut]:
    """Hold vectors out: queries to choose by, queries to report by, and some to search among.

    Whatever is chosen by the first queries looks better on them than it is; the second are looked
    at once, at the end. They are searched for among the other vectors that are held out and those
    to train on, as few vectors are found too easily for methods to differ; what is compared must
    have learned from the same vectors. A base to choose by has at most 30,000 vectors, that to
    report by 200,000.

    Args:
        vectors: (n, in_dim), float32.
        share: Share of the vectors to hold out; a third of them each become queries.
        most: Queries of each of the two sets, at most.
        seed: Of the draw.

    Returns:
        The vectors to train on, in their order, and both sets. No query is trained on or stands in
        a base.

    Raises:
        InputError: There are fewer than 25 queries, or 100 vectors to search among.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(vectors), generator=generator)
    held = round(share * len(vectors))
    asked = min(held // 3, most)
    if asked < QUERIES:
        raise InputError(
            f"a share of {share:.3g} of {len(vectors)} vectors leaves {asked} queries: give more "
            f"vectors, or hold out at least {3 * QUERIES / len(vectors):.2g}"
        )

    def searched(start: int, size: int) -> HeldOut:
        # Those held out come first, so that as many as possible were not learned from.
        rows = order[2 * asked :][:size]
        learned = max(len(rows) - (held - 2 * asked), 0)
        # In their order, so that ties, which go to the first, favour neither kind.
        base = vectors[rows.sort().values]
        return HeldOut.of(base, vectors[order[start : start + asked]], learned=learned)

    choosing, reporting = searched(0, CHOOSING), searched(asked, REPORTING)
    return vectors[order[held:].sort().values], choosing, reporting


def _recalls(found: NDArray[np.int64], held_out: HeldOut) -> tuple[float, ...]:
    return tuple(recall_at(found, held_out.truth, RANKS).values())
