"""Marking images: the smallest change that moves their features along a carrier.

"Radioactive data: tracing through training" (arXiv 2002.00937, Section 3.3). For an image x of
class k, a carrier u_k, features phi and a random crop A drawn anew at every iteration,

    L(x~) = -(phi(A(x~)) - r) . u_k  +  lambda_2 |phi(A(x~)) - r|  +  lambda_1 |x~ - x|^2

is minimised subject to |x~ - x| <= R per pixel, where r is a feature of the unmarked image. Image
differences in L are those of normalised images; R and everything else here is in grey levels.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from remanence.audit.evidence import Check
from remanence.audit.radioactive.augment import (
    Augmentation,
    PadCropFlip,
    RandomResizedCropFlip,
)
from remanence.audit.radioactive.perturbation import Perturbation
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from remanence.audit.radioactive.features import FeatureExtractor

Preset = Literal["paper", "fast", "small"]
Precision = Literal["float32", "float64", "bfloat16"]
_Images = TypeVar("_Images", Tensor, list[Tensor])

# Below this median cosine between change and carrier, training on the marks hardly shows.
LEAST_COSINE = 0.2


class MarkingInfeasible(UserWarning):
    """The images move the features, but hardly towards their carriers."""


@dataclass(frozen=True)
class MarkConfig:
    """How images are marked; the defaults are the paper's.

    Attributes:
        iterations: Optimiser steps per image.
        radius: Largest change of a pixel, in grey levels.
        target_psnr: Least PSNR of every marked image in dB, which bounds its squared change
            whatever its size; None leaves that to `lambda_image`.
        lambda_image: Weight of the squared image change, summed over the image.
        lambda_feature: Weight of the length of the feature change; with 0 the unmarked image
            need not be seen again at every iteration.
        scale_lambda: Multiply `lambda_image` so that it weighs the same for every image size.
        optimizer: "sgd" takes steps in normalised units; "adam" in grey levels, and its steps
            shrink to 0 along a half cosine.
        lr: Step size, in those units.
        augment: What the network sees the images through.
        reference: "same_aug" compares with the unmarked image in the same random crop, "center"
            with its central crop, as the authors' code does.
        straight_through: Round the image in the forward pass of the last third.
        precision: What the network computes in; "bfloat16" by autocast, with channels last.
    """

    iterations: int = 90
    radius: float = 10.0
    target_psnr: float | None = None
    lambda_image: float = 5e-4
    lambda_feature: float = 1e-2
    scale_lambda: bool = False
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 1.0
    augment: Augmentation = field(default_factory=RandomResizedCropFlip)
    reference: Literal["same_aug", "center"] = "same_aug"
    straight_through: bool = True
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.iterations < 1:
            raise InputError(f"{self.iterations} iterations mark nothing: give at least 1")
        if not 1 <= self.radius <= 255:
            raise InputError(f"radius {self.radius} is no grey level: give 1 to 255")
        if self.target_psnr is not None and not 0 < self.target_psnr < math.inf:
            raise InputError(f"target PSNR {self.target_psnr} dB: give a positive number")
        if not (0 <= self.lambda_image < math.inf and 0 <= self.lambda_feature < math.inf):
            raise InputError("a negative or infinite lambda has no minimum: give 0 or more")
        if not 0 < self.lr < math.inf:
            raise InputError(f"step size {self.lr} leads nowhere: give a positive number")
        for name, value, known in (
            ("optimizer", self.optimizer, ("sgd", "adam")),
            ("reference", self.reference, ("same_aug", "center")),
            ("precision", self.precision, get_args(Precision)),
        ):
            if value not in known:
                raise InputError(f"{name} {value!r} is unknown: give one of {known}")

    @classmethod
    def preset(cls, name: Preset, **changes: object) -> Self:
        """Return a set of values that go together.

        Args:
            name: "paper" for photographs as published; "fast" for photographs at 42 dB in 30 Adam
                steps; "small" for 32-pixel images at 34 dB.
            **changes: Fields to set otherwise.

        Raises:
            InputError: The name is unknown, or a value is out of range.
        """
        if name not in get_args(Preset):
            raise InputError(f"preset {name!r} is unknown: give one of {get_args(Preset)}")
        config = cls()
        if name == "fast":
            config = cls(
                iterations=30, target_psnr=42.0, lambda_feature=0.0, optimizer="adam", lr=2.0
            )
        if name == "small":
            config = cls(
                iterations=25,
                radius=8.0,
                target_psnr=34.0,
                lambda_feature=0.0,
                optimizer="adam",
                lr=4.0,
                augment=PadCropFlip(32, 2),
            )
        return replace(config, **changes)  # type: ignore[arg-type]  # checked by name at run time


@dataclass(frozen=True)
class Marked(Generic[_Images]):
    """Marked images and how far marking got; arrays are (N,), in the order of the images.

    Features are compared on marked images as exported, seen through the same windows as the
    unmarked ones: `dot`, `feature_move` and the losses are means over 4 random crops that the
    optimiser never saw.

    Attributes:
        images: uint8, in the container and the sizes that were given.
        psnr: float64 in dB against the images given; infinity where nothing changed.
        linf: int64, largest change of a pixel in grey levels.
        dot: float64, (phi(A(x~)) - phi(A(x))) . u.
        plain_dot: float64, the same on the view that a model is tested on.
        feature_move: float64, |phi(A(x~)) - phi(A(x))|.
        loss_before: float64, L of the unmarked image.
        loss_after: float64, L of the marked image.
        checks: Whether the images could be moved towards their carriers.
    """

    images: _Images
    psnr: NDArray[np.float64]
    linf: NDArray[np.int64]
    dot: NDArray[np.float64]
    plain_dot: NDArray[np.float64]
    feature_move: NDArray[np.float64]
    loss_before: NDArray[np.float64]
    loss_after: NDArray[np.float64]
    checks: tuple[Check, ...]


def mark(
    images: _Images,
    labels: Tensor,
    extractor: FeatureExtractor,
    carriers: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    config: MarkConfig | None = None,
    ids: Sequence[int | str] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Marked[_Images]:
    """Mark images with the carriers of their classes (arXiv 2002.00937, Section 3.3).

    An image's result depends on the image, its label, its id and the seed, not on what it is
    marked beside: no step mixes images, and sizes are never padded to one another. Kernels may
    still sum in another order for another number of images, and the last bit then decides a
    rounding. On the CPU, convolutions were found to do so only for a single image, which is
    therefore doubled; networks with linear layers before their features, such as VGG, may differ
    by one grey level in 1 value of 1,000. "float64" leaves no difference that survives rounding.

    Args:
        images: uint8, (N, C, H, W) or N tensors (C, H, W) of any sizes.
        labels: (N,) integers in 0..K-1.
        extractor: The marking network's features; left as it is, a copy does the work.
        carriers: (K, d) rows of length 1.
        mean: C channel means that the network's images are normalised with, for values in 0..1.
        std: C channel standard deviations, likewise.
        config: How to mark; the paper's values where left out.
        ids: N names that an image's random crops are drawn from; 0..N-1 where left out.
        batch_size: Images that go through the network at once.
        seed: Seed of the crops.
        device: Where to work; where the extractor is, where left out.
        progress: Called after each batch with the number of images done and N.

    Returns:
        The marked images. Where their features hardly move towards the carriers, a check that
        does not hold, and the warning `MarkingInfeasible`.

    Raises:
        InputError: Images are not uint8 or smaller than the crop, a label has no carrier,
            carriers and features differ in length, or features are not finite.
    """
    config = MarkConfig() if config is None else config
    names: list[int | str] = list(range(len(images)) if ids is None else ids)
    _check(images, labels, extractor, carriers, mean, std, config, names, batch_size)
    marker = Perturbation(extractor, mean, std, config, seed, device)

    def view_size(i: int) -> tuple[int, int]:
        return config.augment.plain((images[i].shape[1], images[i].shape[2]), 1).size

    # Like sizes side by side, so that a batch is a few stacks; one batch never mixes view sizes.
    order = sorted(range(len(images)), key=lambda i: (view_size(i), images[i].shape[1:]))
    marked: dict[int, Tensor] = {}
    figures: dict[int, Tensor] = {}
    for _, same_view in groupby(order, key=view_size):
        rows = list(same_view)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            stacks = [
                torch.stack([images[i] for i in alike])
                for _, alike in groupby(batch, key=lambda i: images[i].shape)
            ]
            new, scores = marker.mark(
                stacks, carriers[labels[batch].to(carriers.device)], [names[i] for i in batch]
            )
            marked.update(zip(batch, new, strict=True))
            figures.update(zip(batch, scores, strict=True))
            if progress is not None:
                progress(len(marked), len(images))

    results = [marked[i].to(images[i].device) for i in range(len(images))]
    container: Any = torch.stack(results) if isinstance(images, Tensor) else results
    columns = torch.stack([figures[i] for i in range(len(images))]).numpy().T
    psnr, linf, dot, plain_dot, move, before, after = columns
    return Marked(
        container,
        psnr,
        linf.astype(np.int64),
        dot,
        plain_dot,
        move,
        before,
        after,
        (_feasible(dot, move),),
    )


def _feasible(dot: NDArray[np.float64], move: NDArray[np.float64]) -> Check:
    """Look at the cosine between the features' moves and the carriers; warn where it is low."""
    cosine = float(np.median(np.divide(dot, move, out=np.zeros_like(dot), where=move > 0)))
    holds = cosine >= LEAST_COSINE
    finding = f"the median cosine between feature change and carrier is {cosine:.2f}"
    if not holds:
        finding += f", below {LEAST_COSINE}"
        warnings.warn(
            f"{finding}: training on these marks will hardly show; mark larger images, allow more "
            "change, or use features with fewer dimensions",
            MarkingInfeasible,
            stacklevel=3,
        )
    return Check(
        "Images can be changed so that their features move along a carrier", holds, finding
    )


