"""Pictures as `search describe` and `search match` look at them: upright, grey, not too large."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from remanence.errors import InputError
from remanence.kit.images import Images, open_images
from remanence.kit.sources import EXTENSIONS, UNLABELLED, parse
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.frames import frames_from_keypoints
from remanence.search.kernel_descriptor.grey import grey_image
from remanence.search.kernel_descriptor.keypoints import Keypoints, detect_keypoints
from remanence.search.kernel_descriptor.patches import extract_patches

ARCHIVES = (".parquet", ".tar")


@dataclass(frozen=True)
class Paths:
    """Image files, as `Images` reads them."""

    paths: tuple[Path, ...]

    def read(self, index: int) -> bytes:
        """Return the bytes of file `index`."""
        return self.paths[index].read_bytes()


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that is looked at in grey, reduced where it is large.

    Attributes:
        grey: (h, w), float32, 0 to 1.
        size: Height H and width W of the picture itself, upright.
    """

    grey: Tensor
    size: tuple[int, int]

    @property
    def factor(self) -> Tensor:
        """Pixels of the picture a pixel that is looked at, along x and y (2,), float64."""
        (height, width), (h, w) = self.size, self.grey.shape
        return torch.tensor([width / w, height / h], dtype=torch.float64)

    @property
    def enlarge(self) -> Tensor:
        """Homography from pixels that are looked at to those of the picture (3, 3), float64."""
        factor = self.factor
        found = torch.diag(torch.cat([factor, factor.new_ones(1)]))
        found[:2, 2] = (factor - 1) / 2  # pixel centres are at whole numbers
        return found

    def mirrored(self) -> Picture:
        """Exchange left and right."""
        return Picture(self.grey.flip(1), self.size)


@dataclass(frozen=True, eq=False)
class Local:
    """What is described of a picture, at N places.

    Attributes:
        keypoints: In pixels that are looked at.
        patches: (N, s, s), float32.
        vectors: (N, D), float32.
        valid: The patch is not flat (N,), bool.
    """

    keypoints: Keypoints
    patches: Tensor
    vectors: Tensor
    valid: Tensor


def open_pictures(source: str) -> Images:
    """Open an image file, a folder of images at any depth, or an image source.

    Args:
        source: A path, or as in `remanence.kit.sources`.

    Returns:
        The images, none of them read yet; those of a folder are named by their path in it.

    Raises:
        InputError: There is no such thing, or it holds no images.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in ARCHIVES:
        return _images(source, (path,), (path.name,))
    if path.is_dir():
        found = []
        for place, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        paths = tuple(file for file in found if file.suffix.lower() in EXTENSIONS)
        if paths:
            return _images(source, paths, tuple(str(file.relative_to(path)) for file in paths))
        if not any(file.suffix in ARCHIVES for file in found):
            raise InputError(f"{source}: holds no images; give a folder of .jpg, .png or the like")
    elif not path.exists() and path.suffix.lower() in EXTENSIONS and parse(source)[1] is None:
        raise InputError(f"{source}: no such file")
    return open_images(source, labels=False, cache_bytes=0)


def open_picture(path: Path, longest: int) -> tuple[Image.Image, Picture]:
    """Read one photograph.

    Args:
        path: Its file.
        longest: As for `look`.

    Returns:
        The photograph, upright, in RGB, and what is looked at.

    Raises:
        InputError: It is missing or broken.
    """
    if not path.expanduser().is_file():
        raise InputError(f"{path}: no such file; give a photograph")
    images = _images(str(path), (path.expanduser(),), (str(path),))
    try:
        shown = upright_image(images, 0)
    except InputError as error:  # a pair of photographs has none to skip
        raise InputError(
            str(error).replace(
                "repair or remove it, or pass --skip-broken", "give another photograph"
            )
        ) from error
    return shown, look(shown, longest)


def upright_image(images: Images, index: int) -> Image.Image:
    """Return image `index` in RGB, turned as its EXIF data ask.

    Raises:
        InputError: It cannot be decoded.
    """
    return ImageOps.exif_transpose(images.image(index))


def look(image: Image.Image, longest: int) -> Picture:
    """Make an image grey, and reduce it where a side is longer than `longest` pixels."""
    width, height = image.size
    share = longest / max(width, height)
    if share < 1:
        size = max(1, round(width * share)), max(1, round(height * share))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return Picture(grey_image(pixels), (height, width))


def describe_picture(
    picture: Picture,
    descriptor: KernelDescriptor,
    *,
    most: int,
    size: int,
    magnification: float,
    upright: bool,
    keypoints: Keypoints | None = None,
    device: torch.device | None = None,
) -> Local:
    """Key points, frames, patches, descriptors.

    Args:
        picture: What is looked at.
        descriptor: Of patches.
        most: Key points at most.
        size: Side of the patches, pixels.
        magnification: Half the side of a frame over a key point's sigma.
        upright: Leave orientations out.
        keypoints: In pixels that are looked at, where they are given.
        device: Where patches are cut and described.

    Returns:
        The descriptors on the CPU, N = 0 for a picture without key points.
    """
    if keypoints is None:
        keypoints = detect_keypoints(picture.grey, most, upright=upright)
    frames = frames_from_keypoints(
        keypoints.xy, keypoints.scale, None if upright else keypoints.angle, magnification
    )
    patches = extract_patches(picture.grey.to(device), frames, size).patches
    vectors, valid = descriptor(patches)
    return Local(keypoints, patches.cpu(), vectors.cpu(), valid.cpu())


def in_picture(picture: Picture, keypoints: Keypoints) -> tuple[Tensor, Tensor]:
    """Return places (N, 2) and sigmas (N,) of key points in pixels of the picture, float32."""
    factor = picture.factor
    xy = (keypoints.xy.double() + 0.5) * factor - 0.5
    return xy.float(), (keypoints.scale.double() * factor.prod().sqrt()).float()


def _images(source: str, paths: tuple[Path, ...], names: tuple[str, ...]) -> Images:
    count = len(paths)
    labels, order = np.zeros(count, dtype=np.int64), np.arange(count, dtype=np.int64)
    return Images(source, UNLABELLED, labels, names, Paths(paths), order)
