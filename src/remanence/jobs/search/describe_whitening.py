"""A whitening from the user's own pictures, and how much better it matches than raw descriptors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.jobs.search.pictures import look, upright_image
from remanence.kit.images import Images
from remanence.kit.progress import bar
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.evaluation import fpr95, matching_map
from remanence.search.kernel_descriptor.moments import Moments
from remanence.search.kernel_descriptor.views import patch_pairs, synthetic_views
from remanence.search.kernel_descriptor.whitening import Kind, Whitening

VIEWS = 5
PLACES = 500
LEAST = 41  # descriptors: pcaws shrinks towards its 41st eigenvalue
LEARNED_FROM = 100  # images at most that are warped, for lw and lws


@dataclass(frozen=True)
class Score:
    """How well descriptors tell places apart, in percent.

    Attributes:
        name: `raw` or the kind of whitening.
        matching_map: Mean average precision of matching two images.
        fpr95: Pairs of other places that are accepted where 95 % of the right ones are.
    """

    name: str
    matching_map: float
    fpr95: float


@dataclass(frozen=True, eq=False)
class Learned:
    """A whitening and its model card.

    Attributes:
        whitening: Learned from all images, held-out ones included.
        scores: Of raw descriptors and of a whitening that was learned without the evaluated images.
        images: How many it was learned from.
        evaluated: Names of the images that were evaluated; empty where none could be.
        same: They are also those that the evaluated whitening was learned from.
        seconds: Learning and evaluation took.
    """

    whitening: Whitening
    scores: tuple[Score, ...]
    images: int
    evaluated: tuple[str, ...]
    same: bool
    seconds: float

    def card(self) -> dict[str, Any]:
        """Return what a model card says."""
        return {
            "kind": self.whitening.kind,
            "convention": self.whitening.convention,
            "length": list(self.whitening.projection.shape),
            "images": self.images,
            "descriptors": self.whitening.count,
            "pairs": self.whitening.pairs,
            "seconds": round(self.seconds, 2),
            "evaluated_on": list(self.evaluated),
            "evaluated_on_what_it_learned_from": self.same,
            "scores": {s.name: {"map": s.matching_map, "fpr95": s.fpr95} for s in self.scores},
        }


def learn(
    images: Images | None,
    held: Sequence[bool],
    moments: tuple[Moments, Moments],
    descriptor: KernelDescriptor,
    kind: Kind,
    *,
    dim: int,
    size: int,
    longest: int,
    seed: int,
) -> Learned:
    """Learn a whitening and evaluate one that was learned without the held-out images.

    Args:
        images: The pictures; None where there are only patches, and nothing to evaluate on.
        held: Which of them are held out.
        moments: Of the descriptors of the others, and of those held out.
        descriptor: Of patches.
        kind: What to learn.
        dim: Length of whitened descriptors.
        size: Side of the patches, pixels.
        longest: Longer side at which a picture is looked at, pixels.
        seed: Of the warped copies.

    Returns:
        The whitening with its evaluation.
    """
    started = time.perf_counter()
    rest, apart = Moments(descriptor.dim), Moments(descriptor.dim)
    rest.merge(moments[0])
    apart.merge(moments[1])
    convention = descriptor.convention
    names: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()
    same = True
    if images is not None:
        learning = [i for i, out in enumerate(held) if not out]
        trial = [i for i, out in enumerate(held) if out]
        views = _Views(images, descriptor, size, longest, seed)
        same = not (learning and apart.count and rest.count > max(dim, LEAST))
        if same:
            rest.merge(apart)
            apart = Moments(descriptor.dim)
            learning = list(range(len(images)))
            trial = learning[:5]
        supervised = kind in ("lw", "lws")
        if supervised:
            _add_pairs(rest, views, learning[:LEARNED_FROM])
        first = Whitening.fit(_of(rest, kind), kind, dim=dim, convention=convention)
        scores, evaluated = _evaluate(views, trial, first)
        names = tuple(images.ids[i] for i in evaluated)
        if supervised and not same:
            _add_pairs(apart, views, trial)
    rest.merge(apart)
    whitening = Whitening.fit(_of(rest, kind), kind, dim=dim, convention=convention)
    count = 0 if images is None else len(images)
    return Learned(whitening, scores, count, names, same, time.perf_counter() - started)


@dataclass(frozen=True)
class _Views:
    """Descriptors of the same places in a picture and in warped copies of it."""

    images: Images
    descriptor: KernelDescriptor
    size: int
    longest: int
    seed: int

    def pairs(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield descriptors (n, D) in picture `number` and in a copy, row by row the same place."""
        picture = look(upright_image(self.images, number), self.longest)
        seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
        views = synthetic_views(picture.grey, views=VIEWS, seed=seed)
        found = patch_pairs(picture.grey, views, most=PLACES, size=self.size, seed=seed)
        described = [self.descriptor(patches) for patches in found.patches]
        for there, inside in zip(described[1:], found.valid[1:], strict=True):
            kept = inside & described[0].valid & there.valid
            yield described[0].vectors[kept], there.vectors[kept]


def _of(moments: Moments, kind: Kind) -> Moments:
    """The moments that a kind learns from: lw and lws from the pairs alone."""
    if kind not in ("lw", "lws"):
        return moments
    pairs = Moments(moments.dim)
    pairs.merge(moments)
    pairs.count = 0
    return pairs


def _add_pairs(moments: Moments, views: _Views, numbers: Sequence[int]) -> None:
    with bar("learn from warped copies", len(numbers)) as progress:
        for number in numbers:
            for first, second in views.pairs(number):
                moments.add_pairs(first, second)
            progress.advance()


def _evaluate(
    views: _Views, numbers: Sequence[int], whitening: Whitening
) -> tuple[tuple[Score, ...], list[int]]:
    """Score raw and whitened descriptors on warped copies; the pictures that had enough places."""
    maps: dict[str, list[float]] = {"raw": [], whitening.kind: []}
    similar: dict[str, list[Tensor]] = {name: [] for name in maps}
    labels: list[Tensor] = []
    used: list[int] = []
    with bar("evaluate", len(numbers)) as progress:
        for number in numbers:
            for raw in views.pairs(number):
                count = len(raw[0])
                if count < 2:
                    continue
                if used[-1:] != [number]:
                    used.append(number)
                labels.append(torch.arange(2 * count) < count)
                generator = torch.Generator().manual_seed(views.seed)
                steps = torch.randint(1, count, (count,), generator=generator)
                strangers = (torch.arange(count) + steps) % count
                for name, (q, p) in (
                    ("raw", raw),
                    (whitening.kind, (whitening(raw[0]), whitening(raw[1]))),
                ):
                    maps[name].append(matching_map(q, p))
                    similar[name].append(torch.cat([(q * p).sum(1), (q * p[strangers]).sum(1)]))
            progress.advance()
    if not labels:
        return (), []
    label = torch.cat(labels)
    return (
        tuple(
            Score(name, 100 * float(np.mean(maps[name])), 100 * fpr95(torch.cat(values), label))
            for name, values in similar.items()
        ),
        used,
    )
