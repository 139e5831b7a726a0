"""Key points that somebody else detected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from remanence.errors import InputError
from remanence.jobs.search.pictures import Picture
from remanence.kit import vector_files
from remanence.search.kernel_descriptor.keypoints import Keypoints

COLUMNS = "x, y, scale and, where known, angle"


def read_keypoints(file: Path, picture: Picture) -> Keypoints:
    """Read key points of a picture.

    Args:
        file: `.csv` or `.npy`; a row has x and y in pixels of the picture, scale (sigma in pixels)
            and angle (radians, clockwise as displayed). A first line of names may stand above.
        picture: Theirs.

    Returns:
        The key points in pixels that are looked at, in the order of the file; response 0.

    Raises:
        InputError: There is no such file, or a row is no key point of the picture.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    if file.suffix == ".npy":
        table = np.array(vector_files.open_store(str(file), slice(None)))
    elif file.suffix == ".csv":
        table = _csv(file)
    else:
        raise InputError(f"{file}: not a kind of key points; give .csv or .npy")
    if table.ndim != 2 or table.shape[1] not in (3, 4) or table.dtype.kind not in "fiu":
        raise InputError(f"{file}: has {table.dtype} {table.shape}; give rows of {COLUMNS}")
    table = table.astype(np.float64)
    height, width = picture.size
    x, y, scale = table[:, :3].T
    good = np.isfinite(table).all(axis=1) & (scale > 0)
    good &= (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    if not good.all():
        raise InputError(
            f"{file}: row {int(good.argmin())} (counted from 0) is no key point of an image of "
            f"{width} x {height} pixels; give finite {COLUMNS}, inside it and of scale above 0"
        )
    factor = picture.factor
    rows = torch.from_numpy(table)
    angle = rows[:, 3] if rows.shape[1] == 4 else torch.zeros(len(rows), dtype=torch.float64)
    return Keypoints(
        ((rows[:, :2] + 0.5) / factor - 0.5).float(),
        (rows[:, 2] / factor.prod().sqrt()).float(),
        angle.float(),
        torch.zeros(len(rows)),
    )


def _csv(file: Path) -> np.ndarray:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if lines and any(word.strip()[:1].isalpha() for word in lines[0].split(",")):
            lines = lines[1:]
        cells = [[float(word) for word in line.split(",")] for line in lines]
        return np.array(cells, dtype=np.float64).reshape(len(cells), -1 if cells else 4)
    except ValueError as error:
        raise InputError(f"{file}: not a table of numbers; give rows of {COLUMNS}") from error
