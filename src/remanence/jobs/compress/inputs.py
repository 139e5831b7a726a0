"""What a network is calibrated on, tuned on and measured on."""

from __future__ import annotations

import math
from abc import abstractmethod
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
from remanence.kit.images import Images, open_images
from remanence.kit.models import Network
from remanence.kit.sources import UNLABELLED, splits

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from numpy.typing import NDArray

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
        classes: Whether the test images have labels that can be the network's classes.
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
        return _arrays(Path(data).expanduser(), fabric, calibration, batch_size, limit, rng)
    train, validation, test = _splits(
        data, rng, skip_broken=skip_broken, limit=limit, show=fabric.is_global_zero
    )
    _enough(min(map(len, (train, validation, test))), data)
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


def _splits(data: str, rng: np.random.Generator, **options: Any) -> tuple[Images, Images, Images]:
    """Open images to train on, to hold out and to test; what is missing is drawn, blind to labels.

    `open_splits` draws from each class evenly, and so the labels would have a say in the file.
    """
    names = splits(data)
    if "train" not in names:
        names = []
    opened = {name: open_images(data, split=name, labels=False, **options) for name in names}
    train = opened["train"] if names else open_images(data, labels=False, **options)
    missing = [name for name in ("validation", "test") if name not in opened]
    rest, *parts = _draw(len(train), len(missing), rng)
    opened |= {name: train.subset(part) for name, part in zip(missing, parts, strict=True)}
    return train.subset(rest), opened["validation"], opened["test"]


def _draw(count: int, parts: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Draw parts of a tenth each, or a little more of few samples; what is left stands first."""
    each = max(count // 10, min(FEWEST, count // (parts + 2)))
    order = rng.permutation(count)
    drawn = [order[i * each : (i + 1) * each] for i in range(parts)]
    return [np.sort(part) for part in (order[parts * each :], *drawn)]


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

    @abstractmethod
    def batch(self, part: slice) -> Any:
        """Return the batch of some samples."""


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
        """Return the rows, read from the disk, as float32, int64 or uint8."""
        rows = np.array(self.array[np.sort(self.samples[part])])
        if rows.dtype == np.uint8:
            return torch.from_numpy(rows)
        return torch.from_numpy(rows.astype(np.float32 if rows.dtype.kind == "f" else np.int64))


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
    path: Path,
    fabric: Fabric,
    calibration: int,
    batch_size: int,
    limit: int | None,
    rng: np.random.Generator,
) -> Inputs:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # its own words advise to unpickle what may come from anyone
        raise InputError(
            f"{path}: damaged, or no array of numbers; write it with numpy.save"
        ) from error
    if array.ndim < 1 or array.dtype.kind not in "fiu":
        raise InputError(f"{path}: holds {array.shape} of {array.dtype}; give numbers (N, ...)")
    rows = rng.permutation(len(array))[:limit]
    rest, holdout, test = (rows[part] for part in _draw(len(rows), 2, rng))
    _enough(min(map(len, (rest, holdout, test))), str(path))
    for start in range(0, len(array), 1024):
        bad = ~np.isfinite(array[start : start + 1024]).reshape(-1, array[0].size).all(1)
        if bad.any():
            raise InputError(
                f"{path}: row {start + int(bad.argmax())} holds NaN or infinity; remove such rows"
            )
    chosen, holdout = rng.permutation(rest)[:calibration], holdout[:MOST_HELD_OUT]
    counts = {
        "calibration": len(chosen),
        "tuning": len(rest),
        "held out": len(holdout),
        "test": len(test),
    }
    order = rng.permutation(rest)[fabric.global_rank :: fabric.world_size]
    return Inputs(
        _share(Rows(chosen, batch_size, array), fabric),
        lambda: Rows(order, batch_size, array),
        Rows(holdout, batch_size, array),
        Rows(test, len(test), array)[0],
        False,
        counts,
    )


def _share(batches: Sequence[Any], fabric: Fabric) -> Sequence[Any]:
    if fabric.world_size == 1:
        return batches
    if len(batches) < fabric.world_size:
        raise InputError(
            f"{len(batches)} calibration batches are too few for {fabric.world_size} processes; "
            "give a smaller --batch-size"
        )
    return [batches[i] for i in range(fabric.global_rank, len(batches), fabric.world_size)]


def _enough(count: int, source: str) -> None:
    if count < FEWEST:
        raise InputError(
            f"{source}: too few: {FEWEST} samples are needed to calibrate on, as many to hold out "
            f"and as many to test; one of these parts has {count}"
        )


def _labelled(images: Images, network: Network) -> bool:
    if images.classes == UNLABELLED:
        return False
    return images.classes == network.classes or not network.classes
