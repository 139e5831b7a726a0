"""Random crops that gradients flow through, one set of random numbers per image.

A crop followed by a bilinear resize, with or without antialiasing, a flip and a zero border are all
linear maps that act on rows and columns apart, so each augmentation draws a window per axis and
one function turns windows into two matrices per image and applies them to the whole batch. The
same windows can be applied to an image and to its marked version.

The windows follow torchvision's transforms; the weights follow Pillow's antialiased bilinear
resize (a triangle filter that widens with the scale).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Windows:
    """Where each output pixel looks, per image and axis (rows, then columns).

    Output pixel o is centred at `start + (o + 0.5) * scale` in pixels of the input and sees only
    input pixels from `low` up to, and without, `high`.

    Attributes:
        start: (N, 2) float64.
        scale: (N, 2) float64, input pixels per output pixel, positive.
        low: (N, 2) float64, whole numbers.
        high: (N, 2) float64, whole numbers.
        flip: (N,) bool, mirror left to right.
        size: Height and width of the output.
        antialias: Widen the filter where the image shrinks, as Pillow does; without it the
            weights are those of `torch.nn.functional.interpolate(mode="bilinear")`.
    """

    start: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    flip: Tensor
    size: tuple[int, int]
    antialias: bool = True


class Augmentation(Protocol):
    """What marking sees the images through."""

    @property
    def smallest(self) -> int:
        """Images whose shorter side is below this are refused."""
        ...

    def sample(self, shape: tuple[int, int], generators: Sequence[torch.Generator]) -> Windows:
        """Draw one window per generator for images of a height and width."""
        ...

    def plain(self, shape: tuple[int, int], n: int) -> Windows:
        """Return the fixed windows of `n` images that a model is tested on."""
        ...


def apply(images: Tensor, windows: Windows) -> Tensor:
    """See images through windows; differentiable in the images.

    Args:
        images: (N, C, H, W) floats in units in which a padded border is 0, such as grey levels.
        windows: N windows.

    Returns:
        (N, C, *windows.size), same dtype and device.
    """
    n, channels, height, width = images.shape
    rows = _weights(windows, 0, height, images.device).to(images.dtype)
    columns = _weights(windows, 1, width, images.device).to(images.dtype)
    columns = torch.where(windows.flip.to(images.device)[:, None, None], columns.flip(1), columns)
    narrow = torch.bmm(images.reshape(n, channels * height, width), columns.mT)
    return torch.einsum("nih,nchw->nciw", rows, narrow.view(n, channels, height, -1))


def _weights(windows: Windows, axis: int, extent: int, device: torch.device) -> Tensor:
    """Return (N, windows.size[axis], extent) weights; rows sum to 1, or 0 beyond the image."""
    start, scale, low, high = (
        field[:, axis, None, None].to(device)
        for field in (windows.start, windows.scale, windows.low, windows.high)
    )
    output = torch.arange(windows.size[axis], dtype=torch.float64, device=device)[:, None]
    pixel = torch.arange(extent, dtype=torch.float64, device=device)
    centre = start + (output + 0.5) * scale
    reach = scale.clamp(min=1) if windows.antialias else torch.ones_like(scale)
    weights = (1 - (pixel + 0.5 - centre).abs() / reach).clamp(min=0)
    weights = weights * ((pixel >= low) & (pixel < high))
    total = weights.sum(dim=2, keepdim=True)
    return weights / torch.where(total > 0, total, 1)


def image_generator(seed: int, identity: int | str, stream: str = "mark") -> torch.Generator:
    """Return the random numbers of one image, whatever else is in its batch.

    Every `sample` takes the same number of draws, so the windows of an iteration depend only on
    the seed, the image's identity and the iteration's number.

    Args:
        seed: Seed of the whole run.
        identity: Name of the image.
        stream: Keeps draws for different purposes apart.
    """
    digest = hashlib.blake2b(f"{seed}|{stream}|{identity}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Identity:
    """The image as it is."""

    @property
    def smallest(self) -> int:
        """Smallest side of an image."""
        return 1

    def sample(self, shape: tuple[int, int], generators: Sequence[torch.Generator]) -> Windows:
        """Return windows that change nothing."""
        return self.plain(shape, len(generators))

    def plain(self, shape: tuple[int, int], n: int) -> Windows:
        """Return windows that change nothing."""
        high = torch.tensor(shape, dtype=torch.float64).expand(n, 2)
        zero = torch.zeros_like(high)
        return Windows(zero, zero + 1, zero, high, torch.zeros(n, dtype=torch.bool), shape)


@dataclass(frozen=True)
class CenterCrop:
    """Resize the shorter side, then cut the centre: torchvision's `Resize` and `CenterCrop`.

    Attributes:
        size: Side of the square output.
        resize: Length of the shorter side before the cut, at least `size`.
        antialias: See `Windows`.
    """

    size: int = 224
    resize: int = 256
    antialias: bool = True

    def __post_init__(self) -> None:
        """Refuse a crop larger than what it is cut from."""
        if not 0 < self.size <= self.resize:
            raise InputError(
                f"a crop of {self.size} does not fit {self.resize}: give resize of at least size"
            )

    @property
    def smallest(self) -> int:
        """Smallest side of an image."""
        return self.size

    def sample(self, shape: tuple[int, int], generators: Sequence[torch.Generator]) -> Windows:
        """Return the centre, for each generator."""
        return self.plain(shape, len(generators))

    def plain(self, shape: tuple[int, int], n: int) -> Windows:
        """Return the centre."""
        extent = torch.tensor(shape, dtype=torch.float64)
        short = min(shape)
        resized = torch.tensor(
            [self.resize if side == short else self.resize * side // short for side in shape],
            dtype=torch.float64,
        )
        scale = extent / resized
        start = torch.round((resized - self.size) / 2) * scale
        return Windows(
            start.expand(n, 2),
            scale.expand(n, 2),
            torch.zeros(n, 2, dtype=torch.float64),
            extent.expand(n, 2),
            torch.zeros(n, dtype=torch.bool),
            (self.size, self.size),
            self.antialias,
        )


@dataclass(frozen=True)
class PadCropFlip:
    """Pad with zeros, cut at random, mirror half of the time: the augmentation of CIFAR.

    Attributes:
        size: Side of the square output.
        pad: Width of the border.
    """

    size: int = 32
    pad: int = 4

    def __post_init__(self) -> None:
        """Refuse an empty crop."""
        if self.size < 1 or self.pad < 0:
            raise InputError(
                f"crop of {self.size} with border {self.pad}: give size 1, pad 0 or more"
            )

    @property
    def smallest(self) -> int:
        """Smallest side of an image."""
        return self.size

    def sample(self, shape: tuple[int, int], generators: Sequence[torch.Generator]) -> Windows:
        """Draw the corner and the mirroring."""
        draws = torch.stack([torch.rand(3, generator=g, dtype=torch.float64) for g in generators])
        room = torch.tensor(shape, dtype=torch.float64) + (2 * self.pad - self.size + 1)
        start = torch.floor(draws[:, :2] * room) - self.pad
        return self._windows(shape, start, draws[:, 2] < 0.5)

    def plain(self, shape: tuple[int, int], n: int) -> Windows:
        """Return the centre."""
        room = torch.tensor(shape, dtype=torch.float64) - self.size
        start = torch.round(room / 2).expand(n, 2)
        return self._windows(shape, start, torch.zeros(n, dtype=torch.bool))

    def _windows(self, shape: tuple[int, int], start: Tensor, flip: Tensor) -> Windows:
        high = torch.tensor(shape, dtype=torch.float64).expand_as(start)
        one = torch.ones_like(start)
        return Windows(start, one, 0 * one, high, flip, (self.size, self.size))


@dataclass(frozen=True)
class RandomResizedCropFlip:
    """A box of random area and shape, resized, mirrored half of the time.

    torchvision's rule: ten attempts at an area uniform in `area` and a width-to-height ratio
    log-uniform in `ratio`, the first that fits; else the largest central box of a ratio in range.

    Attributes:
        size: Side of the square output.
        area: Least and greatest share of the image.
        ratio: Least and greatest width over height.
        resize: Shorter side before the central cut of `plain`; by default 8/7 of `size`.
        antialias: See `Windows`.
    """

    size: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resize: int | None = None
    antialias: bool = True

    def __post_init__(self) -> None:
        """Refuse ranges that hold no box."""
        if self.size < 1 or not 0 < self.area[0] <= self.area[1] <= 1:
            raise InputError(
                f"area {self.area} is no range of shares: give two in (0, 1], in order"
            )
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise InputError(f"ratio {self.ratio} is no range: give two positive numbers, in order")

    @property
    def smallest(self) -> int:
        """Smallest side of an image."""
        return self.size

    def sample(self, shape: tuple[int, int], generators: Sequence[torch.Generator]) -> Windows:
        """Draw the boxes and the mirroring."""
        draws = torch.stack([torch.rand(23, generator=g, dtype=torch.float64) for g in generators])
        height, width = shape
        area = height * width * (self.area[0] + (self.area[1] - self.area[0]) * draws[:, :10])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + (high - low) * draws[:, 10:20])
        boxes = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], dim=2)
        extent = torch.tensor(shape, dtype=torch.float64)
        fits = ((boxes > 0) & (boxes <= extent)).all(dim=2)  # (N, 10)
        first = fits.int().argmax(dim=1)
        box = boxes[torch.arange(len(draws)), first]
        start = torch.floor(draws[:, 20:22] * (extent - box + 1))

        # Python's round and floor division, as torchvision does it.
        fallback = (
            min(height, round(width / self.ratio[0])),
            min(width, round(height * self.ratio[1])),
        )
        centred = ((height - fallback[0]) // 2, (width - fallback[1]) // 2)
        none = ~fits.any(dim=1)
        box[none] = torch.tensor(fallback, dtype=torch.float64)
        start[none] = torch.tensor(centred, dtype=torch.float64)
        size, flip = (self.size, self.size), draws[:, 22] < 0.5
        return Windows(start, box / self.size, start, start + box, flip, size, self.antialias)

    def plain(self, shape: tuple[int, int], n: int) -> Windows:
        """Return the centre, as `CenterCrop` does."""
        resize = round(self.size * 256 / 224) if self.resize is None else self.resize
        return CenterCrop(self.size, resize, self.antialias).plain(shape, n)
