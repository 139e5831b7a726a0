"""What a plan comes to in bytes: as the paper counts, and as the file will be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from remanence.compress.network.layers import find_layers
from remanence.compress.storage.format import header_bytes, layer_entries, metadata, record
from remanence.compress.storage.stored import folded_norms, kept_tensors, stored_dtype
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from remanence.compress.planning.plan import Plan

Accounting = Literal["file", "paper"]


@dataclass(frozen=True)
class Size:
    """Bytes of a compressed network.

    Attributes:
        codes: Codes of all layers.
        codebooks: Codebooks of all layers.
        other: Everything else: norms, biases, layers that are kept.
        header: Names, shapes and metadata of the file; 0 in the paper's accounting.
        uncompressed: The network's parameters in float32.
    """

    codes: int
    codebooks: int
    other: int
    header: int
    uncompressed: int

    @property
    def tensors(self) -> int:
        """Bytes of all tensors."""
        return self.codes + self.codebooks + self.other

    @property
    def total(self) -> int:
        """All bytes: in the file's accounting, the size of the file."""
        return self.tensors + self.header

    @property
    def ratio(self) -> float:
        """How many times smaller than the parameters in float32."""
        return self.uncompressed / self.total


def size(
    model: nn.Module,
    plan: Plan,
    accounting: Accounting = "file",
    *,
    keep_dtype: bool = False,
    architecture: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Size:
    """Count the bytes of a plan before anything is quantised.

    `file` counts what `save` writes for a network quantised by this plan, to the byte: all
    tensors, those that stay float in float16, and the header. `paper` counts as the paper's table
    does: 4 bytes for each parameter that stays, no running statistics, no header.

    Args:
        model: The float network; it may live on the `meta` device.
        plan: Its plan.
        accounting: `file` or `paper`.
        keep_dtype: As for `save`.
        architecture: As for `save`.
        extra: As for `save`.

    Returns:
        The bytes.

    Raises:
        InputError: The accounting is unknown, or the plan is for another network.
    """
    if accounting not in get_args(Accounting):
        raise InputError(f"accounting {accounting!r} is unknown: give file or paper")
    layers = find_layers(model)
    for planned in plan.layers:
        if planned.name not in layers or layers[planned.name].layout != planned.layout:
            raise InputError(f"{planned.name}: the plan is for another network; plan this one")
    codes = sum(planned.code_bytes for planned in plan.layers)
    codebooks = sum(planned.codebook_bytes for planned in plan.layers)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if accounting == "paper":
        quantised = sum(math.prod(planned.layout.shape) for planned in plan.layers)
        return Size(codes, codebooks, 4 * (parameters - quantised), 0, 4 * parameters)

    kept, aliases = kept_tensors(
        model, {id(layers[planned.name].weight) for planned in plan.layers}
    )
    folds = folded_norms(model)
    entries = {
        name: (stored_dtype(name, tensor, folds, keep_dtype=keep_dtype), tuple(tensor.shape))
        for name, tensor in kept.items()
    }
    other = sum(dtype.itemsize * math.prod(shape) for dtype, shape in entries.values())
    records = {}
    for planned in plan.layers:
        entries |= layer_entries(planned.name, planned.layout, planned.block, planned.codewords)
        records[planned.name] = record(planned.layout, planned.block, planned.codewords)
        for tied in layers[planned.name].tied:
            aliases[tied] = planned.name
    text = metadata(
        entries,
        architecture=architecture or {},
        extra=extra or {},
        layers=records,
        aliases=aliases,
        folded=sorted(folds),
        uncompressed=4 * parameters,
        digests="0" * 8 * len(entries),
    )
    return Size(codes, codebooks, other, header_bytes(entries, text), 4 * parameters)
