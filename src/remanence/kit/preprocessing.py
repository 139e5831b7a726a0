"""How images become inputs: what of a network's configuration an evaluation must follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import timm
from timm.data import resolve_data_config

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

CropMode = Literal["center", "squash", "border", "fixres_height"]


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs.

    Attributes:
        size: Side of the input, pixels.
        crop_pct: Side of the input over the side that images are resized to.
        crop_mode: `center`, `squash`, `border` (timm's), or `fixres_height`.
        interpolation: `bilinear` or `bicubic`.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel.
    """

    size: int
    crop_pct: float = 0.875
    crop_mode: CropMode = "center"
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def resolve(
    config: Mapping[str, Any], model: nn.Module, where: str, *, test: bool
) -> Preprocessing:
    """Read the preprocessing of a timm configuration; what it leaves out is timm's default.

    Args:
        config: The `pretrained_cfg`.
        model: The network.
        where: Where the configuration lies, for messages.
        test: Take the size and the crop for testing, where they differ from those of training.

    Returns:
        The preprocessing.

    Raises:
        InputError: An entry is broken, or asks for what is not square RGB.
    """
    try:
        resolved = resolve_data_config(
            {}, pretrained_cfg=dict(config), model=model, use_test_size=test
        )
        channels, height, width = (int(v) for v in resolved["input_size"])
        crop_pct, crop_mode = float(resolved["crop_pct"]), str(resolved["crop_mode"])
        mean, std = (tuple(float(v) for v in resolved[key]) for key in ("mean", "std"))
    except Exception as error:  # a configuration may hold anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: broken preprocessing ({reason})") from error
    if channels != 3 or height != width or height < 1:
        raise InputError(
            f"{where}: input_size {channels} x {height} x {width}; only square RGB images are known"
        )
    if crop_mode not in get_args(CropMode):
        modes = ", ".join(get_args(CropMode))
        raise InputError(f"{where}: unknown crop_mode {crop_mode!r}; use one of {modes}")
    sane = all(map(math.isfinite, mean)) and all(0 < v < math.inf for v in std)
    if len(mean) != 3 or len(std) != 3 or not sane or not 0 < crop_pct <= 1:
        raise InputError(
            f"{where}: mean {mean}, std {std}, crop_pct {crop_pct:g}; give three finite means, "
            "three positive deviations and a crop_pct in (0, 1]"
        )
    mode = cast("CropMode", crop_mode)
    return Preprocessing(height, crop_pct, mode, str(resolved["interpolation"]), mean, std)


def check_normalisation(preprocessing: Preprocessing, name: str, tag: str, where: str) -> None:
    """Compare mean and deviation with those that timm knows a checkpoint to be trained with.

    AdvProp checkpoints (`tf_efficientnet_*.ap_in1k`) want mean 0.5; the code released with
    FixEfficientNet (arXiv 2003.08237) gives them ImageNet's, and nothing but the accuracy shows it.

    Args:
        preprocessing: What the configuration says.
        name: Architecture; it may carry the tag behind a dot.
        tag: Tag of the checkpoint, empty where the name carries it or there is none.
        where: Where the configuration lies, for messages.

    Raises:
        InputError: They contradict each other.
    """
    architecture, _, own = name.partition(".")
    checkpoint = f"{architecture}.{tag or own}"
    try:
        known = timm.models.get_pretrained_cfg(checkpoint, allow_unregistered=False)
    except RuntimeError:  # a checkpoint that timm does not know
        return
    if known is None or not (tag or own):
        return
    for key in ("mean", "std"):
        given, right = getattr(preprocessing, key), getattr(known, key)
        if any(abs(a - b) > 1e-3 for a, b in zip(given, right, strict=True)):
            raise InputError(
                f"{where}: {key} {given} contradicts {checkpoint}, which was trained with "
                f"{tuple(right)}; correct the configuration"
            )
