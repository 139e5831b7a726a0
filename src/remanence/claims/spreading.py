"""Spreading vectors: data spread on a sphere need no codebook."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import affine_grid, grid_sample

from remanence.claims.claim import Claim
from remanence.kit.report import Report
from remanence.kit.statistics import mcnemar, proportion_interval
from remanence.search.catalyzer.linear import PcaTransform
from remanence.search.catalyzer.training import Settings, Training
from remanence.search.choice import code_for_bytes, new_catalyzer
from remanence.search.exact import recall_hits
from remanence.search.heldout import HeldOut
from remanence.search.rivals import run_rival

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from remanence.search.index.transform import Transform

NBYTES = 4
SIDE = 16  # pixels of a warped digit
WARPS = 12  # of each digit
QUERIES = 2000
SEEDS = (2, 3)
SETTINGS = Settings(epochs=10, pool=5000)
RANKS = (1, 10, 100)
OURS = "spread, lattice"
UNSPREAD = "lambda 0, lattice (control)"
PCA = "PCA, lattice"
PQ = "PQ"
OPQ = "OPQ"

Hits = dict[int, "NDArray[np.bool_]"]


@dataclass(frozen=True)
class _Measured:
    """Which queries find their nearest neighbour, and how evenly the outputs are spread.

    Attributes:
        hits: By method and rank, (queries,); the first seed's where there are several.
        floats: The same without any code.
        seeds: Recall at 1 of the spread lattice, by seed.
        koleo: KoLeo loss of the spread network, of that with lambda 0, and of a uniform spread.
        sizes: Vectors to learn from and to search among.
    """

    hits: dict[str, Hits]
    floats: dict[str, Hits]
    seeds: list[float]
    koleo: tuple[float, float, float]
    sizes: tuple[int, int]


def spreading_claim() -> Claim:
    """Measure the claim of arXiv 1806.03198 on warped handwritten digits."""
    measured = _measure()
    recall = {name: 100 * float(hits[1].mean()) for name, hits in measured.hits.items()}
    spread = mcnemar(measured.hits[OURS][1], measured.hits[UNSPREAD][1])
    learned = mcnemar(measured.hits[OURS][1], measured.hits[PCA][1])
    at_ten = {name: 100 * float(hits[10].mean()) for name, hits in measured.hits.items()}
    low, high = (100 * edge for edge in learned.interval)
    koleo, without, uniform = measured.koleo
    return Claim(
        system="spreading",
        paper="Spreading vectors for similarity search (1806.03198)",
        sentence="A network that spreads vectors evenly on a sphere lets a fixed code, without "
        "any codebook, find their neighbours.",
        measured=(
            f"{NBYTES} bytes a vector: the nearest neighbour comes first for {recall[OURS]:.1f} % "
            f"of the queries, {recall[OURS] - recall[PCA]:+.1f} points over the same lattice on "
            f"principal components (95 % interval {low:+.1f} to {high:+.1f}). Trained codes of as "
            f"many bytes: PQ {recall[PQ]:.1f}, OPQ {recall[OPQ]:.1f}. Among the first ten: "
            f"{at_ten[OURS]:.1f} %, OPQ {at_ten[OPQ]:.1f} %."
        ),
        control=(
            f"The same network without the spreading loss: {recall[UNSPREAD]:.1f} % once rounded. "
            f"KoLeo {koleo:.2f} with it, {without:.2f} without, {uniform:.2f} for a uniform spread."
        ),
        holds=spread.interval.low >= 0.1
        and learned.interval.low > 0
        and min(measured.seeds) >= recall[PCA] / 100,
        data=f"the pixels of scikit-learn's handwritten digits, each warped {WARPS} times by this "
        "project: half of the digits to learn from, the others to search",
        details=lambda report: _details(report, measured),
    )


def _vectors() -> tuple[Tensor, Tensor]:
    """Warp half of the digits to learn from, and the others to search."""
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16  # (N, 1, 8, 8)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(images), generator=generator)
    half = len(images) // 2
    return _warped(images[order[:half]], generator), _warped(images[order[half:]], generator)


def _warped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn each image by up to 45 degrees, shift and scale it, at random: pixels (N * WARPS, D)."""
    images = images.repeat_interleave(WARPS, dim=0)
    n = len(images)
    turn, growth = torch.rand(2, n, generator=generator) - 0.5
    angle, scale = turn * math.pi / 2, 1.3 * (0.6 * growth).exp()
    shift = 0.5 * (torch.rand(n, 2, generator=generator) - 0.5)
    rows = (
        torch.stack([scale * angle.cos(), -scale * angle.sin(), shift[:, 0]], 1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), shift[:, 1]], 1),
    )
    grid = affine_grid(torch.stack(rows, 1), [n, 1, SIDE, SIDE], align_corners=False)
    return grid_sample(images, grid, align_corners=False).flatten(1)


