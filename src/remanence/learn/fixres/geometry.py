"""Apparent object size in training and at test (arXiv 1906.06423, Section 3).

RandomResizedCrop cuts h x w pixels out of an H x W photo and resizes them to K_train: it scales
the photo by K_train / sqrt(h w). The test transform scales it by K_img / min(H, W). Their ratio

    rho = (K_img / K_train) * sqrt(h w) / min(H, W)

is the size at which an object appears at test, relative to training. With
sigma = sqrt(h w / (H W)) and a square photo it is the paper's sigma * K_img / K_train.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.learn.fixres.transforms import CropMode, resize_size

Stat = Literal["arithmetic", "geometric", "harmonic"]

RRC_SCALE = (0.08, 1.0)
RRC_ASPECT = (3 / 4, 4 / 3)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class SigmaMoments:
    """Closed forms of sigma when sigma^2 is uniform on [a, b], before any crop is rejected.

    Attributes:
        arithmetic: E[sigma] = (2/3) (b^1.5 - a^1.5) / (b - a).
        geometric: exp E[ln sigma].
        harmonic: 1 / E[1/sigma].
        inverse: E[1/sigma] = 2 (sqrt(b) - sqrt(a)) / (b - a).
        minimum: sqrt(a).
    """

    arithmetic: float
    geometric: float
    harmonic: float
    inverse: float
    minimum: float


def sigma_moments(scale: tuple[float, float] = RRC_SCALE) -> SigmaMoments:
    """Moments of sigma under RandomResizedCrop(scale=(a, b)) (arXiv 1906.06423, Section 3).

    Args:
        scale: smallest and largest share of the photo's area, 0 <= a <= b, b > 0.

    Returns:
        The closed forms, without torchvision's rejection of crops that do not fit.

    Raises:
        InputError: `scale` is out of range.
    """
    a, b = _range(scale, "scale")
    root_a, root_b = math.sqrt(a), math.sqrt(b)
    # Each quotient divided through by sqrt(b) - sqrt(a), so that a = b is no special case.
    inverse = 2 / (root_a + root_b)
    # E[ln sigma^2] = ln b - 1 + a ln(b/a) / (b - a), whose last term runs from 0 to 1.
    tail = math.log1p((b - a) / a) * a / (b - a) if 0 < a < b else float(a == b)
    return SigmaMoments(
        arithmetic=2 / 3 * (a + root_a * root_b + b) / (root_a + root_b),
        geometric=math.exp((math.log(b) - 1 + tail) / 2),
        harmonic=1 / inverse,
        inverse=inverse,
        minimum=root_a,
    )


def sample_crop_boxes(
    sizes: Tensor,
    *,
    scale: tuple[float, float] = RRC_SCALE,
    aspect: tuple[float, float] = RRC_ASPECT,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One RandomResizedCrop box for each photo, in torchvision's distribution.

    Up to ten tries of a uniform area and a log-uniform aspect ratio, then the largest central crop
    within the aspect range.

    Args:
        sizes: integers (N, 2), height and width in pixels.
        scale: smallest and largest share of the photo's area.
        aspect: smallest and largest width / height of the box.
        generator: on the device of `sizes`; torch's global one unless given.

    Returns:
        int64 (N, 4): top, left, height, width.

    Raises:
        InputError: `sizes` or a range is malformed.
    """
    H, W = _checked_sizes(sizes).long().unbind(1)
    a, b = _range(scale, "scale")
    lo, hi = _range(aspect, "aspect")
    if lo == 0:
        raise InputError("aspect starts at 0: give a positive width / height")

    def uniform(n: int, low: float, high: float) -> Tensor:
        draw = torch.rand(n, generator=generator, dtype=torch.float64, device=sizes.device)
        return low + (high - low) * draw

    # What is left after ten misses.
    shape = W / H
    h = torch.where(shape < lo, (W / lo).round().long(), H)
    w = torch.where(shape > hi, (H * hi).round().long(), W)
    top, left = (H - h) // 2, (W - w) // 2

    rest = torch.arange(len(H), device=sizes.device)
    for _ in range(10):
        n = len(rest)
        area = H[rest] * W[rest] * uniform(n, a, b)
        ratio = uniform(n, math.log(lo), math.log(hi)).exp()
        try_w = (area * ratio).sqrt().round().long()
        try_h = (area / ratio).sqrt().round().long()
        fits = (try_w > 0) & (try_w <= W[rest]) & (try_h > 0) & (try_h <= H[rest])
        done = rest[fits]
        h[done], w[done] = try_h[fits], try_w[fits]
        top[done] = ((H[done] - h[done] + 1) * uniform(len(done), 0, 1)).long()
        left[done] = ((W[done] - w[done] + 1) * uniform(len(done), 0, 1)).long()
        rest = rest[~fits]
    return torch.stack([top, left, h, w], dim=1)


