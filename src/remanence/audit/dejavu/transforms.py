"""Transforms of a batch of images, each image with parameters of its own.

A transform takes images (B, C, H, W), floats, and a generator, and returns as many images of the
same size. Everything is one tensor operation a batch, on the images' device.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

Transform = Callable[[Tensor, torch.Generator], Tensor]


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001  # a Transform
    """Mirror every image left to right."""
    return images.flip(-1)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image with probability one half."""
    heads = _uniform(images, generator) < 0.5
    return torch.where(heads[:, None, None, None], images.flip(-1), images)


def random_shift(images: Tensor, generator: torch.Generator, reach: int | None = None) -> Tensor:
    """Move each image by whole pixels, uniform in [-reach, reach] both ways, zeros moving in.

    Args:
        images: (B, C, H, W).
        generator: source of the shifts.
        reach: pixels; by default an eighth of the height, and at least 1.
    """
    _, _, h, w = images.shape
    reach = max(1, h // 8) if reach is None else reach
    padded = nn.functional.pad(images, (reach, reach, reach, reach))
    corners = [(_uniform(images, generator) * (2 * reach + 1)).long() for _ in "yx"]
    rows = corners[0][:, None] + torch.arange(h, device=images.device)  # (B, H)
    columns = corners[1][:, None] + torch.arange(w, device=images.device)  # (B, W)
    one = torch.arange(len(images), device=images.device)[:, None, None]
    # Indices on both sides of a slice put the sliced axis last.
    return padded[one, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_resized_crop(
    images: Tensor, generator: torch.Generator, smallest: float = 0.5, ratio: float = 4 / 3
) -> Tensor:
    """Cut a random box from each image and resize it, bilinearly, to the whole size.

    Args:
        images: (B, C, H, W).
        generator: source of the boxes.
        smallest: least share of the area, in (0, 1]; the share is uniform from there to 1.
        ratio: greatest ratio of the sides; its logarithm is uniform.
    """
    area = smallest + (1 - smallest) * _uniform(images, generator)
    stretch = torch.exp((_uniform(images, generator) - 0.5) * math.log(ratio))
    # Sides as shares of the image, in (0, 1]; what would stick out is cut.
    width = (area.sqrt() * stretch).clamp(max=1)
    height = (area.sqrt() / stretch).clamp(max=1)
    x = (2 * _uniform(images, generator) - 1) * (1 - width)
    y = (2 * _uniform(images, generator) - 1) * (1 - height)
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width, x
    theta[:, 1, 1], theta[:, 1, 2] = height, y
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def compose(*transforms: Transform) -> Transform:
    """Apply transforms one after the other."""

    def apply(images: Tensor, generator: torch.Generator) -> Tensor:
        for transform in transforms:
            images = transform(images, generator)
        return images

    return apply


TRAINING: Mapping[str, Transform] = MappingProxyType(
    {
        "flip": random_flip,
        "flip+shift": compose(random_flip, random_shift),
        "flip+crop": compose(random_flip, random_resized_crop),
    }
)
"""The paper's kinds of augmentation, from weak to strong."""

EVALUATION: Mapping[str, Transform] = MappingProxyType(
    {"flip": mirror, "shift": random_shift, "crop": random_resized_crop}
)
"""Transforms of the memorised images under which a memoriser is evaluated, each by itself."""


def _uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    draws = torch.rand(len(images), generator=generator, device=generator.device)
    return draws.to(images.device)
