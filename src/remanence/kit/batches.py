"""Batches whose content depends only on the seed, the epoch and the position."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from PIL import Image

    from remanence.kit.images import Images


class Batch(NamedTuple):
    """What one process gets of one step.

    Attributes:
        inputs: For images uint8 (B, 3, K, K); else whatever the data set holds.
        labels: Class indices, (B,) int64.
        rows: Position of each sample in the data set, (B,) int64.
        weight: B times the number of processes over the samples of all of them: the factor that
            makes the average over processes of mean losses the mean over all samples.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    weight: float


@dataclass(frozen=True)
class AugmentedImages(Dataset[tuple[torch.Tensor, int, int]]):
    """Images under a random transform, seeded by (seed, epoch, image)."""

    images: Images
    transform: Callable[[Image.Image], Any]
    seed: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        epoch, row = key
        seed = int(_seeds(self.seed, epoch, len(self))[row])
        # torchvision draws from torch's generator, timm's augmentations from Python and NumPy.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  # timm draws from the global generator
        pixels = torch.as_tensor(self.transform(self.images.image(row)))
        return pixels, int(self.images.labels[row]), row


@lru_cache(maxsize=2)
def _seeds(seed: int, epoch: int, count: int) -> np.ndarray[Any, Any]:
    # One draw for the whole epoch: a SeedSequence for each image takes a tenth of its transform.
    return np.random.default_rng((seed, epoch, 2)).integers(2**63, size=count)


def collate(samples: Sequence[tuple[torch.Tensor, int, int]]) -> tuple[torch.Tensor, ...]:
    """Stack samples into (inputs, labels, rows)."""
    inputs, labels, rows = zip(*samples, strict=True)
    return stack(inputs), torch.tensor(labels), torch.tensor(rows)


def stack(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack samples; images (3, K, K) come out channels last, as a decoder lays them out."""
    if samples[0].ndim != 3:
        return torch.stack(tuple(samples))
    return torch.stack([image.permute(1, 2, 0) for image in samples]).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Plan:
    """Which samples make up each step of each epoch.

    Every sample is counted once an epoch: steps differ by at most one sample, so that there is no
    ragged last batch, and the processes share each step as evenly.

    Attributes:
        count: Number of samples.
        batch_size: Samples a step at most, over all processes.
        seed: Seed of the order.
        rank: This process.
        world: Number of processes.
    """

    count: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return -(-self.count // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[list[tuple[int, int]], float]]:
        """Yield (epoch, row) pairs and the weight of each step from step `start` on."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        for step in np.array_split(order, self.steps)[start:]:
            mine = np.array_split(step, self.world)[self.rank]
            weight = len(mine) * self.world / len(step)
            yield [(epoch, int(row)) for row in mine], weight


class _Steps(Sampler[list[tuple[int, int]]]):
    """The steps of the epoch under way."""

    keys: Sequence[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class Batches:
    """Training batches of a data set, by epoch."""

    def __init__(
        self,
        data: Dataset[Any],
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int | None = None,
    ) -> None:
        """Lay out the batches.

        Args:
            data: A data set that takes (epoch, row) and gives (input, label, row).
            batch_size: Samples a step over all processes.
            seed: Seed of the order.
            rank: This process.
            world: Number of processes.
            workers: Loader processes; by default none on a CPU, where they would only take cores
                away from the network, and one for each core beside a GPU.
        """
        self.plan = Plan(len(data), batch_size, seed, rank, world)  # type: ignore[arg-type]  # Dataset declares no __len__
        if workers is None:
            workers = min(16, os.cpu_count() or 1) if torch.cuda.is_available() else 0
        self._steps = _Steps()
        # Loader processes stay from epoch to epoch: to start them takes longer than many a step.
        self._loader = DataLoader(
            data,
            batch_sampler=self._steps,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return self.plan.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from step `start` on."""
        self._steps.keys, weights = zip(*self.plan.epoch(epoch, start), strict=True)
        for (inputs, labels, rows), weight in zip(self._loader, weights, strict=True):
            yield Batch(inputs, labels, rows, weight)


def drawn_view(seed: int, epoch: int, count: int, views: int) -> np.ndarray[Any, Any]:
    """Draw which of its fixed views each sample shows in an epoch, (count,) int64."""
    return np.random.default_rng((seed, epoch, 1)).integers(views, size=count)


class CachedViews:
    """Batches of features that were computed once for each of a few fixed views.

    The order of samples is that of `Batches` with the same seed and each shows its `drawn_view`, so
    training on the cache is training on the images.
    """

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Lay out the batches.

        Args:
            features: Features of each view, (V, N, C).
            labels: Class indices, (N,) int64.
            batch_size: Samples a step over all processes.
            seed: Seed of the order and of the views.
            rank: This process.
            world: Number of processes.
        """
        self.plan = Plan(len(labels), batch_size, seed, rank, world)
        self._features, self._labels, self._seed = features, labels, seed

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return self.plan.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from step `start` on."""
        views = torch.from_numpy(
            drawn_view(self._seed, epoch, len(self._labels), len(self._features))
        )
        for keys, weight in self.plan.epoch(epoch, start):
            rows = torch.tensor([row for _, row in keys])
            features = self._features[views[rows], rows].float()
            yield Batch(features, self._labels[rows], rows, weight)
