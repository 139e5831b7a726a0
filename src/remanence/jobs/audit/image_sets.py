"""What the guard looks at: pixels, files and duplicates of several sets of images."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from remanence.audit.guard import ImageSet
from remanence.errors import InputError
from remanence.kit.images import Images
from remanence.kit.progress import track
from remanence.learn.fixres import EvalTransform

LARGEST, SMALLEST = 32, 8  # pixels of a thumbnail's side


@dataclass(frozen=True)
class _Look:
    thumbnail: Tensor
    digest: str
    width: int
    height: int
    format: str
    table: str
    length: int


def image_sets(sets: Sequence[Images], *, show: bool = True) -> list[ImageSet]:
    """Describe sets of images for the guard, each image read once.

    Thumbnails have one size in all sets and are never larger than most images, because a
    perceptual hash of enlarged pixels finds duplicates where there are none. Sizes and file lengths
    come in tenths of the sets' common distribution.

    Args:
        sets: The sets to compare.
        show: Show progress.

    Returns:
        Thumbnails, labels, digests of decoded pixels and file properties of each set.
    """
    sides = np.concatenate([images.sizes(500).min(1) for images in sets])
    thumbnail = EvalTransform(
        int(np.clip(np.median(sides), SMALLEST, LARGEST)), crop_pct=1.0, crop_mode="squash"
    )
    looks = [
        [
            _look(images, row, thumbnail)
            for row in track(range(len(images)), f"look at {images.source}", show=show)
        ]
        for images in sets
    ]
    columns = {
        "width": _tenths([[look.width for look in looked] for looked in looks]),
        "height": _tenths([[look.height for look in looked] for looked in looks]),
        "file length": _tenths([[look.length for look in looked] for looked in looks]),
        "file format": [np.array([look.format for look in looked]) for looked in looks],
        "JPEG table": [np.array([look.table for look in looked]) for looked in looks],
    }
    return [
        ImageSet(
            images=torch.stack([look.thumbnail for look in looked]),
            labels=images.labels,
            fingerprints={name: column[i] for name, column in columns.items()},
            digests=np.array([look.digest for look in looked]),
        )
        for i, (images, looked) in enumerate(zip(sets, looks, strict=True))
    ]


def refuse_shared(given: Mapping[str, tuple[Sequence[str], ImageSet]]) -> None:
    """Refuse sets that share an image.

    Args:
        given: What each set is called, in the plural, and its names and description; sets without
            digests are not looked at.

    Raises:
        InputError: Says how many images two sets share, and names one.
    """
    for (name, (ids, one)), (other_name, (_, other)) in itertools.combinations(given.items(), 2):
        if one.digests is None or other.digests is None:
            continue
        shared = np.flatnonzero(np.isin(one.digests, other.digests))
        if len(shared):
            raise InputError(
                f"{len(shared)} of {len(ids)} {name} are also {other_name} (such as "
                f"{ids[shared[0]]}); remove them from one side"
            )


def _look(images: Images, row: int, thumbnail: EvalTransform) -> _Look:
    image = images.image(row)
    pixels = f"{image.size}".encode() + image.tobytes()
    raw = images.store.read(int(images.order[row]))
    opened = Image.open(io.BytesIO(raw)) if isinstance(raw, bytes) else raw
    return _Look(
        thumbnail(image),
        hashlib.sha256(pixels).hexdigest(),
        *image.size,
        opened.format or "pixels",
        hashlib.sha256(repr(getattr(opened, "quantization", None)).encode()).hexdigest()[:8],
        len(raw) if isinstance(raw, bytes) else 0,
    )


def _tenths(columns: Sequence[Sequence[int]]) -> list[NDArray[np.int64]]:
    edges = np.unique(np.quantile(np.concatenate(columns), np.linspace(0.1, 0.9, 9)))
    return [np.searchsorted(edges, column, side="right") for column in columns]
