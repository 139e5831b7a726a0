"""Image sources: one grammar for every command.

| written as | is |
|---|---|
| `digits` | scikit-learn's 1,797 handwritten digits of 8x8 pixels, embedded |
| a folder | class folders of image files, or split folders that hold class folders |
| `FILE.parquet`, or a folder of them | Hugging Face layout: `image` struct of bytes, `label` |
| `FILE.tar`, or a folder of them | class folders in a tar, or webdataset samples (`x.jpg` + `x.cls`) |
| `torch/NAME:ROOT`, `hfds/NAME`, `wds/FOLDER` | timm's dataset names |

`SOURCE@split` picks a split.
"""

from __future__ import annotations

import io
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from remanence.errors import InputError
from remanence.kit import archives
from remanence.kit.progress import say, track

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
SPLIT_SYNONYMS = (("train", "training"), ("validation", "val", "valid", "dev"), ("test", "testing"))
CACHE_BYTES = 4 * 2**30


class Store(Protocol):
    """Where the encoded images lie."""

    def read(self, index: int) -> bytes | Image.Image:
        """Return image `index`, encoded or already opened."""
        ...


@dataclass(frozen=True)
class Images:
    """A labelled image collection with random access.

    Attributes:
        source: What the user wrote.
        classes: Class names, in label order.
        labels: Class index of each image, (N,) int64.
        ids: A name for each image, unique in the source (N).
        store: Where the encoded images lie.
        order: Position of each image in the store, (N,) int64.
        decoded: The pixels of every image, uint8 (H, W, 3), where they fit in memory.
        skipped: Number of unreadable images left out.
    """

    source: str
    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    ids: tuple[str, ...]
    store: Store
    order: npt.NDArray[np.int64]
    decoded: tuple[npt.NDArray[np.uint8], ...] | None = None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Return image `index` as RGB.

        Raises:
            InputError: The image cannot be decoded.
        """
        if self.decoded is not None:
            return Image.fromarray(self.decoded[index])
        try:
            raw = self.store.read(int(self.order[index]))
            opened = Image.open(io.BytesIO(raw)) if isinstance(raw, bytes) else raw
            return opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = (
                "not an image" if isinstance(error, UnidentifiedImageError) else _one_line(error)
            )
            raise InputError(
                f"{self.ids[index]}: unreadable image ({reason}); "
                "repair or remove it, or pass --skip-broken"
            ) from error

    def subset(self, indices: npt.NDArray[np.int64] | Sequence[int]) -> Images:
        """Return the images at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            labels=self.labels[chosen],
            ids=tuple(self.ids[i] for i in chosen),
            order=self.order[chosen],
            decoded=None if self.decoded is None else tuple(self.decoded[i] for i in chosen),
        )

    def halves(self, seed: int) -> tuple[Images, Images]:
        """Split at random into two halves, each class as evenly as it goes."""
        shuffled = np.random.default_rng(seed).permutation(len(self))
        by_class = shuffled[np.argsort(self.labels[shuffled], kind="stable")]
        return self.subset(np.sort(by_class[0::2])), self.subset(np.sort(by_class[1::2]))

    def sizes(self, limit: int = 2000) -> npt.NDArray[np.int64]:
        """Return height and width of up to `limit` images, evenly spread, (M, 2)."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(limit, len(self))).astype(np.int64))
        if self.decoded is not None:
            return np.array([self.decoded[i].shape[:2] for i in chosen], dtype=np.int64)
        return np.array([self.image(int(i)).size[::-1] for i in chosen], dtype=np.int64)


def open_images(
    source: str,
    *,
    split: str | None = None,
    skip_broken: bool = False,
    cache_bytes: int = CACHE_BYTES,
    limit: int | None = None,
    show: bool = True,
) -> Images:
    """Open an image source.

    Images are decoded once and kept as uint8 where the whole source fits in `cache_bytes`, so
    that an epoch over small images costs no decoding.

    Args:
        source: The source, with `@split` if one is meant.
        split: Split to open where `source` names none.
        skip_broken: Leave unreadable images out and count them, instead of failing.
        cache_bytes: Memory that decoded images may take.
        limit: Keep only the first so many images of a fixed shuffle (seed 0).
        show: Show progress.

    Returns:
        The opened images.

    Raises:
        InputError: The source, the split, a class, a column or an image is missing or broken.
    """
    name, at, named = source.rpartition("@")
    if at:
        source, split = name, named
    images = _open_store(source, split)
    if limit is not None and limit < len(images):
        images = images.subset(np.sort(np.random.default_rng(0).permutation(len(images))[:limit]))
    return _decode(images, skip_broken=skip_broken, cache_bytes=cache_bytes, show=show)


def splits(source: str) -> list[str]:
    """Return the splits that a source offers, by their usual names: train, validation, test.

    A source without splits, or one that already names its split, gives an empty list.
    """
    if "@" in source:
        return []
    if source == "digits":
        return ["train", "test"]
    kind, _, rest = source.partition("/")
    if kind == "torch":
        return ["train", "test"]
    root = Path(rest if kind == "wds" and rest else source)
    if not root.is_dir():
        return []
    found = []
    for synonyms in SPLIT_SYNONYMS:
        if any(_in_split(path.name, name) for path in root.iterdir() for name in synonyms):
            found.append(synonyms[0])
    return found


def open_splits(source: str, **options: Any) -> tuple[Images, Images, Images | None]:
    """Open the training, validation and test images of a source.

    Where a source has a test split but none for validation, a tenth of the training images
    (seed 0) is held out; where it has no split at all, likewise.

    Args:
        source: The source; one that names its split is only divided.
        options: Passed on to `open_images`.

    Returns:
        Training images, validation images, and test images where the source has them.

    Raises:
        InputError: As `open_images`, or the splits disagree about the classes.
    """
    names = splits(source)
    if "train" not in names:
        whole = open_images(source, **options)
        train, validation = _hold_out(whole)
        return train, validation, None
    train = open_images(source, split="train", **options)
    others = {
        name: open_images(source, split=name, **options)
        for name in ("validation", "test")
        if name in names
    }
    for name, images in others.items():
        if len(images.classes) < len(train.classes) and _numbered(images) and _numbered(train):
            # Without class names a split knows only the labels that it happens to hold.
            others[name] = replace(images, classes=train.classes)
        elif images.classes != train.classes:
            odd = sorted(set(images.classes) ^ set(train.classes)) or list(images.classes)
            raise InputError(
                f"{source}: split {name} and split train have different classes "
                f"({', '.join(odd[:5])}); give both the same class folders or label names"
            )
    test = others.get("test")
    if "validation" in others:
        return train, others["validation"], test
    train, validation = _hold_out(train)
    return train, validation, test


def _numbered(images: Images) -> bool:
    return images.classes == tuple(str(i) for i in range(len(images.classes)))


def _hold_out(images: Images) -> tuple[Images, Images]:
    if len(images) < 2:
        raise InputError(f"{images.source}: {len(images)} image is too few to hold any out")
    shuffled = np.random.default_rng(0).permutation(len(images))
    by_class = shuffled[np.argsort(images.labels[shuffled], kind="stable")]
    held = np.zeros(len(images), dtype=bool)
    held[by_class[:: min(10, len(images))]] = True
    return images.subset(np.flatnonzero(~held)), images.subset(np.flatnonzero(held))


def _open_store(source: str, split: str | None) -> Images:
    if source == "digits":
        return _digits(split)
    kind, _, rest = source.partition("/")
    if kind in ("torch", "hfds") and rest:
        listing = archives.timm_dataset(source, split)
        return _images(source, listing)
    path = Path(rest if kind == "wds" and rest else source).expanduser()
    if not path.exists():
        raise InputError(
            f"{source}: no such file or folder; give a folder of class folders, a .parquet or "
            ".tar file, 'digits', or a timm dataset name such as torch/cifar10:ROOT"
        )
    if path.is_file():
        files = [path]
    else:
        files = sorted(p for p in path.rglob("*") if p.suffix in (".parquet", ".tar"))
        if split is not None and files:
            files = _pick_files(files, path, source, split)
    if files and all(f.suffix == ".parquet" for f in files):
        return _images(source, archives.parquet(files))
    if files and all(f.suffix == ".tar" for f in files):
        return _images(source, archives.tar(files, EXTENSIONS))
    if files and path.is_file():
        raise InputError(f"{source}: not a .parquet or .tar file, nor a folder of class folders")
    return _images(source, _class_folders(_pick_folder(path, split), source))


def _images(source: str, listing: archives.Listing) -> Images:
    if not len(listing.labels):
        raise InputError(f"{source}: holds no images")
    labels = np.asarray(listing.labels, dtype=np.int64)
    classes = listing.classes or tuple(str(i) for i in range(int(labels.max()) + 1))
    for index in np.flatnonzero((labels < 0) | (labels >= len(classes)))[:1]:
        raise InputError(
            f"{listing.ids[index]}: label {labels[index]} is out of range; "
            f"{source} has {len(classes)} classes, so labels go from 0 to {len(classes) - 1}"
        )
    order = np.arange(len(labels), dtype=np.int64)
    return Images(source, tuple(classes), labels, tuple(listing.ids), listing.store, order)


@dataclass(frozen=True)
class _Pixels:
    arrays: npt.NDArray[np.uint8]

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.arrays[index])


def _digits(split: str | None) -> Images:
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
    ids = [f"digits/{row}" for row in rows]
    store = _Pixels(np.repeat(pixels[rows, :, :, None], 3, axis=3))
    return _images("digits", archives.Listing(store, ids, bunch.target[rows], classes))


@dataclass(frozen=True)
class _Files:
    paths: tuple[Path, ...]

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()


def _class_folders(root: Path, source: str) -> archives.Listing:
    folders = sorted(
        (p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")),
        key=lambda p: archives.natural(p.name),
    )
    if not folders:
        raise InputError(f"{root}: holds no class folders; put each class's images in its folder")
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        inside = sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file()
        )
        if not inside:
            raise InputError(
                f"{folder}: class folder without images; add images to it or remove it from {source}"
            )
        paths += inside
        labels += [label] * len(inside)
    ids = [str(p.relative_to(root)) for p in paths]
    classes = tuple(folder.name for folder in folders)
    return archives.Listing(_Files(tuple(paths)), ids, labels, classes)


def _in_split(name: str, split: str) -> bool:
    return re.search(rf"(^|[-_./]){re.escape(split)}($|[-_./])", name) is not None


def _synonyms(split: str) -> tuple[str, ...]:
    return next((names for names in SPLIT_SYNONYMS if split in names), (split,))


def _pick_files(files: list[Path], root: Path, source: str, split: str) -> list[Path]:
    for name in _synonyms(split):
        chosen = [f for f in files if _in_split(str(f.relative_to(root)), name)]
        if chosen:
            return chosen
    names = ", ".join(f.name for f in files[:5])
    raise InputError(f"{source}@{split}: no file of that split; found {names}")


def _pick_folder(root: Path, split: str | None) -> Path:
    inside = {p.name: p for p in root.iterdir() if p.is_dir()}
    if split is None:
        known = [n for names in SPLIT_SYNONYMS for n in names if n in inside]
        if known and set(known) == set(inside):
            raise InputError(
                f"{root}: holds the splits {', '.join(sorted(known))}; "
                f"name one, for example {root}@{known[0]}"
            )
        return root
    for name in _synonyms(split):
        if name in inside:
            return inside[name]
    raise InputError(f"{root}@{split}: no such split; found {', '.join(sorted(inside)) or 'none'}")


def _decode(images: Images, *, skip_broken: bool, cache_bytes: int, show: bool) -> Images:
    probe = np.unique(np.linspace(0, len(images) - 1, min(32, len(images))).astype(np.int64))
    pixels = [p for p in (_pixels(images, int(i), skip=True) for i in probe) if p is not None]
    mean_bytes = float(np.mean([p.nbytes for p in pixels])) if pixels else 0.0
    keep = mean_bytes * len(images) <= cache_bytes
    if not keep and not skip_broken:
        return images

    def read(index: int) -> npt.NDArray[np.uint8] | None:
        array = _pixels(images, index, skip=skip_broken)
        # Over the limit only the verdict is kept, not the pixels.
        return array if keep or array is None else array[:0]

    with ThreadPoolExecutor() as pool:
        arrays = list(
            track(
                _Mapped(pool, read, len(images)),
                f"read {images.source}",
                show=show and len(images) > 2000,
            )
        )
    good = [i for i, array in enumerate(arrays) if array is not None]
    if not good:
        raise InputError(f"{images.source}: none of its {len(images)} images can be read")
    skipped = len(images) - len(good)
    if skipped and show:
        say(f"{images.source}: left out {skipped} unreadable images of {len(images)}")
    kept = images.subset(good)
    decoded = tuple(arrays[i] for i in good) if keep else None
    return replace(kept, decoded=decoded, skipped=skipped)  # type: ignore[arg-type]  # None was filtered


class _Mapped:
    """Results of a thread pool, as a sized iterable that holds few of them back."""

    def __init__(self, pool: ThreadPoolExecutor, function: Any, count: int) -> None:
        self._results = pool.map(function, range(count))
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Any:
        return iter(self._results)


def _pixels(images: Images, index: int, *, skip: bool) -> npt.NDArray[np.uint8] | None:
    try:
        return np.asarray(images.image(index))
    except InputError:
        if skip:
            return None
        raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
