"""One safe file for a quantised network: tensors and their description, nothing that runs."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors.torch import save as serialise
from torch import nn

from remanence.compress.modules.execution import set_mode
from remanence.compress.modules.quantised_layer import Mode
from remanence.compress.modules.replace import quantised_layers, replace_layers
from remanence.compress.network.layers import find_layers
from remanence.compress.network.norms import normalise_nothing
from remanence.compress.planning.plan import LayerPlan
from remanence.compress.planning.size import Size
from remanence.compress.quantizer.float16 import round_to_float16
from remanence.compress.storage.format import KEY, crc, join, metadata, record
from remanence.compress.storage.packing import pack
from remanence.compress.storage.reader import FileInfo, read_file, read_header
from remanence.compress.storage.stored import (
    as_stored,
    codes_and_codebooks,
    folded_norms,
    kept_tensors,
    stored_dtype,
)
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from remanence.compress.layout import Layout
    from remanence.compress.quantised import Quantised


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    architecture: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    keep_dtype: bool = False,
) -> Size:
    """Write a quantised network as one safetensors file; it is whole or not there.

    Codes are bytes for 256 codewords and a bit stream otherwise, codebooks float16. Everything else
    is float16 where its values allow it; batch norms are folded. A tensor with several names is
    written once.

    Args:
        model: A network with quantised layers; it is left as it is.
        path: Where to write; a file that is there is replaced.
        architecture: How to build the network, in values that JSON can hold.
        extra: Anything else that JSON can hold, such as how it was calibrated.
        keep_dtype: Keep the dtype of all that is not codes or codebooks.

    Returns:
        The bytes; `total` is the size of the file.

    Raises:
        InputError: A tensor is not finite or of no dtype that a file can hold, or `architecture` or
            `extra` is not JSON.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is no folder: create it, or save elsewhere")
    stored = as_stored(model, keep_dtype=keep_dtype)
    folds = folded_norms(stored)
    kept, aliases = kept_tensors(stored, codes_and_codebooks(stored))
    tensors = {
        name: tensor.detach().to("cpu", stored_dtype(name, tensor, folds, keep_dtype=keep_dtype))
        for name, tensor in kept.items()
    }
    parameters = sum(t.numel() for t in kept.values() if isinstance(t, nn.Parameter))
    for name, tensor in kept.items():
        if isinstance(tensor, nn.Parameter) and not bool(tensor.isfinite().all()):
            raise InputError(f"{name} holds NaN or infinity: the network cannot be saved")
    other = sum(t.nbytes for t in tensors.values())

    records: dict[str, Any] = {}
    first: dict[int, str] = {}
    codes = codebooks = 0
    for name, layer in quantised_layers(stored).items():
        known = first.setdefault(id(layer.codes), name)
        if known != name:
            aliases[name] = known
            continue
        codebook, exponent = round_to_float16(layer.codebook.float())
        if not bool(codebook.isfinite().all()):
            raise InputError(f"{name}: its codebook holds NaN or infinity: it cannot be saved")
        planned = LayerPlan(name, layer.layout, codebook.shape[1], len(codebook))
        flat = layer.codes.cpu().long()
        packed = flat.to(torch.uint8) if planned.bits == 8 else pack(flat.flatten(), planned.bits)
        tensors[join(name, "codes")] = packed
        tensors[join(name, "codebook")] = torch.ldexp(
            codebook.cpu(), torch.tensor(-exponent)
        ).half()
        records[name] = record(layer.layout, planned.block, planned.codewords, exponent)
        codes += packed.nbytes
        codebooks += planned.codebook_bytes
        parameters += layer.layout.rows * layer.layout.row_length

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = metadata(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
        architecture=architecture or {},
        extra=extra or {},
        layers=records,
        aliases=aliases,
        folded=sorted(folds),
        uncompressed=4 * parameters,
        digests="".join(crc(tensors[name]) for name in sorted(tensors)),
    )
    raw = serialise(tensors, {KEY: text})
    _write(target, raw)
    header = len(raw) - other - codes - codebooks
    return Size(codes, codebooks, other, header, 4 * parameters)


