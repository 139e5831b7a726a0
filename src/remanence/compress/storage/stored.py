"""What of a network goes into a file, and in which precision."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from remanence.compress.modules.replace import quantised_layers
from remanence.compress.network.norms import fold_batch_norms
from remanence.compress.quantizer.float16 import round_to_float16
from remanence.compress.storage.format import DTYPES, join
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_HALF = torch.finfo(torch.float16)


@torch.no_grad()
def as_stored(model: nn.Module, *, keep_dtype: bool = False) -> nn.Module:
    """Return a copy of a network as a file holds it, for measuring what storing changes.

    Batch norms are folded, codebooks and all other tensors rounded to the dtype of the file. The
    network that `load` returns computes exactly what this one does.

    Args:
        model: A network with quantised layers; it is left as it is.
        keep_dtype: As for `save`.
    """
    stored = copy.deepcopy(model)
    fold_batch_norms(stored)
    own = codes_and_codebooks(stored)
    for layer in quantised_layers(stored).values():
        layer.codebook.copy_(round_to_float16(layer.codebook.float())[0])
    folds = folded_norms(stored)
    for name, tensor in kept_tensors(stored, own)[0].items():
        tensor.copy_(tensor.to(stored_dtype(name, tensor, folds, keep_dtype=keep_dtype)))
    return stored.eval()


def codes_and_codebooks(model: nn.Module) -> set[int]:
    """Return the ids of the tensors that are codes and codebooks."""
    found = quantised_layers(model).values()
    return {id(tensor) for layer in found for tensor in (layer.codes, layer.codebook)}


def kept_tensors(model: nn.Module, quantised: set[int]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what a file holds beside the quantised weights.

    Args:
        model: A network.
        quantised: `id` of the tensors that are stored as codes and codebooks.

    Returns:
        Tensors by name, without the running statistics of norms that are folded, each once; and
        the other names of tensors that have several.

    Raises:
        InputError: The state holds something that no file of tensors can.
    """
    dropped = {
        join(path, statistic)
        for path in folded_norms(model)
        for statistic in ("running_mean", "running_var", "num_batches_tracked")
    }
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
            raise InputError(f"{name}: a file of tensors cannot hold it; drop it from the state")
        if id(tensor) in quantised or name in dropped:
            continue
        if first.setdefault(id(tensor), name) == name:
            kept[name] = tensor
        else:
            aliases[name] = first[id(tensor)]
    return kept, aliases


@torch.no_grad()
def stored_dtype(
    name: str, tensor: Tensor, folded: Mapping[str, _BatchNorm], *, keep_dtype: bool
) -> torch.dtype:
    """Return the dtype that a file gives a tensor.

    A parameter is float16 where its largest magnitude is a normal float16 number; a buffer, which
    may be a table of any kind, where each of its values is. Half precision, integers and truth
    values stay as they are.

    Args:
        name: The tensor's name.
        tensor: The tensor; on the `meta` device it is taken to fit.
        folded: The norms that are folded: theirs is the dtype of the folded values.
        keep_dtype: Keep every dtype.
    """
    if keep_dtype or not tensor.is_floating_point() or tensor.dtype.itemsize <= 2:
        return tensor.dtype
    if tensor.is_meta:
        return torch.float16
    path, _, leaf = name.rpartition(".")
    values = tensor
    if path in folded and leaf in {"weight", "bias"}:
        scale, shift = folded_affine(folded[path])
        values = scale if leaf == "weight" else shift
    magnitudes = values.detach().abs()
    magnitudes = magnitudes[(magnitudes > 0) & magnitudes.isfinite()]
    if not len(magnitudes):
        return torch.float16
    low = magnitudes.max() if isinstance(tensor, nn.Parameter) else magnitudes.min()
    fits = bool(low >= _HALF.tiny) and bool(magnitudes.max() <= _HALF.max)
    return torch.float16 if fits else torch.float32 if values.dtype.itemsize == 8 else tensor.dtype


def folded_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms whose running statistics are folded into scale and shift."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.weight is not None
        and module.running_mean is not None
    }


def folded_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm with its running statistics folded in, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale
