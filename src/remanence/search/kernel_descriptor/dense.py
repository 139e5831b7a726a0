"""Kernel descriptors on a grid of an image, without cutting patches (arXiv 1811.11147).

All sums over a patch's pixels are inner products of its gradient fields with one matrix of
positions. With the fields of the whole image, computed once, they are a convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import conv2d

from remanence.errors import InputError
from remanence.modes import exact_products
from remanence.search.kernel_descriptor.descriptor import SMALLEST, describe_sums, position_matrix
from remanence.search.kernel_descriptor.gradients import gradient_fields, smooth
from remanence.search.kernel_descriptor.grey import grey_image

if TYPE_CHECKING:
    from torch import Tensor

    from remanence.search.kernel_descriptor.descriptor import KernelDescriptor

CPU_PLACES = 2**11  # at a time, whose sums take 4 MB in float32
GPU_PLACES = 2**16


class DenseDescriptors(NamedTuple):
    """Descriptors of patches on a grid of h x w places.

    Attributes:
        vectors: (D, h, w), float32, or float64 where the image was. A flat patch's is 0.
        valid: (h, w), bool: False for a flat patch.
    """

    vectors: Tensor
    valid: Tensor


def dense_descriptors(
    image: Tensor, descriptor: KernelDescriptor, patch: int = 32, stride: int = 4
) -> DenseDescriptors:
    """Describe the patches at all places of a grid.

    The patch at place (i, j) has its first pixel at row i stride, column j stride. Smoothing and
    gradients see its real neighbours, where a patch that is cut out repeats its own border: the
    vectors differ a little from those of cut patches, and are equal where the patch is the image.
    Beyond the image its border is repeated.

    Args:
        image: (H, W), (1, H, W) or (3, H, W): uint8, or floating in [0, 1].
        descriptor: The kernels.
        patch: Side s of the patches, pixels, at least 8.
        stride: Distance of the places, pixels.

    Returns:
        Descriptors of h = (H - s) // stride + 1 by w = (W - s) // stride + 1 places, on the
        image's device.

    Raises:
        InputError: The image is of another shape or type, or smaller than a patch, or a setting is
            out of range.
    """
    if patch < SMALLEST:
        raise InputError(f"patches of {patch} pixels a side: give at least {SMALLEST}")
    if stride < 1:
        raise InputError(f"a stride of {stride} pixels: give 1 or more")
    grey = grey_image(image)
    if min(grey.shape) < patch:
        raise InputError(
            f"an image of {grey.shape[0]} x {grey.shape[1]} for patches of {patch}: give a larger "
            "image or smaller patches"
        )
    height, width = ((n - patch) // stride + 1 for n in grey.shape)
    fields = gradient_fields(smooth(grey[None], patch), descriptor.theta[1]).squeeze(1)
    kernels = position_matrix(descriptor, grey, patch).mT.reshape(-1, 1, patch, patch)

    vectors = grey.new_empty(descriptor.dim, height, width)
    valid = torch.empty(height, width, dtype=torch.bool, device=grey.device)
    step = max(1, (GPU_PLACES if grey.is_cuda else CPU_PLACES) // width)
    with exact_products():
        for start in range(0, height, step):
            count = min(step, height - start)
            band = fields[:, None, start * stride : (start + count - 1) * stride + patch]
            sums = conv2d(band, kernels, stride=stride).flatten(2).mT  # (T, places, columns)
            found, shown = describe_sums(descriptor, sums, patch)
            vectors[:, start : start + count] = found.mT.reshape(-1, count, width)
            valid[start : start + count] = shown.reshape(count, width)
    return DenseDescriptors(vectors, valid)


def dense_frames(height: int, width: int, patch: int = 32, stride: int = 4) -> Tensor:
    """Return the frames of the patches that `dense_descriptors` describes.

    Args:
        height: H of the image.
        width: W of the image.
        patch: Side s of the patches, pixels.
        stride: Distance of the places, pixels.

    Returns:
        Frames (h w, 2, 3) in row-major order, float64: pixel by pixel, they cut the patches.
    """
    down, across = (
        torch.arange(0, n - patch + 1, stride, dtype=torch.float64) + (patch - 1) / 2
        for n in (height, width)
    )
    y, x = torch.meshgrid(down, across, indexing="ij")
    shape = (patch / 2 * torch.eye(2, dtype=torch.float64)).expand(x.numel(), 2, 2)
    return torch.cat([shape, torch.stack([x.flatten(), y.flatten()], dim=1)[:, :, None]], dim=2)
