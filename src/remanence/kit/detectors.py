"""torchvision's detection networks: `torchvision:maskrcnn_resnet50_fpn` and its like."""

from __future__ import annotations

import difflib
import inspect
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
    short = name.removeprefix(PREFIX)
    try:
        model: nn.Module = torchvision.models.get_model(
            short,
            weights=None,
            weights_backbone=None,
            num_classes=count,
            **arguments,
        )
    except Exception as error:  # a network's constructor checks its arguments as it likes
        raise InputError(
            f"{name}: cannot be built with {dict(arguments)} ({one_line(error)})"
        ) from error
    # torchvision drops what it does not know, a misspelt size too.
    makers = [torchvision.models.get_model_builder(short), *type(model).__mro__[:-1]]
    known = {word for maker in makers for word in inspect.signature(maker).parameters}
    for word in arguments.keys() - known:
        near = difflib.get_close_matches(word, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{name}: takes no argument {word}{hint}")
    return model.eval()
