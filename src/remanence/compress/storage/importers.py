"""Read the checkpoints that the papers' own programs wrote.

Both hold codes and a codebook a layer, beside what stayed float:

* "And the Bit Goes Down" (arXiv 1907.05686): a dictionary a layer, `centroids` and `assignments`;
  the assignments are one flat vector, a block position after the other, all rows within each.
* "Permute, Quantize, and Fine-tune" (arXiv 2010.15703): a flat state dict with `codes_matrix`
  (rows, blocks a row) and `codebook` in the place of `weight`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remanence.compress.layout import Layout, layout_of
from remanence.compress.modules.replace import replace_layers
from remanence.compress.network.norms import normalise_nothing
from remanence.compress.quantised import Quantised
from remanence.compress.quantizer.float16 import round_to_float16
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def import_bgd(state: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """Build a network from a checkpoint of "And the Bit Goes Down".

    Norms saved without running statistics were folded into scale and shift: they get mean 0,
    variance 1 and eps 0. Norms saved with them (the driver's own files) keep them.

    Args:
        state: What `torch.load(path, map_location="cpu", weights_only=True)` returns.
        model: The float network, its weights of no account; left as it is.

    Returns:
        A copy of the network with quantised layers and the checkpoint's float weights.

    Raises:
        InputError: The checkpoint is not of this kind, names a layer that the network lacks or
            lacks one that it has, or an entry is damaged.
    """
    _check_kind(state, dict)
    modules = dict(model.named_modules())
    layers: dict[str, Quantised] = {}
    tensors: dict[str, Tensor] = {}
    unknown = []
    for name, entry in state.items():
        owner = name if name in modules else name.removesuffix("_bias")
        if owner not in modules:
            unknown.append(name)
            continue
        values = dict(entry)
        if "centroids" in values and "assignments" in values:
            layout = _layout(modules[owner], owner)
            codebook, codes = values.pop("centroids"), values.pop("assignments")
            blocks = _blocks(codebook, layout, owner)
            if codes.numel() != layout.rows * blocks:
                raise InputError(
                    f"{owner}: {codes.numel()} assignments do not fill {layout.rows} rows of "
                    f"{blocks} blocks; is it this architecture's checkpoint?"
                )
            layers[owner] = _quantised(
                layout, codes.reshape(blocks, layout.rows).T, codebook, owner
            )
        tensors |= {
            f"{owner}.{key}": value for key, value in values.items() if isinstance(value, Tensor)
        }
    _refuse(unknown, "is in the checkpoint but not in the network", "choose its architecture")
    return _assemble(model, layers, tensors)


def import_pqf(state: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """Build a network from a checkpoint of "Permute, Quantize, and Fine-tune".

    Norms without running statistics are folded, as in `import_bgd`. Channels come permuted, which
    needs no care: every layer was permuted to match.

    Args:
        state: What `torch.load(path, map_location="cpu", weights_only=True)` returns.
        model: The float network, its weights of no account; left as it is.

    Returns:
        A copy of the network with quantised layers and the checkpoint's float weights. Transposed
        convolutions come back decoded, as float layers: their blocks run across output channels,
        which `Layout` does not.

    Raises:
        InputError: As for `import_bgd`.
    """
    _check_kind(state, Tensor)
    modules = dict(model.named_modules())
    layers: dict[str, Quantised] = {}
    tensors: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        owner, _, last = key.rpartition(".")
        if owner not in modules:
            unknown.append(key)
        elif last == "codes_matrix":
            if f"{owner}.codebook" not in state:
                raise InputError(f"{owner} has codes but no codebook: the checkpoint is damaged")
            layout = _layout(modules[owner], owner)
            transposed = layout.kind == "conv_transpose"
            if transposed:
                layout = Layout("conv", layout.shape)
            codebook = state[f"{owner}.codebook"]
            expected = (layout.rows, _blocks(codebook, layout, owner))
            if tuple(value.shape) != expected:
                raise InputError(
                    f"{owner}: codes of shape {tuple(value.shape)} where the network takes "
                    f"{expected}; is it this architecture's checkpoint?"
                )
            found = _quantised(layout, value, codebook, owner)
            if transposed:
                tensors[f"{owner}.weight"] = found.weight()
            else:
                layers[owner] = found
        elif last != "codebook":
            tensors[key] = value
    _refuse(unknown, "is in the checkpoint but not in the network", "choose its architecture")
    return _assemble(model, layers, tensors)


def _check_kind(state: Mapping[str, Any], kind: type) -> None:
    other = "import_pqf" if kind is dict else "import_bgd"
    wrong = next((key for key, entry in state.items() if not isinstance(entry, kind)), None)
    if not state or wrong is not None:
        raise InputError(
            f"not a checkpoint of this kind (entry {wrong!r}): give a compressed state, or try "
            f"{other}"
        )


def _layout(module: nn.Module, name: str) -> Layout:
    layout = layout_of(module)
    if layout is None:
        raise InputError(
            f"{name} is quantised in the checkpoint but a {type(module).__name__} in the network; "
            "choose the checkpoint's architecture"
        )
    return layout


def _blocks(codebook: Tensor, layout: Layout, name: str) -> int:
    if codebook.ndim != 2 or not len(codebook):
        raise InputError(f"{name}: a codebook of shape {tuple(codebook.shape)}, not (K, d)")
    layout.check_block(codebook.shape[1], name)
    return layout.row_length // codebook.shape[1]


def _quantised(layout: Layout, codes: Tensor, codebook: Tensor, name: str) -> Quantised:
    if codes.dtype == torch.uint8 and len(codebook) > 256:
        raise InputError(
            f"{name}: codes saved in 8 bits for {len(codebook)} codewords have wrapped around; "
            "compress the network anew"
        )
    whole = codes.long()
    if codes.dtype == torch.int16:
        whole = whole & 0xFFFF  # codes from 32,768 on were saved as negative numbers
    if whole.numel() and not 0 <= int(whole.min()) <= int(whole.max()) < len(codebook):
        raise InputError(f"{name}: a code lies outside the {len(codebook)} codewords")
    if not bool(codebook.isfinite().all()):
        raise InputError(f"{name}: the codebook holds NaN or infinity; the checkpoint is damaged")
    rounded, exponent = round_to_float16(codebook.float())
    return Quantised(layout, whole.contiguous(), rounded, exponent)


def _assemble(
    model: nn.Module, layers: Mapping[str, Quantised], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """Put the checkpoint into a copy of the network, every tensor of it accounted for."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    wanted = model.state_dict()
    quantised = {f"{name}.weight" for name in layers}
    folded = {
        name
        for name, module in modules.items()
        if isinstance(getattr(module, "running_var", None), Tensor)
        and not any(f"{name}.{key}" in tensors for key in _STATISTICS)
    }
    spared = {f"{name}.{key}" for name in folded for key in _STATISTICS}
    spared |= {key for key in wanted if key.endswith(".num_batches_tracked")}
    _refuse(
        (key for key in tensors if key not in wanted or key in quantised),
        "is in the checkpoint but not in the network",
        "choose its architecture",
    )
    _refuse(
        (key for key in wanted if key not in {*tensors, *quantised, *spared}),
        "is in the network but not in the checkpoint",
        "choose the checkpoint's architecture",
    )
    with torch.no_grad():
        for key, value in tensors.items():
            if value.shape != wanted[key].shape:
                raise InputError(
                    f"{key} has shape {tuple(value.shape)} in the checkpoint and "
                    f"{tuple(wanted[key].shape)} in the network; choose its architecture"
                )
            if not bool(value.isfinite().all()):
                raise InputError(f"{key} holds NaN or infinity; the checkpoint is damaged")
            wanted[key].copy_(value)
        for name in folded:
            norm: Any = modules[name]
            normalise_nothing(norm)
    return replace_layers(model, layers)


def _refuse(names: Iterable[str], what: str, mend: str) -> None:
    found = list(names)
    if found:
        shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise InputError(f"{shown} {what}: {mend}")
