"""Features in files: a folder of .npy, .npz, .pt or .txt, or runs of `speech extract`."""

from __future__ import annotations

import glob
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError

SUFFIXES = (".npy", ".npz", ".pt", ".txt")
FEATURES = "features"  # inside a run folder of extract


def feature_files(source: str) -> dict[str, Path]:
    """Return the files of features by name: their path without suffix, with forward slashes.

    Args:
        source: A folder, a run of `speech extract`, or the name of one that was shared out.

    Raises:
        InputError: There are none, a share is lacking, or two files have one name.
    """
    files: dict[str, Path] = {}
    for folder in _folders(source):
        for path in sorted(folder.rglob("*")):
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in files:
                raise InputError(
                    f"{source}: {files[name].name} and {path.name} are features of one name, "
                    f"{name!r}; keep one of them"
                )
            files[name] = path
    if not files:
        raise InputError(f"{source}: holds no {', '.join(SUFFIXES)} files; is it the right folder?")
    return files


def _folders(source: str) -> list[Path]:
    """Return the folders that features lie in: that itself, or those of runs of extract."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        inner = folder / FEATURES
        return [inner if inner.is_dir() and (folder / "run.json").is_file() else folder]
    shards = sorted(folder.parent.glob(f"{glob.escape(folder.name)}-*-of-*"))
    numbers = [re.fullmatch(r"(\d+)-of-(\d+)", s.name[len(folder.name) + 1 :]) for s in shards]
    found = {(int(n[1]), int(n[2])): s for n, s in zip(numbers, shards, strict=True) if n}
    if not found:
        raise InputError(
            f"{source}: no such folder of features; give one with {', '.join(SUFFIXES)} files, or "
            "mfcc, a CPC run or FILE.py:FUNCTION with --audio"
        )
    worlds = {world for _, world in found}
    if len(worlds) > 1:
        raise InputError(f"{source}: its shares are of {sorted(worlds)}; remove the old ones")
    world = worlds.pop()
    lacking = [f"{source}-{rank}-of-{world}" for rank in range(world) if (rank, world) not in found]
    if lacking:
        raise InputError(f"{lacking[0]}: this share is not there yet; extract it first")
    return [found[rank, world] / FEATURES for rank in range(world)]


def written_rate(files: Mapping[str, Path]) -> float | None:
    """Return the frame rate that `speech extract` wrote beside its features, where it did."""
    path = next(iter(files.values()))
    for folder in path.parents:
        results = folder.parent / "results.json"
        if folder.name == FEATURES and results.is_file():
            try:
                rate = json.loads(results.read_text(encoding="utf-8"))["frame_rate"]
            except (OSError, ValueError, KeyError, TypeError):
                return None
            return float(rate) if isinstance(rate, int | float) and rate > 0 else None
    return None


def hold_times(files: Mapping[str, Path]) -> bool:
    """Tell whether files say when their frames are, as `times` in each .npz.

    Raises:
        InputError: Some do and some do not, or one is damaged.
    """
    timed = {path: path.suffix == ".npz" and "times" in _names(path) for path in files.values()}
    if len(set(timed.values())) > 1:
        one, other = (next(p for p, own in timed.items() if own is say) for say in (True, False))
        raise InputError(
            f"{one} holds times and {other.name} none: give them in every file, or --frame-rate "
            "to leave them out"
        )
    return next(iter(timed.values()))


def _names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as arrays:
            return [name.removesuffix(".npy") for name in arrays.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged, or not of its kind; extract it again") from error


def read_times(path: Path) -> Tensor:
    """Read the centres of frames in seconds, (S,) float64, that a .npz holds.

    Raises:
        InputError: It is damaged, or they are no times.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            times = arrays["times"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged, or not of its kind; extract it again") from error
    if times.ndim != 1 or times.dtype.kind not in "fiu" or not np.isfinite(times).all():
        raise InputError(
            f"{path}: times of shape {times.shape}, {times.dtype}, or with NaN; save the centre of "
            "each frame in seconds (S,), or give --frame-rate to leave them out"
        )
    return torch.from_numpy(times.astype(np.float64))


def read_features(path: Path) -> Tensor:
    """Read a file of features, of any shape; floats as float32, whole numbers as int64.

    Raises:
        InputError: It is damaged, or holds something else.
    """
    try:
        if path.suffix == ".pt":
            return _one(path, torch.load(path, map_location="cpu", weights_only=True))
        if path.suffix == ".txt":
            return torch.from_numpy(np.loadtxt(path, dtype=np.float64, ndmin=2))
        array = np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            with array:
                array = _only(path, array)
        return torch.from_numpy(_plain(path, array))
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{path}: may not be read; change its permissions") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, RuntimeError) as error:
        raise InputError(f"{path}: damaged, or not of its kind; extract it again") from error
    except Exception as error:  # torch.load raises whatever the broken bytes lead to
        if path.suffix != ".pt":
            raise
        raise InputError(f"{path}: damaged, or holds more than tensors; save it again") from error


def _one(path: Path, loaded: object) -> Tensor:
    if not isinstance(loaded, Tensor):
        raise InputError(f"{path}: holds {type(loaded).__name__}; save one tensor (S, D)")
    return loaded.detach()


def _only(path: Path, arrays: Any) -> Any:
    names = list(arrays.files)
    name = "features" if "features" in names else names[0] if len(names) == 1 else None
    if name is None:
        raise InputError(f"{path}: holds {len(names)} arrays; name the one to take 'features'")
    return arrays[name]


def _plain(path: Path, array: Any) -> Any:
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold is reported as infinite
            return array.astype(np.float32)
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    raise InputError(f"{path}: holds {array.dtype}; save numbers")