def inspect_file(path: str | os.PathLike[str]) -> FileInfo:
    """Read what a file says of itself, without reading its tensors or building anything.

    Args:
        path: A file that `save` wrote.

    Raises:
        InputError: It is missing, damaged or no such file.
    """
    return read_header(Path(path))[0]


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    build: Callable[[Mapping[str, Any]], nn.Module] | None = None,
    mode: Mode = "dense",
) -> nn.Module:
    """Read a quantised network.

    Everything is checked before the network is touched. Its batch norms are folded, so that it is
    for evaluation: in training mode they would normalise twice.

    Args:
        path: A file that `save` wrote.
        model: A float network of the architecture that was saved; its layers are replaced in place
            and all its values overwritten.
        build: Builds that network from the `architecture` given to `save`, where `model` is None.
        mode: How the layers run, see `set_mode`.

    Returns:
        The network, in eval mode.

    Raises:
        InputError: The file is missing, damaged, edited, of another version or another network; the
            message names the tensor. The network is unchanged then.
    """
    if mode not in get_args(Mode):
        raise InputError(f"mode {mode!r} is unknown: give one of {', '.join(get_args(Mode))}")
    info, layers, kept = read_file(Path(path))
    if model is None:
        if build is None:
            raise InputError(f"{path}: give the network, or a function that builds it")
        model = build(info.architecture)
    where = f"{path}: this network is not the one that was saved"
    if info.architecture:
        where += f" ({json.dumps(info.architecture)})"
    for name, target in info.aliases.items():
        if target in layers:
            layers[name] = layers[target]
        elif target in kept:
            kept[name] = kept[target]
    own_layers = _own_layers(model, info, layers, where)
    targets = _targets(model, info, own_layers, kept, where)

    replace_layers(model, own_layers)
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(kept[name])
        for norm in folded_norms(model).values():
            normalise_nothing(norm)
    set_mode(model, mode)
    return model.eval()


def _own_layers(
    model: nn.Module, info: FileInfo, layers: Mapping[str, Quantised], where: str
) -> dict[str, Quantised]:
    """Return the quantised layers under the network's own names and layouts, or refuse."""
    found = find_layers(model)
    first = {tied: name for name, layer in found.items() for tied in layer.tied}
    own = {}
    for name, quantised in layers.items():
        layer = found.get(first.get(name, name))
        if layer is None:
            raise InputError(f"{where}: it has no layer {name}")
        if name in first:
            if layers.get(first[name]) is not quantised:
                raise InputError(f"{where}: {name} and {first[name]} share one weight in it")
            continue
        # A weight that an embedding and a linear layer share has the layout of either.
        theirs = quantised.layout
        if name in info.aliases and layer.layout.shape == theirs.shape:
            theirs = replace(theirs, kind=layer.layout.kind)
        if layer.layout != theirs:
            raise InputError(f"{where}: {name} is {_words(layer.layout)}, there {_words(theirs)}")
        own[name] = replace(quantised, layout=theirs)
    return own


def _targets(
    model: nn.Module,
    info: FileInfo,
    layers: Mapping[str, Quantised],
    kept: Mapping[str, Tensor],
    where: str,
) -> dict[str, Tensor]:
    """Return the network's tensors to overwrite, or refuse: every one must have its value."""
    if set(info.folded) != set(folded_norms(model)):
        name = min(set(info.folded) ^ set(folded_norms(model)))
        raise InputError(f"{where}: {name} is a batch norm in one of the two only")
    found = find_layers(model)
    replaced = {id(found[name].weight) for name in layers}
    targets, aliases = kept_tensors(model, replaced)
    for name in (*targets, *aliases):
        if name not in kept:
            raise InputError(f"{where}: the file has no tensor {name}")
    for name, tensor in kept.items():
        target = targets.get(aliases.get(name, name))
        if target is None:
            raise InputError(f"{where}: it has no tensor {name}")
        if target.shape != tensor.shape:
            shapes = tuple(target.shape), tuple(tensor.shape)
            raise InputError(f"{where}: {name} has shape {shapes[0]}, the file {shapes[1]}")
        if name in aliases and not torch.equal(tensor, kept[aliases[name]]):
            raise InputError(f"{where}: {name} and {aliases[name]} are one tensor in it")
        if target.is_meta:
            raise InputError(f"{where}: {name} is on the meta device; build it on the CPU")
    return targets


def _words(layout: Layout) -> str:
    groups = f" in {layout.groups} groups" if layout.groups > 1 else ""
    return f"{layout.kind} {layout.shape}{groups}"


def _write(target: Path, raw: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(target)
    except BaseException:  # an interrupt, too, must leave nothing half-written; it rises again
        Path(name).unlink(missing_ok=True)
        raise