def _measure() -> _Measured:
    learn, other = _vectors()
    order = torch.randperm(len(other), generator=torch.Generator().manual_seed(0))
    held_out = HeldOut.of(other[order[QUERIES:]], other[order[:QUERIES]])
    code = code_for_bytes(NBYTES)

    def hits(transform: Transform, *, rounded: bool) -> Hits:
        found = held_out.found(transform, code if rounded else None)
        return recall_hits(found, held_out.truth, RANKS)

    maps: dict[str, Transform] = {PCA: PcaTransform.fit(learn, code.dim)}
    koleo = {}
    seeds = []
    uniform = 0.0
    for weight, seed in [(SETTINGS.koleo, seed) for seed in SEEDS] + [(0.0, SEEDS[0])]:
        settings = Settings(koleo=weight, epochs=SETTINGS.epochs, pool=SETTINGS.pool)
        catalyzer = new_catalyzer(SIDE**2, [code.dim], hidden=256, seed=seed)
        *_, last = Training(catalyzer, learn, settings, seed=seed).epochs()
        name = OURS if weight else UNSPREAD
        if weight:
            seeds.append(float(hits(catalyzer.at(code.dim), rounded=True)[1].mean()))
        if seed == SEEDS[0]:
            maps[name], koleo[name] = catalyzer.at(code.dim), last.koleo
            uniform = last.koleo_of_uniform
    found = {name: hits(transform, rounded=True) for name, transform in maps.items()}
    base, queries = held_out.base.numpy(), held_out.queries.numpy()
    for name, key in ((PQ, f"PQ{NBYTES}"), (OPQ, f"OPQ{NBYTES}_{4 * NBYTES},PQ{NBYTES}")):
        rival = run_rival(key, learn.numpy(), base, queries, max(RANKS), threads=1)
        found[name] = recall_hits(rival.ids, held_out.truth, RANKS)
    return _Measured(
        hits=found,
        floats={name: hits(transform, rounded=False) for name, transform in maps.items()},
        seeds=seeds,
        koleo=(koleo[OURS], koleo[UNSPREAD], uniform),
        sizes=(len(learn), len(base)),
    )


def _details(report: Report, measured: _Measured) -> None:
    rows: list[list[Any]] = []
    for name, hits in measured.hits.items():
        edges = proportion_interval(int(hits[1].sum()), len(hits[1]))
        floats = measured.floats.get(name)
        rows.append(
            [
                name,
                *(100 * float(hits[rank].mean()) for rank in RANKS),
                f"{100 * edges.low:.1f} to {100 * edges.high:.1f}",
                None if floats is None else 100 * float(floats[1].mean()),
            ]
        )
    learn, base = measured.sizes
    seeds = ", ".join(f"{100 * recall:.1f}" for recall in measured.seeds)
    report.table(
        ["code", "recall@1, %", "@10", "@100", "@1, 95 % interval", "@1 without the code"],
        rows,
        f"Share of {QUERIES} queries whose true nearest neighbour is among the first found, "
        f"{NBYTES} bytes a vector; {learn} vectors to learn from, {base} to search. Spread "
        f"lattice, recall@1 by seed: {seeds}.",
    )
