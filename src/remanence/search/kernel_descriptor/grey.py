"""Grey images from what people have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from remanence.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def grey_image(image: Tensor) -> Tensor:
    """Return the luma of an image.

    Args:
        image: (H, W), (1, H, W) or red, green and blue (3, H, W): uint8, or floating in [0, 1].

    Returns:
        0.299 R + 0.587 G + 0.114 B in [0, 1] (H, W), float32, or float64 where the image was.

    Raises:
        InputError: The image has another shape, or values that are not finite or out of range.
    """
    shape = tuple(image.shape)
    channels = 1 if image.ndim == 2 else shape[0] if image.ndim == 3 else 0
    if channels not in (1, 3) or 0 in shape:
        raise InputError(
            f"an image of shape {shape}: give grey (H, W) or (1, H, W), or colour (3, H, W) "
            "(permute(2, 0, 1) brings channels to the front)"
        )
    if not image.is_floating_point():
        if image.dtype != torch.uint8:
            raise InputError(f"an image of {image.dtype}: give uint8, or floating values in [0, 1]")
        image = image.float() / 255
    elif image.dtype != torch.float64:
        image = image.float()
    low, high = (float(v) for v in image.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("an image holds NaN or infinity: give finite values in [0, 1]")
    if low < -0.01 or high > 1.01:
        raise InputError(
            f"an image runs from {low:g} to {high:g}: give values in [0, 1] (divide by 255), "
            "or uint8"
        )
    if channels == 3:
        return 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    return image.reshape(shape[-2:])
