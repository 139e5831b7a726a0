"""Patches that somebody else cut, in the layouts that people have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from remanence.errors import InputError
from remanence.kit import vector_files

ARRAYS = (".npy", ".npz", ".safetensors")
SHEET = 64  # pixels of a side in Photo Tourism's sheets, which hold 16 x 16 patches
PIXELS = 2**24  # read at a time


@dataclass(frozen=True)
class PatchFile:
    """Patches of one file.

    Attributes:
        name: Its name.
        patches: (N, s, s) or (N, 1, s, s), mapped or read.
    """

    name: str
    patches: Any

    def chunks(self) -> Iterator[Tensor]:
        """Yield patches in order, some at a time."""
        rows = max(1, PIXELS // int(np.prod(self.patches.shape[1:])))
        for start in range(0, len(self.patches), rows):
            yield torch.from_numpy(np.array(self.patches[start : start + rows]))


def open_patches(source: str) -> Sequence[PatchFile]:
    """Open patches.

    Args:
        source: A `.npy`, `.npz` or `.safetensors` file (N, s, s), with `@NAME` where it holds
            several arrays; an image of patches in a column, as HPatches has them, or a folder of
            such; or a folder of Photo Tourism's `patches0000.bmp` and so on.

    Returns:
        One or more files; sheets are cut as they are read.

    Raises:
        InputError: There is no such file, or it holds no square patches.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        sheets = sorted(path.glob("patches*.bmp"))
        if sheets:
            return _sheets(path, sheets)
        columns = sorted(path.glob("*.png"))
        if not columns:
            raise InputError(
                f"{source}: holds neither patches0000.bmp and so on nor columns of patches in "
                ".png; give an array of patches"
            )
        return [_column(file) for file in columns]
    if path.suffix.lower() in (".png", ".bmp", ".jpg", ".pgm", ".tif"):
        return [_column(path)]
    if Path(source.rpartition("@")[0] or source).suffix not in ARRAYS:
        raise InputError(f"{source}: not a kind of patches; give {', '.join(ARRAYS)} or .png")
    store: Any = vector_files.open_store(source, slice(None))
    shape = tuple(store.shape)
    if len(shape) not in (3, 4) or shape[-1] != shape[-2] or (len(shape) == 4 and shape[1] != 1):
        raise InputError(f"{source}: has shape {shape}; give square grey patches (N, s, s)")
    return [PatchFile(source, store)]


def _grey(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("L"))
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{path}: not an image; repair or remove it") from error


def _column(path: Path) -> PatchFile:
    pixels = _grey(path)
    height, side = pixels.shape
    if height % side:
        raise InputError(
            f"{path}: {height} x {side} pixels are no column of square patches; leave --patches "
            "out to describe it as a picture"
        )
    return PatchFile(path.name, pixels.reshape(-1, side, side))


class _Sheets:
    """Sheets that are read one at a time."""

    def __init__(self, paths: Sequence[Path], count: int) -> None:
        self._paths = paths
        self.shape = (count, SHEET, SHEET)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        per = 16 * 16
        stop = min(rows.stop, len(self))
        found = [self._sheet(number) for number in range(rows.start // per, -(-stop // per))]
        first = rows.start - rows.start % per
        return np.concatenate(found)[rows.start - first : stop - first]

    def _sheet(self, number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        pixels = _grey(self._paths[number])
        if pixels.shape != (16 * SHEET, 16 * SHEET):
            raise InputError(
                f"{self._paths[number]}: {pixels.shape[0]} x {pixels.shape[1]} pixels; Photo "
                "Tourism's sheets have 1024 x 1024"
            )
        rows = pixels.reshape(16, SHEET, 16, SHEET).swapaxes(1, 2)
        return rows.reshape(-1, SHEET, SHEET)


def _sheets(folder: Path, paths: Sequence[Path]) -> Sequence[PatchFile]:
    info = folder / "info.txt"
    count = 256 * len(paths)
    if info.is_file():  # a line a patch; the last sheet is padded
        count = min(count, len(info.read_text(encoding="utf-8").splitlines()))
    return [PatchFile(folder.name, _Sheets(paths, count))]