@dataclass(frozen=True)
class RatioReport:
    """Test over training size of the same object; below 1, objects look smaller at test.

    Attributes:
        arithmetic: E[rho].
        geometric: exp E[ln rho]; scale is multiplicative, so this is the one to equalise.
        harmonic: 1 / E[1/rho].
        quantiles: share -> rho, for the shares in `QUANTILES`.
    """

    arithmetic: float
    geometric: float
    harmonic: float
    quantiles: Mapping[float, float]

    @classmethod
    def of(cls, ratios: Tensor) -> "RatioReport":
        """Summarise positive ratios of any shape, such as test over `train_scale_factors`."""
        rho = ratios.double().flatten()
        if not (len(rho) and bool(((rho > 0) & rho.isfinite()).all())):
            raise InputError("ratios hold nothing or no positive numbers: give scale ratios")
        points = np.quantile(rho.cpu().numpy(), QUANTILES)
        return cls(
            arithmetic=rho.mean().item(),
            geometric=rho.log().mean().exp().item(),
            harmonic=1 / (1 / rho).mean().item(),
            quantiles=dict(zip(QUANTILES, points.tolist(), strict=True)),
        )


def eval_scale_factors(
    sizes: Tensor, test_size: int, *, crop_pct: float = 0.875, crop_mode: CropMode = "center"
) -> Tensor:
    """How much the test transform magnifies each photo, with the integer K_img that it uses.

    Args:
        sizes: integers (N, 2), height and width in pixels.
        test_size: crop K_test in pixels.
        crop_pct: K_test / K_img, in (0, 1].
        crop_mode: as for `EvalTransform`. The side that becomes K_img is the shorter (`center`),
            the longer (`border`) or the height (`fixres_height`); `squash` counts by area,
            K_img / sqrt(H W). For square photos all four agree.

    Returns:
        float64 (N,), pixels out per pixel in.

    Raises:
        InputError: `sizes`, `test_size`, `crop_pct` or `crop_mode` is malformed.
    """
    return resize_size(test_size, crop_pct) / _side(sizes, crop_mode)


def apparent_size_ratio(
    sizes: Tensor,
    train_size: int,
    test_size: int,
    *,
    scale: tuple[float, float] = RRC_SCALE,
    aspect: tuple[float, float] = RRC_ASPECT,
    crop_pct: float = 0.875,
    crop_mode: CropMode = "center",
    draws: int = 200_000,
    generator: torch.Generator | None = None,
) -> RatioReport:
    """How large objects appear at test, relative to training, over photos of these shapes.

    Args:
        sizes: integers (N, 2), height and width of the photos in pixels.
        train_size: output K_train of RandomResizedCrop in pixels.
        test_size: crop K_test in pixels.
        scale: RandomResizedCrop's share of the area.
        aspect: RandomResizedCrop's width / height.
        crop_pct: K_test / K_img, in (0, 1].
        crop_mode: as for `EvalTransform`.
        draws: training crops in all, spread evenly over the photos; memory grows with it. At the
            default, the means move by about 0.001 from seed to seed.
        generator: on the device of `sizes`; torch's global one unless given.

    Returns:
        Means and quantiles of rho.

    Raises:
        InputError: an argument is malformed.
    """
    if train_size < 1:
        raise InputError(f"train size {train_size} is not a crop: give at least 1 pixel")
    unit = _crop_over_side(sizes, scale, aspect, crop_mode, draws=draws, generator=generator)
    return RatioReport.of(unit * (resize_size(test_size, crop_pct) / train_size))


