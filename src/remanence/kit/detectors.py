"""torchvision's detection networks: `torchvision:maskrcnn_resnet50_fpn` and its like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torchvision

from remanence.errors import InputError
from remanence.kit.checkpoints import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

PREFIX = "torchvision:"


def is_detector(name: str) -> bool:
    """Tell whether a name is one of torchvision's detection networks."""
    known = torchvision.models.list_models(module=torchvision.models.detection)
    return name.startswith(PREFIX) and name.removeprefix(PREFIX) in known


def build_detector(name: str, count: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a detection network with fresh weights, in eval mode.

    In eval mode it takes a list of images (3, H, W), float in [0, 1], of any sizes.

    Args:
        name: `torchvision:` and the network's name.
        count: Classes, with the background.
        arguments: Arguments of the network beside its name.

    Returns:
        The network.

    Raises:
        InputError: The network does not take its arguments.
    """
    try:
        model: nn.Module = torchvision.models.get_model(
            name.removeprefix(PREFIX),
            weights=None,
            weights_backbone=None,
            num_classes=count,
            **arguments,
        )
    except Exception as error:  # a network's constructor checks its arguments as it likes
        raise InputError(
            f"{name}: cannot be built with {dict(arguments)} ({one_line(error)})"
        ) from error
    return model.eval()
