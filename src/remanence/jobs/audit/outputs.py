"""What a network says of a set of samples: computed from images, or read from arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor, nn

from remanence.errors import InputError
from remanence.kit.evaluate import Normalise, evaluate
from remanence.kit.images import Images
from remanence.kit.models import Network
from remanence.kit.preprocessing import Preprocessing
from remanence.kit.progress import track
from remanence.learn.fixres import EvalTransform

THUMBNAIL = 32


@dataclass(frozen=True)
class Outputs:
    """A set of samples and the logits of one network for them.

    Attributes:
        source: What the user wrote.
        ids: A name for each sample (N).
        logits: float32 (N, C).
        labels: Class of each sample, (N,) int64; None where nobody gave it.
        images: The images; None where only arrays were given.
    """

    source: str
    ids: tuple[str, ...]
    logits: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    images: Images | None = None

    def __len__(self) -> int:
        return len(self.ids)


def is_array(source: str) -> bool:
    """Whether a source names an array of logits instead of images."""
    return source.endswith(".npy")


def read_outputs(source: str, labels: Path | None) -> Outputs:
    """Read logits, and labels where there are any, from `.npy` files.

    Args:
        source: File of floats (N, C), or (N,) for one logit a sample.
        labels: File of integers (N,).

    Raises:
        InputError: A file is missing, holds objects, has another shape, NaN or infinity.
    """
    logits = read_array(Path(source)).astype(np.float32)
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2 or not len(logits):
        raise InputError(f"{source}: shape {logits.shape}; logits are (samples, classes)")
    broken = int((~np.isfinite(logits)).any(1).sum())
    if broken:
        raise InputError(f"{source}: {broken} of {len(logits)} rows hold NaN or infinity")
    found = None if labels is None else read_array(labels)
    if found is not None:
        if found.shape != (len(logits),) or found.dtype.kind not in "iu":
            raise InputError(
                f"{labels}: {found.dtype} {found.shape}; give one integer label for each of the "
                f"{len(logits)} rows of {source}"
            )
        found = found.astype(np.int64)
        classes = max(2, logits.shape[1])
        if found.min() < 0 or found.max() >= classes:
            raise InputError(
                f"{labels}: labels from {found.min()} to {found.max()} for {classes} classes"
            )
    ids = tuple(f"{source}:{row}" for row in range(len(logits)))
    return Outputs(source, ids, logits, found)


def read_array(path: Path) -> NDArray[Any]:
    """Read a `.npy` file of numbers.

    Raises:
        InputError: It is missing, damaged, or holds objects.
    """
    try:
        return np.asarray(np.load(path.expanduser(), allow_pickle=False))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give a .npy file") from error
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not an array of numbers in .npy format") from error


def network_outputs(
    fabric: Fabric, network: Network, images: Images, what: str, *, workers: int = 0
) -> Outputs:
    """Evaluate a network on images with its own test preprocessing, each image once.

    Args:
        fabric: Launched Fabric.
        network: The network.
        images: The images.
        what: What the progress bar says.
        workers: Image loading processes.
    """
    check_classes(network, images)
    logits = apply(fabric, network, images, network.model, what, workers=workers)
    return Outputs(images.source, images.ids, logits.numpy(), images.labels, images)


def apply(
    fabric: Fabric,
    network: Network,
    images: Images,
    function: Callable[[Tensor], Tensor] | nn.Module,
    what: str,
    *,
    workers: int = 0,
) -> Tensor:
    """Apply a function of normalised images (B, 3, K, K) to every image; float32 (N, D)."""
    if isinstance(function, nn.Module):
        function = function.to(fabric.device).eval()
    normalise = Normalise(network.test.mean, network.test.std)
    return evaluate(
        fabric,
        {0: lambda x: function(normalise(x))},
        {0: evaluation_transform(network.test)},
        images,
        workers=workers,
        what=what,
    )[0]


def evaluation_transform(pre: Preprocessing) -> EvalTransform:
    """Return a network's evaluation transform: PIL image to uint8 (3, K, K)."""
    return EvalTransform(pre.size, pre.crop_pct, pre.crop_mode, pre.interpolation)


def check_classes(network: Network, images: Images) -> None:
    """Refuse images whose classes are not the network's.

    Raises:
        InputError: There are more classes, or they have other names.
    """
    count = len(network.classes) or int(getattr(network.model, "num_classes", 0) or 0)
    if count and len(images) and int(images.labels.max()) >= count:
        raise InputError(
            f"{images.source}: labels up to {int(images.labels.max())}, but the network knows "
            f"{count} classes"
        )
    known, given = network.classes, images.classes
    if known and given != known[: len(given)] and set(given) != {str(i) for i in range(len(given))}:
        odd = sorted(set(given) ^ set(known)) or list(given)
        raise InputError(
            f"{images.source}: its classes are not the network's ({', '.join(odd[:5])}); "
            "give the same class folders or label names, in the same order"
        )


def pixels(network: Network, images: Images, what: str) -> Tensor:
    """Return every image as the network sees it in evaluation, uint8 (N, 3, K, K)."""
    return _views(images, evaluation_transform(network.test), what)


def thumbnails(images: Images, what: str) -> Tensor:
    """Return every image squeezed to 32 pixels a side, uint8 (N, 3, 32, 32)."""
    return _views(images, EvalTransform(THUMBNAIL, 1.0, "squash"), what)


def _views(images: Images, transform: EvalTransform, what: str) -> Tensor:
    rows = track(range(len(images)), what, show=len(images) > 5000)
    return torch.stack([transform(images.image(row)) for row in rows])


def pixel_hashes(images: Images) -> NDArray[np.str_]:
    """Return the SHA-256 of each image's decoded pixels, (N,).

    Files that differ only in their container, as PNG and BMP do, count as the same image.
    """
    return np.array([pixel_hash(images.image(row)) for row in range(len(images))])


def pixel_hash(image: Image) -> str:
    """Return the SHA-256 of a decoded RGB image's size and pixels."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def refuse_overlap(first: Outputs | Images, second: Outputs | Images, names: Sequence[str]) -> None:
    """Refuse two sets that share images.

    Args:
        first: One set.
        second: The other.
        names: What to call the two in the error.

    Raises:
        InputError: Says how many images are in both, and names one.
    """
    a, b = _hashes(first), _hashes(second)
    if a is not None and b is not None:
        refuse_shared(a, b, second.ids, names)


def refuse_shared(
    first: NDArray[Any], second: NDArray[Any], ids: Sequence[str], names: Sequence[str]
) -> None:
    """Refuse hashes (N,) and (M,) that share a value; `ids` names the second, as above."""
    shared = np.isin(second, first)
    if shared.any():
        example = ids[int(np.flatnonzero(shared)[0])]
        raise InputError(
            f"{int(shared.sum())} of {len(second)} {names[1]} are also {names[0]} (such as "
            f"{example}); remove them from one side"
        )


def _hashes(given: Outputs | Images) -> NDArray[np.str_] | None:
    images = given if isinstance(given, Images) else given.images
    if images is not None:
        return pixel_hashes(images)
    assert isinstance(given, Outputs)
    rows = np.array([hashlib.sha256(row.tobytes()).hexdigest() for row in given.logits])
    # Rounded or saturated outputs repeat by chance; then equal rows say nothing about equal images.
    return rows if len(np.unique(rows)) == len(rows) else None
