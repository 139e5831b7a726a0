"""Quant-Noise: train a network for the quantisation to come (arXiv 2004.07320, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

from remanence.compress.layout import Layout, layout_of
from remanence.compress.quantizer.kmeans import nearest
from remanence.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


class QuantNoise(nn.Module):
    """Distorts random blocks of a weight in training; hands the weight through in evaluation.

    The stored weight is never written: the noise lives in the forward pass only. The gradient goes
    straight through to every block, distorted or not (the paper's straight-through estimator).
    Masks come from PyTorch's global generator, as dropout's do, so that `torch.manual_seed` and
    activation checkpointing repeat them.

    Attributes:
        codebook: Codewords (K, block) that distorted blocks are rounded to; None sets them to
            zero. May be replaced between epochs, as the weights move.
    """

    codebook: Tensor | None

    def __init__(self, p: float, block: int, layout: Layout, codebook: Tensor | None) -> None:
        super().__init__()
        self.p, self.block, self.layout = p, block, layout
        self.register_buffer("codebook", codebook, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, distorted if training.

        Args:
            weight: Weight of the layout's shape.
        """
        if not self.training or self.p == 0:
            return weight
        with torch.no_grad():
            blocks = self.layout.to_rows(weight).reshape(-1, self.block)
            chosen = torch.rand(len(blocks), 1, device=weight.device) < self.p
            if self.codebook is None:
                noisy = blocks.masked_fill(chosen, 0) / (1 - self.p)
            else:
                picked = chosen.flatten()
                noisy = blocks.clone()
                codes = nearest(blocks[picked].float(), self.codebook.float())
                noisy[picked] = self.codebook[codes].to(noisy.dtype)
            noise = self.layout.to_weight(noisy.reshape(self.layout.rows, -1)) - weight
        return weight + noise

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"p={self.p}, block={self.block}"


def quant_noise(
    module: nn.Module, p: float = 0.1, block: int = 8, *, codebook: Tensor | None = None
) -> nn.Module:
    """Add noise to a layer's weight while it trains.

    In each training pass every block is distorted with probability p. Without a codebook the
    distorted blocks are zero and the others are scaled by 1 / (1 - p), so that the weight's
    expectation is the weight itself; this is the proxy noise that the paper uses for product
    quantisation. With a codebook they take their nearest codeword, the others stay as they are, and
    the expectation is (1 - p) weight + p quantised weight.

    Optimisers built before or after see the same parameter. The state dict names it
    `parametrizations.weight.original` until `remove_quant_noise`.

    Args:
        module: A convolution, transposed convolution, linear layer, embedding, or
            `nn.MultiheadAttention` (whose packed input projection is meant); changed in place.
        p: Probability that a block is distorted, from 0 to below 1; 0.05 to 0.2 is usual.
        block: Weights in a block; it must divide a row (`Layout`).
        codebook: Codewords (K, block), or None for zeros.

    Returns:
        The module.

    Raises:
        InputError: The module has no weight of its own to distort, has noise already, or an
            argument is out of range.
    """
    kind, name = type(module).__name__, _weight_name(module)
    if parametrize.is_parametrized(module, name):
        raise InputError(f"{kind}: its {name} is parametrised already; remove that first")
    weight = module._parameters.get(name)  # noqa: SLF001 -- a property of that name would be decoded
    layout = layout_of(module)
    if layout is None and isinstance(module, nn.MultiheadAttention) and weight is not None:
        layout = Layout("linear", tuple(weight.shape))
    if layout is None or weight is None:
        raise InputError(
            f"{kind} has no weight to distort; give a convolution, a linear layer or an embedding"
        )
    if not 0 <= p < 1:
        raise InputError(f"p {p} is not a probability below 1; 0.1 is usual")
    layout.check_block(block, kind)
    if codebook is not None:
        if codebook.ndim != 2 or not len(codebook) or codebook.shape[1] != block:
            raise InputError(
                f"{kind}: a codebook of shape {tuple(codebook.shape)} does not fit blocks of "
                f"{block}; give (K, {block})"
            )
        if not bool(codebook.isfinite().all()):
            raise InputError(f"{kind}: the codebook holds NaN or infinity; give finite codewords")
        codebook = codebook.detach().to(weight.device, copy=True)
    noise = QuantNoise(p, block, layout, codebook).train(module.training)
    parametrize.register_parametrization(module, name, noise)
    return module


def remove_quant_noise(module: nn.Module) -> nn.Module:
    """Take the noise of `quant_noise` off again.

    Args:
        module: A layer with noise; changed in place. Its weight is the trained one, undistorted.

    Returns:
        The module.

    Raises:
        InputError: The layer has no noise.
    """
    name = _weight_name(module)
    found = getattr(module, "parametrizations", {})
    if name not in found or not isinstance(found[name][0], QuantNoise):
        raise InputError(f"{type(module).__name__} carries no quant-noise to remove")
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    return module


def _weight_name(module: nn.Module) -> str:
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
