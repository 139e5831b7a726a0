"""A labelled image collection, opened from any source that `remanence.kit.sources` knows."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from remanence.errors import InputError
from remanence.kit import sources
from remanence.kit.progress import bar, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from remanence.kit.archives import Listing

CACHE_BYTES = 4 * 2**30
# A label beyond this without class names is a mistake, not a class.
MOST_CLASSES = 10**6
_NO_PIXELS = np.zeros((0, 0, 3), dtype=np.uint8)


class Store(Protocol):
    """Where the encoded images lie."""

    def read(self, index: int) -> bytes | Image.Image:
        """Return image `index`, encoded or already opened."""
        ...


@dataclass(frozen=True)
class Images:
    """A labelled image collection with random access.

    Attributes:
        source: What the user wrote, without the split.
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
        """Return image `index` as RGB of 8 bits a channel.

        Raises:
            InputError: The image cannot be decoded.
        """
        if self.decoded is not None:
            return Image.fromarray(self.decoded[index])
        try:
            raw = self.store.read(int(self.order[index]))
            return _rgb(Image.open(io.BytesIO(raw)) if isinstance(raw, bytes) else raw)
        except Exception as error:  # decoders raise whatever the broken bytes lead to
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                reason = "not an image"
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
        """Split at random into two halves, each class as evenly as it goes.

        Raises:
            InputError: There are fewer than two images.
        """
        first = self._every(2, seed)
        return self.subset(np.flatnonzero(first)), self._uncounted(~first)

    def hold_out(self, seed: int = 0) -> tuple[Images, Images]:
        """Split at random into nine tenths and one tenth, each class as evenly as it goes.

        Raises:
            InputError: There are fewer than two images.
        """
        held = self._every(10, seed)
        return self.subset(np.flatnonzero(~held)), self._uncounted(held)

    def _every(self, step: int, seed: int) -> npt.NDArray[np.bool_]:
        if len(self) < 2:
            raise InputError(f"{self.source}: {len(self)} image is too few to split")
        shuffled = np.random.default_rng(seed).permutation(len(self))
        by_class = shuffled[np.argsort(self.labels[shuffled], kind="stable")]
        chosen = np.zeros(len(self), dtype=bool)
        chosen[by_class[:: min(step, len(self))]] = True
        return chosen

    def _uncounted(self, chosen: npt.NDArray[np.bool_]) -> Images:
        # Of two parts, the first counts the images that were left out of both.
        return replace(self.subset(np.flatnonzero(chosen)), skipped=0)

    def sizes(self, limit: int = 2000) -> npt.NDArray[np.int64]:
        """Return height and width of up to `limit` images, evenly spread, (M, 2)."""
        chosen = _spread(len(self), limit)
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
    labels: bool = True,
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
        labels: Refuse a folder whose images lie in no class folders; else they are of one class,
            `remanence.kit.sources.UNLABELLED`.
        show: Show progress.

    Returns:
        The opened images.

    Raises:
        InputError: The source, the split, a class, a column or an image is missing or broken.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: must be at least 1")
    source, named = sources.parse(source)
    split = split if named is None else named
    images = _labelled(source, sources.find(source, split, labels=labels))
    if limit is not None and limit < len(images):
        images = images.subset(np.sort(np.random.default_rng(0).permutation(len(images))[:limit]))
    return _decode(images, skip_broken=skip_broken, cache_bytes=cache_bytes, show=show)


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
    names = sources.splits(source)
    if "train" not in names:
        train, validation = open_images(source, **options).hold_out()
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
    train, validation = train.hold_out()
    return train, validation, test


def _numbered(images: Images) -> bool:
    return images.classes == tuple(str(i) for i in range(len(images.classes)))


def _rgb(opened: Image.Image) -> Image.Image:
    if opened.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255 instead of scaling
        scaled = np.asarray(opened).clip(0, 65535) // 257
        opened = Image.fromarray(scaled.astype(np.uint8))
    elif opened.mode == "P" and "transparency" in opened.info:
        opened = opened.convert("RGBA")  # the same pixels, without Pillow's warning
    return opened.convert("RGB")


def _labelled(source: str, listing: Listing) -> Images:
    if not len(listing.labels):
        raise InputError(f"{source}: holds no images")
    known = len(listing.classes) or MOST_CLASSES
    low, high = int(np.argmin(listing.labels)), int(np.argmax(listing.labels))
    for index in (low, high):
        if not 0 <= listing.labels[index] < known:
            raise InputError(
                f"{listing.ids[index]}: label {listing.labels[index]} is out of range; labels of "
                f"{source} go from 0 to {known - 1}"
            )
    classes = listing.classes or tuple(str(i) for i in range(int(listing.labels[high]) + 1))
    labels = np.asarray(listing.labels, dtype=np.int64)
    order = np.arange(len(labels), dtype=np.int64)
    return Images(source, tuple(classes), labels, tuple(listing.ids), listing.store, order)


def _decode(images: Images, *, skip_broken: bool, cache_bytes: int, show: bool) -> Images:
    probed = (_pixels(images, int(i), skip=True) for i in _spread(len(images), 32))
    sizes = [pixels.nbytes for pixels in probed if pixels is not None]
    keep = not sizes or float(np.mean(sizes)) * len(images) <= cache_bytes
    if not keep and not skip_broken:
        return images

    def read(rows: range) -> list[npt.NDArray[np.uint8] | None]:
        found: list[npt.NDArray[np.uint8] | None] = []
        for row in rows:
            pixels = _pixels(images, row, skip=skip_broken)
            # Over the limit only the verdict is kept; a slice would hold on to the pixels.
            found.append(pixels if keep or pixels is None else _NO_PIXELS)
        return found

    # Small images take a thread longer to be handed than to be read: it gets 64 at a time.
    count = len(images)
    chunks = [range(start, min(start + 64, count)) for start in range(0, count, 64)]
    arrays: list[npt.NDArray[np.uint8] | None] = []
    with (
        ThreadPoolExecutor() as pool,
        bar(f"read {images.source}", count, show=show and count > 2000) as progress,
    ):
        for part in pool.map(read, chunks):
            arrays += part
            progress.advance(len(part))
    good = [i for i, array in enumerate(arrays) if array is not None]
    if not good:
        raise InputError(f"{images.source}: none of its {count} images can be read")
    skipped = count - len(good)
    if skipped and show:
        first = next(i for i, array in enumerate(arrays) if array is None)
        say(
            f"{images.source}: left out {skipped} unreadable of {count} images, "
            f"first {images.ids[first]}"
        )
    decoded = tuple(array for array in arrays if array is not None) if keep else None
    return replace(images.subset(good), decoded=decoded, skipped=skipped)


def _pixels(images: Images, index: int, *, skip: bool) -> npt.NDArray[np.uint8] | None:
    try:
        return np.asarray(images.image(index))
    except InputError:
        if skip:
            return None
        raise


def _spread(count: int, limit: int) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(np.int64))
