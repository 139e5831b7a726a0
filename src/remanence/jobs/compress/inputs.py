"""What a network is calibrated on, tuned on and measured on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.audit.outputs import pixels
from remanence.jobs.compress.subject import Subject
from remanence.jobs.learn.classifier import augmentation
from remanence.kit.batches import AugmentedImages, Batches
from remanence.kit.evaluate import Normalise
from remanence.kit.images import Images, open_splits
from remanence.kit.models import Network
from remanence.kit.sources import UNLABELLED

if TYPE_CHECKING:
    from lightning_fabric import Fabric

FEWEST = 8  # samples to calibrate on, and to hold out
MOST_HELD_OUT = 512


@dataclass(frozen=True)
class Inputs:
    """Batches of a run; none of them holds a label.

    Attributes:
        calibration: This process's batches of the calibration set.
        tuning: Makes the batches to tune on, the same ones each time.
        holdout: Batches that choose among states by their KL to the float network.
        test: What the network is measured on, and nothing else.
        classes: Whether the test images have labels that are the network's classes.
        counts: Samples of each of these sets, for the report.
    """

    calibration: Sequence[Any]
    tuning: Callable[[], Any]
    holdout: Sequence[Any]
    test: Images | Tensor
    classes: bool
    counts: dict[str, int]

    @property
    def example(self) -> Any:
        """Return the first calibration batch."""
        return self.calibration[0]


def open_inputs(
    data: str,
    subject: Subject,
    fabric: Fabric,
    *,
    calibration: int,
    batch_size: int,
    scale: tuple[float, float],
    flip: float,
    skip_broken: bool,
    limit: int | None,
    workers: int | None,
    seed: int,
) -> Inputs:
    """Open the data of a run.

    Args:
        data: An image source, with or without labels, or a `.npy` file of inputs (N, ...).
        subject: The network.
        fabric: The processes.
        calibration: Most samples to calibrate on.
        batch_size: Samples a batch.
        scale: Area of the random crops to tune on.
        flip: Chance to mirror them.
        skip_broken: Leave unreadable images out.
        limit: Use only so many images of each split.
        workers: Loader processes.
        seed: Seed of all choices.

    Raises:
        InputError: The data cannot be opened, are too few or do not fit the network.
    """
    rng = np.random.default_rng(seed)
    if data.endswith(".npy"):
        return _arrays(Path(data).expanduser(), fabric, calibration, batch_size, rng)
    train, validation, test = open_splits(
        data, labels=False, skip_broken=skip_broken, limit=limit, show=fabric.is_global_zero
    )
    if test is None:
        validation, test = validation.halves(seed)
    for images in (train, validation, test):
        _enough(len(images), data)
    chosen = train.subset(rng.permutation(len(train))[:calibration])
    held = validation.subset(rng.permutation(len(validation))[:MOST_HELD_OUT])
    counts = {
        "calibration": len(chosen),
        "tuning": len(train),
        "held out": len(held),
        "test": len(test),
    }
    if subject.detector:
        batches: Sequence[Any] = Photographs(chosen, batch_size)
        counts["tuning"] = 0
        held_out = Photographs(held, batch_size)
        return Inputs(_share(batches, fabric), lambda: (), held_out, test, False, counts)
    network = subject.network
    if network is None:
        raise InputError(
            f"{subject.name}: how it sees images is not known; give --size, or its inputs as .npy"
        )
    return Inputs(
        _share(
            Normalised(pixels(network, chosen, "calibration images"), batch_size, network), fabric
        ),
        lambda: Crops(train, network, batch_size, scale, flip, seed, fabric, workers),
        Normalised(pixels(network, held, "held-out images"), batch_size, network),
        test,
        _labelled(test, network),
        counts,
    )


@dataclass(frozen=True)
class _InOrder(Sequence[Any]):
    """Batches of samples in their order, each made when it is asked for."""

    samples: Any
    batch_size: int

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.batch_size
        return self.batch(slice(start, min(start + self.batch_size, len(self.samples))))

    def batch(self, part: slice) -> Any:
        """Return the batch of some samples."""
        raise NotImplementedError


@dataclass(frozen=True)
class Normalised(_InOrder):
    """Images (B, 3, K, K), float32, from pixels kept as uint8."""

    network: Network

    def batch(self, part: slice) -> Tensor:
        """Return the images, normalised."""
        out: Tensor = Normalise(self.network.test.mean, self.network.test.std)(self.samples[part])
        return out


class Photographs(_InOrder):
    """Batches as detectors take them: one argument, a list of images (3, H, W) in [0, 1]."""

    def batch(self, part: slice) -> list[list[Tensor]]:
        """Return the list of images, as the one argument."""
        rows = range(len(self.samples))[part]
        arrays = [np.array(self.samples.image(row)) for row in rows]
        return [[torch.from_numpy(array).permute(2, 0, 1).float() / 255 for array in arrays]]


@dataclass(frozen=True)
class Rows(_InOrder):
    """Rows of a mapped array; the samples are their numbers."""

    array: Any

    def batch(self, part: slice) -> Tensor:
        """Return the rows, read from the disk."""
        return torch.from_numpy(np.array(self.array[np.sort(self.samples[part])]))


class Crops:
    """Random crops of all training images, epoch after epoch; each iteration goes on from there."""

    def __init__(
        self,
        images: Images,
        network: Network,
        batch_size: int,
        scale: tuple[float, float],
        flip: float,
        seed: int,
        fabric: Fabric,
        workers: int | None,
    ) -> None:
        """Lay out the batches."""
        transform = augmentation(network, scale, flip, 0.0, None)
        self._batches = Batches(
            AugmentedImages(images, transform, seed),
            batch_size,
            seed=seed,
            rank=fabric.global_rank,
            world=fabric.world_size,
            workers=workers,
        )
        self._normalise = Normalise(network.test.mean, network.test.std)
        self._epoch = 0

    def __iter__(self) -> Iterator[Tensor]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        for batch in self._batches.epoch(epoch):
            yield self._normalise(batch.inputs)


def _arrays(
    path: Path, fabric: Fabric, calibration: int, batch_size: int, rng: np.random.Generator
) -> Inputs:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable .npy file of inputs ({error})") from error
    if array.ndim < 1 or array.dtype.kind not in "fiu":
        raise InputError(f"{path}: holds {array.dtype}; give numbers (N, ...)")
    held = max(len(array) // 10, min(FEWEST, len(array) // 4))
    _enough(held, str(path))
    order = rng.permutation(len(array))
    test, holdout, rest = order[:held], order[held : 2 * held][:MOST_HELD_OUT], order[2 * held :]
    chosen = rest[:calibration]
    counts = {
        "calibration": len(chosen),
        "tuning": len(rest),
        "held out": len(holdout),
        "test": len(test),
    }
    return Inputs(
        _share(Rows(chosen, batch_size, array), fabric),
        lambda: Rows(rest[fabric.global_rank :: fabric.world_size], batch_size, array),
        Rows(holdout, batch_size, array),
        torch.from_numpy(np.array(array[np.sort(test)])),
        False,
        counts,
    )


def _share(batches: Sequence[Any], fabric: Fabric) -> Sequence[Any]:
    if fabric.world_size == 1:
        return batches
    return [batches[i] for i in range(fabric.global_rank, len(batches), fabric.world_size)]


def _enough(count: int, source: str) -> None:
    if count < FEWEST:
        raise InputError(
            f"{source}: too few: {FEWEST} samples are needed to calibrate on and as many in each "
            f"held-out part; one has {count}"
        )


def _labelled(images: Images, network: Network) -> bool:
    if images.classes == UNLABELLED:
        return False
    if network.classes:
        return images.classes == network.classes
    return len(images.classes) == getattr(network.model, "num_classes", None)
