"""Kernel local descriptors: patches compared without any training, and better once whitened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from sklearn.datasets import load_sample_image
from torch.nn.functional import adaptive_avg_pool2d, normalize

from remanence.claims.claim import Claim
from remanence.kit.report import Report
from remanence.kit.statistics import mean_interval
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.evaluation import fpr95, matching_map
from remanence.search.kernel_descriptor.moments import Moments
from remanence.search.kernel_descriptor.views import patch_pairs, synthetic_views
from remanence.search.kernel_descriptor.whitening import Whitening

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from remanence.kit.statistics import Interval

    Describe = Callable[[Tensor], Tensor]

PHOTOGRAPHS = ("china.jpg", "flower.jpg")
SEEDS = (0, 1, 2)
WHITENED = "kernel descriptor, whitened on the other photograph"
RAW = "kernel descriptor, raw"
POLAR = "its polar part"
CARTESIAN = "its Cartesian part"
ROOTSIFT = "RootSIFT"
ROOTSIFT_WHITENED = "RootSIFT, whitened likewise"
SIDE = 64  # pixels of a patch
PIXELS = "16 x 16 pixels (control)"


@dataclass(frozen=True)
class _Measured:
    """Figures of every seed and photograph, (seeds, photographs).

    Attributes:
        precision: Mean average precision of matching, percent, by descriptor.
        errors: False positives at 95 % recall, percent, by descriptor.
        places: Places matched in the photographs.
    """

    precision: dict[str, NDArray[np.float64]]
    errors: dict[str, NDArray[np.float64]]
    places: list[int]


def kernel_descriptor_claim() -> Claim:
    """Measure the claim of arXiv 1811.11147 on two photographs and warped copies of them."""
    measured = _measure()
    mean = {name: float(values.mean()) for name, values in measured.precision.items()}

    def gain(name: str, over: str) -> tuple[float, Interval]:
        gains = (measured.precision[name] - measured.precision[over]).mean(1)
        return float(gains.mean()), mean_interval(gains)

    over_sift, sift = gain(WHITENED, ROOTSIFT)
    over_fair, fair = gain(WHITENED, ROOTSIFT_WHITENED)
    over_raw, raw = gain(WHITENED, RAW)
    untrained, plain = gain(RAW, ROOTSIFT)
    return Claim(
        system="kernel-descriptor",
        paper="Understanding and Improving Kernel Local Descriptors (1811.11147)",
        sentence="A sum of kernels over all pairs of pixels, whitened on unlabelled patches, "
        "describes a patch better than SIFT.",
        measured=(
            f"Mean average precision of matching: {mean[WHITENED]:.1f} whitened, "
            f"{_said(over_sift, sift)} over RootSIFT, {_said(over_fair, fair)} over RootSIFT "
            f"whitened likewise, {_said(over_raw, raw)} over raw; without any training "
            f"{_said(untrained, plain)} over RootSIFT (95 % intervals over {len(SEEDS)} seeds)."
        ),
        control=(
            f"RootSIFT {mean[ROOTSIFT]:.1f}, whitened {mean[ROOTSIFT_WHITENED]:.1f}; plain pixels "
            f"{mean[PIXELS]:.1f}; polar part {mean[POLAR]:.1f}, Cartesian {mean[CARTESIAN]:.1f}."
        ),
        holds=sift.low > 2 and fair.low > 0 and raw.low > 0 and mean[POLAR] > mean[CARTESIAN],
        data="the two photographs that come with scikit-learn and five warped, blurred and noisy "
        "copies of each, made by this project; whitenings are learned on the other photograph",
        details=lambda report: _details(report, measured),
    )


def _said(difference: float, interval: Interval) -> str:
    return f"{difference:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"


def _measure() -> _Measured:
    precision: dict[str, list[list[float]]] = {}
    errors: dict[str, list[list[float]]] = {}
    for seed in SEEDS:
        groups = [_places(name, seed) for name in PHOTOGRAPHS]
        rows: dict[str, list[tuple[float, float]]] = {}
        for (patches, valid), (others, _) in zip(groups, reversed(groups), strict=True):
            unseen = others.flatten(0, 1)
            describe: dict[str, Describe] = {
                WHITENED: _Whitened(_concat, _whitening(_concat(unseen))),
                RAW: _concat,
                POLAR: lambda p: KernelDescriptor("polar")(p).vectors,
                CARTESIAN: lambda p: KernelDescriptor("cartesian")(p).vectors,
                ROOTSIFT: _rootsift,
                ROOTSIFT_WHITENED: _Whitened(_rootsift, _whitening(_rootsift(unseen))),
                PIXELS: _pixels,
            }
            for name, function in describe.items():
                rows.setdefault(name, []).append(_scores(function, patches, valid))
        for name, scores in rows.items():
            precision.setdefault(name, []).append([score[0] for score in scores])
            errors.setdefault(name, []).append([score[1] for score in scores])
    return _Measured(
        {name: np.array(values) for name, values in precision.items()},
        {name: np.array(values) for name, values in errors.items()},
        [patches.shape[1] for patches, _ in groups],
    )


def _places(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Cut the same places out of a photograph and its warped copies."""
    image = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)
    groups = patch_pairs(image, synthetic_views(image, seed=seed), size=SIDE, seed=seed)
    return groups.patches, groups.valid