def _check(
    images: Tensor | list[Tensor],
    labels: Tensor,
    extractor: FeatureExtractor,
    carriers: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    config: MarkConfig,
    names: list[int | str],
    batch_size: int,
) -> None:
    """Refuse what cannot be marked."""
    n = len(images)
    if n == 0:
        raise InputError("there are no images to mark: give at least 1")
    if not len(labels) == len(names) == n:
        raise InputError(
            f"{n} images, {len(labels)} labels and {len(names)} ids: give one of each per image"
        )
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} holds no image: give at least 1")
    if carriers.ndim != 2 or carriers.shape[1] != extractor.dim:
        raise InputError(
            f"carriers {tuple(carriers.shape)} do not fit features of {extractor.dim} dimensions: "
            f"draw carriers (K, {extractor.dim})"
        )
    if not torch.allclose(vector_norm(carriers.double(), dim=1).cpu(), torch.ones(1).double()):
        raise InputError("carriers are no unit vectors: divide each row by its length")
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= len(carriers):
        raise InputError(
            f"labels span {labels.min().item()} to {labels.max().item()} but there are "
            f"{len(carriers)} carriers: give whole numbers from 0 to {len(carriers) - 1}"
        )
    if len(mean) != len(std) or not all(0 < s < math.inf for s in std):
        raise InputError(f"mean {mean} and std {std}: give one of each per channel, std above 0")
    least = config.augment.smallest
    for name, image in zip(names, images, strict=True):
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != len(mean):
            raise InputError(
                f"image {name!r} is {image.dtype} {tuple(image.shape)}: give uint8 "
                f"({len(mean)}, H, W)"
            )
        if min(image.shape[1:]) < least:
            raise InputError(
                f"image {name!r} of {image.shape[1]} x {image.shape[2]} is smaller than the crop "
                f"of {least}: set a smaller crop in config.augment, or leave the image out"
            )
