"""Marking in shards, each written whole: a killed run goes on, and processes share the work.

Which images a shard holds depends on neither, so that the bytes do not either.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from remanence.audit import radioactive as ra
from remanence.errors import InputError
from remanence.jobs.audit.mark_network import Marker
from remanence.jobs.audit.outputs import pixel_hash
from remanence.kit.images import Images
from remanence.kit.sources import EXTENSIONS

# Images that are only copied, a shard.
COPIED = 1000
# All files get one time of writing: when an image was written would tell whether it is marked.
_TIME = 946_684_800


@dataclass(frozen=True)
class Shard:
    """Images that are marked, or copied, together.

    Attributes:
        number: Number of the shard.
        rows: Rows of the images, (n,) int64.
        marked: Whether they are to be marked.
    """

    number: int
    rows: NDArray[np.int64]
    marked: bool

    def state(self, folder: Path) -> Path:
        """Return where the shard's rows of the manifest lie until the run is done."""
        return folder / f"shard-{self.number:06d}.ckpt"


def choose_images(
    labels: NDArray[np.int64], fraction: float, key: ra.SecretKey, seed: int, *, per_class: bool
) -> NDArray[np.int64]:
    """Choose the images to mark, uniformly at random.

    The key takes part in the draw: otherwise anyone who guesses the seed knows which are marked.

    Args:
        labels: Class of each image, (N,).
        fraction: Share of them, in (0, 1]; at least one is chosen.
        key: The secret.
        seed: Seed.
        per_class: Choose this share of every class, at least one image each.

    Returns:
        Rows in increasing order.
    """
    draw = key.commitment(f"remanence radioactive choice of images {seed}".encode())
    order = np.random.default_rng(int(draw, 16)).permutation(len(labels))
    groups = [order[labels[order] == k] for k in np.unique(labels)] if per_class else [order]
    chosen = [group[: max(1, round(fraction * len(group)))] for group in groups]
    return np.sort(np.concatenate(chosen))


def split_into_shards(
    marked: NDArray[np.int64], total: int, batch_size: int, *, copies: bool
) -> list[Shard]:
    """Divide the images to mark, and with `copies` the others, into shards."""
    parts = [(marked[i : i + batch_size], True) for i in range(0, len(marked), batch_size)]
    others = np.setdiff1d(np.arange(total), marked) if copies else marked[:0]
    parts += [(others[i : i + COPIED], False) for i in range(0, len(others), COPIED)]
    return [Shard(number, rows, flag) for number, (rows, flag) in enumerate(parts)]


def image_paths(images: Images) -> list[str]:
    """Name a file for every image: CLASS/NAME.png, safe on any file system and unique."""
    used: set[str] = set()
    folders = [_unused(_safe(name), "", used) for name in images.classes]
    paths = []
    for image_id, label in zip(images.ids, images.labels, strict=True):
        parts = PurePath(image_id).parts
        # Class folders come back as folders.
        inside = parts[1:] if len(parts) > 1 and parts[0] == images.classes[label] else parts
        name = "_".join(inside)
        if PurePath(name).suffix.lower() in EXTENSIONS:
            name = name.removesuffix(PurePath(name).suffix)
        paths.append(_unused(f"{folders[label]}/{_safe(name)}", ".png", used))
    return paths


def _safe(name: str) -> str:
    # A leading dot would hide the file.
    return re.sub(r"[^\w.-]+", "_", name)[:120].lstrip(".") or "_"


def _unused(stem: str, suffix: str, used: set[str]) -> str:
    name, number = stem + suffix, 1
    while name.lower() in used:  # some file systems do not tell capitals apart
        number += 1
        name = f"{stem}-{number}{suffix}"
    used.add(name.lower())
    return name


@dataclass(frozen=True)
class Marking:
    """How shards are worked on.

    Attributes:
        images: The images.
        paths: Where each goes, below `images/`.
        folder: The folder that is being written.
        marker: The marking network, on its device.
        carriers: (K, d) carriers, one a class.
        config: How to mark.
        key_id: What tells one key from another and gives nothing away.
        seed: Seed of the crops.
        resume: Take up the shards that are there.
    """

    images: Images
    paths: Sequence[str]
    folder: Path
    marker: Marker
    carriers: Tensor
    config: ra.MarkConfig
    key_id: str
    seed: int
    resume: bool

    def do(self, shard: Shard, device: torch.device) -> None:
        """Write a shard's images and then its rows, unless that was done before."""
        if self.resume and shard.state(self.folder).exists():
            self.rows(shard)
            return
        originals = [self.images.image(int(row)) for row in shard.rows]
        rows: list[dict[str, Any]] = [
            {
                "row": int(row),
                "path": self.paths[row],
                "id": self.images.ids[row],
                "class": self.images.classes[self.images.labels[row]],
                "marked": shard.marked,
                "sha256_before": pixel_hash(image),
                "linf": 0,
            }
            for row, image in zip(shard.rows, originals, strict=True)
        ]
        written = originals
        if shard.marked:
            found = self._mark(shard, originals, device)
            written = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in found.images]
            for i, row in enumerate(rows):
                row["psnr"] = float(found.psnr[i])
                row["linf"] = int(found.linf[i])
                row["dot"] = float(found.dot[i])
                row["move"] = float(found.feature_move[i])
        for row, image in zip(rows, written, strict=True):
            row["sha256_after"] = pixel_hash(image)
            write_png(self.folder / "images" / row["path"], image)
        state = shard.state(self.folder)
        part = state.with_suffix(".part")
        part.write_text(json.dumps({"key": self.key_id, "rows": rows}), encoding="utf-8")
        part.replace(state)

    def _mark(
        self, shard: Shard, originals: Sequence[Image.Image], device: torch.device
    ) -> ra.Marked[list[Tensor]]:
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in originals]
        pre = self.marker.network.test
        with warnings.catch_warnings():
            # The report looks at all shards together.
            warnings.simplefilter("ignore", ra.MarkingInfeasible)
            return ra.mark(
                pixels,
                torch.from_numpy(self.images.labels[shard.rows]),
                self.marker.extractor,
                self.carriers,
                mean=pre.mean,
                std=pre.std,
                config=self.config,
                ids=[self.images.ids[row] for row in shard.rows],
                batch_size=len(pixels),
                seed=self.seed,
                device=device,
            )

    def rows(self, shard: Shard) -> list[dict[str, Any]]:
        """Read the rows of a shard that was done.

        Raises:
            InputError: The file is damaged, or another key was used.
        """
        state = shard.state(self.folder)
        try:
            found = json.loads(state.read_text(encoding="utf-8"))
            rows: list[dict[str, Any]] = found["rows"]
            key_id = found["key"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{state}: damaged; delete it and pass --resume again") from error
        if key_id != self.key_id:
            raise InputError(
                f"{self.folder}: was begun with another key; give that one, or remove the folder"
            )
        return rows

    def all_rows(self, shards: Iterable[Shard]) -> list[dict[str, Any]]:
        """Return the rows of all shards in the order of the images."""
        return sorted((row for s in shards for row in self.rows(s)), key=lambda row: row["row"])


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image without loss, and without a trace of when."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")
    os.utime(path, (_TIME, _TIME))
