"""Where images come from: one grammar for every command.

| written as | is |
|---|---|
| `digits` | scikit-learn's 1,797 handwritten digits of 8x8 pixels, embedded |
| a folder | class folders of image files, or split folders that hold class folders |
| `FILE.parquet`, or a folder of them | Hugging Face layout: `image` struct of bytes, `label` |
| `FILE.tar`, or a folder of them | class folders in a tar, or webdataset: `x.jpg` + `x.cls` |
| `torch/NAME:ROOT`, `hfds/NAME`, `wds/FOLDER` | timm's dataset names |

`SOURCE@split` picks a split. What exists on disk is taken for a path, whatever it is called.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from remanence.errors import InputError
from remanence.kit import archives

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
UNLABELLED = ("unlabelled",)
WORDS = tuple(word for words in SPLITS.values() for word in words)


def parse(source: str) -> tuple[str, str | None]:
    """Take `SOURCE@split` apart; an @ of an existing path, or before a /, is part of the path."""
    name, at, split = source.rpartition("@")
    if not at or "/" in split or _path(source).exists():
        return source, None
    if not split:
        raise InputError(f"{source}: names no split behind the @, such as {source}train")
    return name, split


def splits(source: str) -> list[str]:
    """Return the splits that a source offers, by their usual names: train, validation, test.

    A source without splits, or one that already names its split, gives an empty list.
    """
    name, split = parse(source)
    if split is not None:
        return []
    if name == "digits":
        return ["train", "test"]
    if _is_timm(name):
        dataset = name.removeprefix("torch/").partition(":")[0]
        if dataset in ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"):
            return ["train", "test"]
        return ["train", "validation"] if dataset in ("imagenet", "places365") else []
    root = _path(name)
    if not root.is_dir():
        return []
    files = _archive_files(root)
    words = {_split_word(file, root) for file in files} if files else set(_split_folders(root))
    return [split for split, synonyms in SPLITS.items() if words.intersection(synonyms)]


def find(source: str, split: str | None, *, labels: bool = True) -> archives.Listing:
    """List the images of a source.

    Args:
        source: The source, without its split.
        split: The split, if one is meant.
        labels: Refuse a folder of images that are in no class folders; else they get the one class
            `UNLABELLED`.

    Returns:
        The listing.

    Raises:
        InputError: The source, the split, a class or a column is missing or broken.
    """
    if source == "digits":
        return _digits(split)
    if _is_timm(source):
        return archives.timm_dataset(source, split)
    path = _path(source)
    if not path.exists():
        raise InputError(
            f"{source}: no such file or folder; give a folder of class folders, a .parquet or "
            ".tar file, 'digits', or a timm dataset name such as torch/cifar10:ROOT"
        )
    if path.is_dir():
        files = _archive_files(path)
        if not files:
            return _class_folders(_pick_folder(path, split), labels=labels)
        files = _pick_files(files, path, split)
    elif split is not None:
        raise InputError(
            f"{source}@{split}: a single file has no splits; leave out @{split}, or give the "
            "folder that holds a file for each split"
        )
    else:
        files = [path]
    kinds = {file.suffix for file in files}
    if kinds == {".parquet"}:
        return archives.parquet(files)
    if kinds == {".tar"}:
        return archives.tar(files, EXTENSIONS)
    if len(kinds) > 1:
        raise InputError(f"{source}: holds .parquet and .tar files; give one of them")
    raise InputError(f"{source}: not a .parquet or .tar file, nor a folder of class folders")


def _is_timm(source: str) -> bool:
    kind, _, rest = source.partition("/")
    return kind in ("torch", "hfds") and bool(rest) and not Path(source).exists()


def _path(source: str) -> Path:
    if source.startswith("wds/") and not Path(source).exists():
        source = source.removeprefix("wds/")
    elif source.startswith("torch/") and not Path(source).exists():
        source = source.partition(":")[2] or source
    return Path(source).expanduser()


@dataclass(frozen=True)
class _Pixels:
    arrays: npt.NDArray[np.uint8]

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.arrays[index])


def _digits(split: str | None) -> archives.Listing:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    rows = np.arange(len(pixels))
    if split is not None:
        train, test = train_test_split(rows, test_size=360, stratify=bunch.target, random_state=0)
        by_name = {"train": train, "test": test}
        if split not in by_name:
            raise InputError(f"digits@{split}: digits has the splits train and test")
        rows = np.sort(by_name[split])
    classes = tuple(str(name) for name in bunch.target_names)
    store = _Pixels(np.repeat(pixels[rows, :, :, None], 3, axis=3))
    return archives.Listing(store, [f"digits/{row}" for row in rows], bunch.target[rows], classes)


@dataclass(frozen=True)
class _Files:
    paths: tuple[Path, ...]

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()


def _class_folders(root: Path, *, labels: bool) -> archives.Listing:
    folders = sorted(_folders(root), key=lambda folder: archives.natural(folder.name))
    if not folders and not labels:
        found = sorted(path for path in root.iterdir() if _is_image(path.name))
        ids = [path.name for path in found]
        return archives.Listing(_Files(tuple(found)), ids, [0] * len(ids), UNLABELLED)
    if not folders:
        raise InputError(f"{root}: holds no class folders; put each class's images in its folder")
    paths: list[Path] = []
    numbers: list[int] = []
    for label, folder in enumerate(folders):
        inside: list[Path] = []
        for place, nested, names in os.walk(folder):
            nested[:] = _visible(nested)
            inside += [Path(place, name) for name in _visible(names) if _is_image(name)]
        if not inside:
            raise InputError(f"{folder}: class folder without images; add images or remove it")
        paths += sorted(inside)
        numbers += [label] * len(inside)
    ids = [str(path.relative_to(root)) for path in paths]
    return archives.Listing(
        _Files(tuple(paths)), ids, numbers, tuple(folder.name for folder in folders)
    )


def _visible(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


def _folders(root: Path) -> list[Path]:
    return [root / name for name in _visible(p.name for p in root.iterdir() if p.is_dir())]


def _is_image(name: str) -> bool:
    return PurePath(name).suffix.lower() in EXTENSIONS


def _archive_files(root: Path) -> list[Path]:
    # The walk ends at the first image, so that a folder of a million images is not read twice.
    found: list[Path] = []
    for place, folders, names in os.walk(root):
        folders[:] = _visible(folders)
        files = _visible(names)
        if any(_is_image(name) for name in files):
            if found:
                raise InputError(
                    f"{root}: holds both {found[0].relative_to(root)} and image files in "
                    f"{place}; give the file itself, or move it away"
                )
            return []
        found += [Path(place, n) for n in files if n.endswith((".parquet", ".tar"))]
    return sorted(found, key=lambda path: archives.natural(str(path)))


def _split_word(file: Path, root: Path) -> str | None:
    # In `test/train.parquet` the last word counts.
    found = re.findall(
        rf"(?:^|[-_./])({'|'.join(WORDS)})(?=$|[-_./])", str(file.relative_to(root)).lower()
    )
    return found[-1] if found else None


def _pick_files(files: list[Path], root: Path, split: str | None) -> list[Path]:
    words = [_split_word(file, root) for file in files]
    if split is None:
        found = sorted({word for word in words if word is not None})
        _refuse_splits(root, found if len(found) > 1 else [])
        return files
    for name in (split, *_synonyms(split)):
        chosen = [file for file, word in zip(files, words, strict=True) if word == name]
        if chosen:
            return chosen
    names = ", ".join(str(file.relative_to(root)) for file in files[:5])
    raise InputError(f"{root}@{split}: no file of that split; found {names}")


def _synonyms(split: str) -> tuple[str, ...]:
    return next((words for words in SPLITS.values() if split in words), ())


def _split_folders(root: Path) -> dict[str, Path]:
    # A folder called `train` that holds images may well be a class beside `bus` and `tram`.
    folders = _folders(root)
    named = {folder.name.lower(): folder for folder in folders if folder.name.lower() in WORDS}
    if len(named) == len(folders):
        return named
    return {name: folder for name, folder in named.items() if _folders(folder)}


def _pick_folder(root: Path, split: str | None) -> Path:
    found = _split_folders(root)
    if split is None:
        _refuse_splits(root, list(found))
        return root
    for name in (split, *_synonyms(split)):
        if name in found:
            return found[name]
    if (root / split).is_dir() and _folders(root / split):
        return root / split
    raise InputError(f"{root}@{split}: no such split; found {', '.join(found) or 'none'}")


def _refuse_splits(root: Path, found: list[str]) -> None:
    if found:
        raise InputError(
            f"{root}: holds the splits {', '.join(found)}; name one, for example {root}@{found[0]}"
        )