@dataclass(frozen=True)
class _Whitened:
    describe: Describe
    whitening: Whitening

    def __call__(self, patches: Tensor) -> Tensor:
        return self.whitening(self.describe(patches))


def _whitening(vectors: Tensor) -> Whitening:
    moments = Moments(vectors.shape[1])
    moments.add(vectors)
    return Whitening.fit(moments, "pcaws", dim=min(128, vectors.shape[1]))


def _concat(patches: Tensor) -> Tensor:
    return KernelDescriptor()(patches).vectors


def _scores(describe: Describe, patches: Tensor, valid: Tensor) -> tuple[float, float]:
    """Return matching precision and false positives at 95 % recall, percent, over all copies."""
    reference = describe(patches[0])
    precision = []
    similarity, label = [], []
    for copy, inside in zip(patches[1:], valid[1:], strict=True):
        first, second = reference[inside], describe(copy[inside])
        precision.append(matching_map(first, second))
        similarity += [(first * second).sum(1), (first * second.roll(1, 0)).sum(1)]
        label += [torch.ones(len(first)), torch.zeros(len(first))]
    false = fpr95(torch.cat(similarity), torch.cat(label).bool())
    return 100 * float(np.mean(precision)), 100 * false


def _rootsift(patches: Tensor) -> Tensor:
    """Describe patches by OpenCV's SIFT, its window laid over the whole patch."""
    sift: Any = cv2.SIFT_create()  # type: ignore[attr-defined]  # its stubs lack it
    side = patches.shape[-1]
    # Its window is 12 sigmas wide, and OpenCV's size is two.
    place = [cv2.KeyPoint((side - 1) / 2, (side - 1) / 2, side / 6, 0, 1, 0)]
    levels = (patches * 255).round().to(torch.uint8).numpy()
    vectors = np.concatenate([sift.compute(patch, place)[1] for patch in levels])
    return normalize(torch.from_numpy(vectors).clamp(min=0), p=1, dim=1).sqrt()


def _pixels(patches: Tensor) -> Tensor:
    pixels = adaptive_avg_pool2d(patches.unsqueeze(1), 16).flatten(1)
    return normalize(pixels - pixels.mean(1, keepdim=True), dim=1)


def _details(report: Report, measured: _Measured) -> None:
    rows: list[list[Any]] = []
    for name, values in measured.precision.items():
        low, high = mean_interval(values.mean(1))
        per_photograph = [float(value) for value in values.mean(0)]
        rows.append([name, *per_photograph, low, high, float(measured.errors[name].mean())])
    places = " and ".join(map(str, measured.places))
    report.table(
        ["descriptor", *PHOTOGRAPHS, "mean, low", "high", "FPR95, %"],
        rows,
        f"Mean average precision of matching, percent, over five copies and {len(SEEDS)} seeds, "
        f"{places} places; 95 % interval of the mean of both photographs over seeds. FPR95: false "
        "positives at 95 % recall, pairs drawn within a photograph.",
    )