def equalising_test_size(
    train_size: int,
    *,
    scale: tuple[float, float] = RRC_SCALE,
    aspect: tuple[float, float] = RRC_ASPECT,
    crop_pct: float = 0.875,
    crop_mode: CropMode = "center",
    sizes: Tensor | None = None,
    stat: Stat = "geometric",
    draws: int = 200_000,
    generator: torch.Generator | None = None,
) -> float:
    """Test size at which the mean apparent-size ratio would be 1, before any rounding.

    Args:
        train_size: output K_train of RandomResizedCrop in pixels.
        scale: RandomResizedCrop's share of the area.
        aspect: RandomResizedCrop's width / height; not used without `sizes`.
        crop_pct: K_test / K_img, in (0, 1].
        crop_mode: as for `EvalTransform`.
        sizes: integers (N, 2), height and width of the photos. Without them, the paper's closed
            form: square photos, no crop rejected. The sampler's rejections make crops of real
            square photos smaller than that, and the answer 6 % larger; photos of common shapes,
            whose test scale is larger, bring it back.
        stat: the mean that is made 1.
        draws: training crops in all, spread evenly over the photos.
        generator: on the device of `sizes`; torch's global one unless given.

    Returns:
        K_test in pixels, not an integer.

    Raises:
        InputError: an argument is malformed.
    """
    resize_size(train_size, crop_pct)
    if stat not in get_args(Stat):
        raise InputError(f"stat {stat!r} is unknown: give one of {', '.join(get_args(Stat))}")
    unit: SigmaMoments | RatioReport
    if sizes is None:
        unit = sigma_moments(scale)
    else:
        unit = RatioReport.of(
            _crop_over_side(sizes, scale, aspect, crop_mode, draws=draws, generator=generator)
        )
    mean: float = getattr(unit, stat)
    return train_size * crop_pct / mean


def recommend_test_size(
    train_size: int,
    *,
    scale: tuple[float, float] = RRC_SCALE,
    aspect: tuple[float, float] = RRC_ASPECT,
    crop_pct: float = 0.875,
    crop_mode: CropMode = "center",
    sizes: Tensor | None = None,
    multiple_of: int = 32,
    stat: Stat = "geometric",
    draws: int = 200_000,
    generator: torch.Generator | None = None,
) -> int:
    """`equalising_test_size`, rounded to the nearest multiple of the network's stride.

    At 224 with the paper's range it says 288. All arguments but `multiple_of`, the network's total
    stride in pixels, are those of `equalising_test_size`.

    Returns:
        K_test in pixels, at least `multiple_of`.

    Raises:
        InputError: an argument is malformed.
    """
    if multiple_of < 1:
        raise InputError(f"multiple_of {multiple_of} is not a stride: give at least 1 pixel")
    exact = equalising_test_size(
        train_size,
        scale=scale,
        aspect=aspect,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        sizes=sizes,
        stat=stat,
        draws=draws,
        generator=generator,
    )
    return max(1, math.floor(exact / multiple_of + 0.5)) * multiple_of


def _crop_over_side(
    sizes: Tensor,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    crop_mode: CropMode,
    *,
    draws: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Draws of sqrt(h w) over the side that becomes K_img: rho at K_img = K_train. (draws,)."""
    sides = _side(sizes, crop_mode)
    if draws < 1:
        raise InputError(f"draws {draws} is too few: give at least 1")
    order = torch.randperm(len(sizes), generator=generator, device=sizes.device)
    photo = order.repeat(math.ceil(draws / len(sizes)))[:draws]
    boxes = sample_crop_boxes(sizes[photo], scale=scale, aspect=aspect, generator=generator)
    return boxes[:, 2:].double().prod(dim=1).sqrt() / sides[photo]


def _side(sizes: Tensor, crop_mode: CropMode) -> Tensor:
    """The length in the photo that the test transform resizes to K_img. (N,) float64."""
    HW = _checked_sizes(sizes).double()
    if crop_mode == "center":
        return HW.amin(dim=1)
    if crop_mode == "border":
        return HW.amax(dim=1)
    if crop_mode == "squash":
        return HW.prod(dim=1).sqrt()
    if crop_mode == "fixres_height":
        return HW[:, 0]
    raise InputError(
        f"crop_mode {crop_mode!r} is unknown: give one of {', '.join(get_args(CropMode))}"
    )


def _checked_sizes(sizes: Tensor) -> Tensor:
    if sizes.ndim != 2 or sizes.shape[1] != 2 or not len(sizes) or sizes.is_floating_point():
        raise InputError(
            f"sizes are {sizes.dtype} {tuple(sizes.shape)}: give integers (N, 2), height and width"
        )
    if bool((sizes < 1).any()):
        raise InputError("sizes hold a side below 1 pixel: leave out photos without pixels")
    return sizes


def _range(bounds: tuple[float, float], name: str) -> tuple[float, float]:
    lo, hi = bounds
    if not (0 <= lo <= hi and 0 < hi < math.inf):
        raise InputError(f"{name} {tuple(bounds)} is no range: give 0 <= low <= high")
    return lo, hi
