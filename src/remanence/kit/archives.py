"""Image collections in files that hold many images: parquet, tar, and timm's dataset names."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import tarfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image


@dataclass(frozen=True)
class Listing:
    """What a collection holds: a store to read from, and a name and label for each image.

    Attributes:
        store: Object with `read(index)` giving encoded bytes or an opened image.
        ids: A name for each image (N).
        labels: Class index of each image (N).
        classes: Class names in label order; empty where the collection names none.
    """

    store: Any
    ids: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...] = ()


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key by which folder 10 comes after folder 9 (ImageNet-V2 names its classes 0..999)."""
    return [
        (0, int(part)) if part.isdecimal() else (1, part.lower())
        for part in re.split(r"(\d+)", name)
        if part
    ]


@dataclass
class _ParquetStore:
    """Row groups are read when asked for and a few are kept: sequential reads stay cheap."""

    files: tuple[Path, ...]
    column: str = ""
    groups: list[tuple[int, int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._group = lru_cache(maxsize=4)(self._read_group)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_group"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def _read_group(self, group: int) -> Any:
        import pyarrow.parquet as pq

        file, row_group = self.groups[group]
        opened = pq.ParquetFile(self.files[file])
        return opened.read_row_group(row_group, columns=[self.column]).column(0)

    def read(self, index: int) -> bytes:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        value = self._group(group)[index - self.starts[group]].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise TypeError("no image bytes")
        return data


def parquet(files: Sequence[Path]) -> Listing:
    """List parquet files in the Hugging Face layout.

    Args:
        files: Files that share one schema: a column `image` (or `img`), a struct with `bytes`, and
            an integer column `label` (or `labels`).

    Returns:
        The listing; class names come from the Hugging Face metadata where it is there.

    Raises:
        InputError: A file is not parquet, a column is missing, or the files disagree.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    store = _ParquetStore(tuple(files))
    ids: list[str] = []
    labels: list[int] = []
    classes: tuple[str, ...] = ()
    for number, (path, name) in enumerate(zip(files, _names(files), strict=True)):
        try:
            opened = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: not a readable parquet file ({reason})") from error
        columns = opened.schema_arrow.names
        image_column = _column(path, columns, ("image", "img"))
        label_column = _column(path, columns, ("label", "labels"))
        named = _label_names(opened.schema_arrow.metadata, label_column)
        if number and (image_column, named) != (store.column, classes):
            raise InputError(
                f"{path}: has another image column or other class names than {files[0]}; "
                "write all files with one schema"
            )
        store.column, classes = image_column, named
        column = opened.read(columns=[label_column]).column(0)
        if not pa.types.is_integer(column.type) or column.null_count:
            raise InputError(f"{path}: column {label_column!r} must hold an integer in every row")
        ids += [f"{name}:{row}" for row in range(len(column))]
        start = len(labels)
        labels += column.to_pylist()
        for row_group in range(opened.num_row_groups):
            store.groups.append((number, row_group))
            store.starts.append(start)
            start += opened.metadata.row_group(row_group).num_rows
    return Listing(store, ids, labels, classes)


def _names(files: Sequence[Path]) -> list[str]:
    # fold1/0000.parquet and fold2/0000.parquet keep what tells them apart.
    root = os.path.commonpath([file.parent for file in files])
    return [str(file.relative_to(root)) for file in files]


def _column(path: Path, names: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise InputError(
        f"{path}: no column {wanted[0]!r}; it has {', '.join(names)}. "
        "Rename the column to follow the Hugging Face layout (image: struct with bytes, label: int)"
    )


def _label_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    try:
        info = json.loads((metadata or {})[b"huggingface"])
        return tuple(info["info"]["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


@dataclass(frozen=True)
class _TarStore:
    files: tuple[Path, ...]
    members: tuple[tuple[int, int, int], ...]  # file, offset, size

    def read(self, index: int) -> bytes:
        file, offset, size = self.members[index]
        with self.files[file].open("rb") as opened:
            return os.pread(opened.fileno(), size, offset)


def tar(files: Sequence[Path], extensions: frozenset[str]) -> Listing:
    """List tar files: members in class folders, or webdataset samples with a `.cls` beside each.

    Only the headers are read; images are then read from where they lie.

    Args:
        files: Uncompressed tar files.
        extensions: Suffixes of image files, in lower case with the dot.

    Returns:
        The listing.

    Raises:
        InputError: A file is not an uncompressed tar, or a member has no class.
    """
    members: list[tuple[int, int, int]] = []
    ids: list[str] = []
    keys: list[str] = []
    places: list[PurePosixPath] = []
    numbers: dict[str, int] = {}
    for file, (path, prefix) in enumerate(zip(files, _names(files), strict=True)):
        try:
            with tarfile.open(path, "r:") as opened:
                for member in opened:
                    name = PurePosixPath(member.name)
                    if not member.isfile() or name.name.startswith("."):
                        continue
                    key = f"{prefix}/{name.with_suffix('')}"
                    if name.suffix == ".cls":
                        numbers[key] = _class_number(opened, member, path)
                    elif name.suffix.lower() in extensions:
                        members.append((file, member.offset_data, member.size))
                        ids.append(f"{prefix}/{name}")
                        keys.append(key)
                        places.append(name.parent)
        except (tarfile.TarError, EOFError) as error:
            raise InputError(f"{path}: not a whole, uncompressed tar file ({error})") from error
    store = _TarStore(tuple(files), tuple(members))
    if numbers:
        for image, key in zip(ids, keys, strict=True):
            if key not in numbers:
                raise InputError(f"{image}: has no .cls file beside it to give its label")
        return Listing(store, ids, [numbers[key] for key in keys])
    folders: dict[str, PurePosixPath] = {}
    for image, place in zip(ids, places, strict=True):
        if not place.name:
            raise InputError(f"{image}: lies in no class folder and has no .cls file beside it")
        if folders.setdefault(place.name, place) != place:
            raise InputError(
                f"{image}: {folders[place.name]} is also a class folder {place.name}; "
                "pack each split in a tar of its own, without folders in class folders"
            )
    classes = tuple(sorted(folders, key=natural))
    number = {folder: label for label, folder in enumerate(classes)}
    return Listing(store, ids, [number[place.name] for place in places], classes)


def _class_number(opened: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    stream = opened.extractfile(member)
    text = stream.read() if stream is not None else b""
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{path}/{member.name}: {text[:20]!r} is not a class number") from error


@dataclass(frozen=True)
class _TimmStore:
    dataset: Any

    def read(self, index: int) -> bytes | Image.Image:
        reader = getattr(self.dataset, "reader", None)
        if reader is None:  # a torchvision dataset
            image: Image.Image = self.dataset[index][0]
            return image
        stream, _ = reader[index][:2]
        data: bytes = stream.read()
        return data


def timm_dataset(name: str, split: str | None) -> Listing:
    """List one of timm's datasets; nothing is downloaded but what a `hfds/` name asks for.

    Args:
        name: `torch/NAME:ROOT` or `hfds/NAME`.
        split: Split; `train` where none is given.

    Returns:
        The listing.

    Raises:
        InputError: timm does not know the dataset, it is not at the root, or an extra is missing.
    """
    from timm.data import create_dataset

    dataset_name, _, root = name.partition(":")
    if name.startswith("hfds/") and importlib.util.find_spec("datasets") is None:
        raise InputError(f"{name}: needs the extra 'hf': pip install 'remanence[hf]'")
    try:
        dataset = create_dataset(
            dataset_name, root=root or None, split=split or "train", download=False
        )
        reader = getattr(dataset, "reader", None)
        if reader is None:
            labels = [int(label) for label in dataset.targets]
            classes = getattr(dataset, "classes", ())
        else:
            labels = [int(label) for label in reader.dataset[reader.label_key]]
            classes = getattr(reader.dataset.features[reader.label_key], "names", None) or ()
    except Exception as error:  # timm and what it wraps raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{name}: timm cannot open it ({reason}); give torch/NAME:ROOT with ROOT holding the "
            "files of a classification data set, or hfds/NAME"
        ) from error
    ids = [f"{name}/{row}" for row in range(len(labels))]
    return Listing(_TimmStore(dataset), ids, labels, tuple(str(known) for known in classes))
