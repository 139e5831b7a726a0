"""Images told apart by their pixels, so that no image stands on both sides of a test."""

from collections.abc import Mapping
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from remanence.errors import InputError

Labelled = tuple[Tensor, Tensor]
"""Images (N, ...) and labels (N,) int64."""

LEAST = 30  # images a side
APART = (
    ("public", "members"),
    ("public", "nonmembers"),
    ("members", "nonmembers"),
    ("shadow members", "members"),
    ("shadow members", "nonmembers"),
    ("shadow nonmembers", "members"),
    ("shadow nonmembers", "nonmembers"),
    ("shadow members", "shadow nonmembers"),
)


def pixel_hashes(images: Tensor) -> npt.NDArray[np.uint64]:
    """Hash the bytes of each image; equal pixels of equal dtype give equal hashes.

    Args:
        images: (N, ...) any dtype, any device.

    Returns:
        (N,) 64-bit hashes.
    """
    hashes = np.empty(len(images), dtype=np.uint64)
    for start in range(0, len(images), 1024):
        rows = images[start : start + 1024].detach().flatten(1).contiguous().cpu()
        for i, row in enumerate(rows.view(torch.uint8).numpy(), start):
            hashes[i] = int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "little")
    return hashes


def distinct(images: Tensor) -> Tensor:
    """Indices of the images that no earlier image equals pixel by pixel, int64, in order.

    Args:
        images: (N, ...) any dtype, any device.
    """
    _, first = np.unique(pixel_hashes(images), return_index=True)
    return torch.from_numpy(np.sort(first))


def check_sides(sides: Mapping[str, Labelled]) -> dict[str, npt.NDArray[np.uint64]]:
    """Refuse sides of a membership test that would make its figures meaningless.

    Args:
        sides: "public", "members", "nonmembers", and for a shadow network "shadow members" and
            "shadow nonmembers".

    Returns:
        The pixel hashes of each side.

    Raises:
        InputError: a side is too small, its labels or images have the wrong form, a class has no
            public image, or an image stands on two sides that `APART` names.
    """
    images, labels = sides["public"]
    classes = set(labels.tolist())
    if len(classes) < 2 or min(classes) < 0:
        raise InputError("public labels: give at least 2 classes, numbered from 0")
    for name, (x, y) in sides.items():
        if len(x) < LEAST:
            raise InputError(f"give at least {LEAST} images of {name}; there are {len(x)}")
        if y.shape != (len(x),) or y.dtype != torch.int64:
            raise InputError(
                f"labels of {name} are {tuple(y.shape)} {y.dtype}: give one int64 an image, "
                f"({len(x)},)"
            )
        if x.shape[1:] != images.shape[1:] or x.dtype != images.dtype:
            raise InputError(
                f"images of {name} are {tuple(x.shape[1:])} {x.dtype} and the public ones "
                f"{tuple(images.shape[1:])} {images.dtype}: prepare them alike"
            )
        strange = sorted(set(y.tolist()) - classes)
        if strange:
            raise InputError(
                f"labels {strange[:5]} of {name} are not among the public ones: give public "
                "images of every class"
            )
    hashes = {name: pixel_hashes(x) for name, (x, _) in sides.items()}
    for a, b in APART:
        if a not in hashes or b not in hashes:
            continue
        shared = np.flatnonzero(np.isin(hashes[b], hashes[a]))
        if len(shared):
            raise InputError(
                f"{len(shared)} images of {b} are also in {a}, image {shared[0]} first: take them "
                "out of one side"
            )
    return hashes
