"""Reading a file of a quantised network: all checks that need no network."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse

from remanence.compress.layout import Kind, Layout
from remanence.compress.planning.plan import LayerPlan
from remanence.compress.planning.size import Size
from remanence.compress.quantised import Quantised
from remanence.compress.storage.format import (
    DTYPES,
    KEY,
    VERSION,
    Entries,
    crc,
    digest,
    join,
    layer_entries,
)
from remanence.compress.storage.packing import unpack
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

LONGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class FileInfo:
    """What a file says of itself.

    Attributes:
        architecture: How to build the network, as given to `save`.
        layers: The quantised layers.
        kept: Shapes of all other tensors by name.
        aliases: Further names of tensors and layers that are stored once.
        folded: Batch norms whose running statistics are folded into scale and shift.
        exponents: Layers whose codebook is stored times 2**-exponent.
        size: Bytes.
        extra: What else was given to `save`.
    """

    architecture: dict[str, Any]
    layers: tuple[LayerPlan, ...]
    kept: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    folded: tuple[str, ...]
    exponents: dict[str, int]
    size: Size
    extra: dict[str, Any]


def read_file(path: Path) -> tuple[FileInfo, dict[str, Quantised], dict[str, Tensor]]:
    """Read and check a whole file: the quantised layers, and all other tensors."""
    info, entries, digests = read_header(path)
    try:
        tensors = parse(path.read_bytes())
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): copy it again") from error
    if len(digests) != 8 * len(entries) or set(tensors) != set(entries):
        raise InputError(f"{path}: its header lists other tensors than it holds: copy it again")
    for index, name in enumerate(sorted(entries)):
        if crc(tensors[name]) != digests[8 * index : 8 * index + 8]:
            raise InputError(f"{path}: {name} was edited or damaged: copy it again")
    layers = {}
    for planned in info.layers:
        codes = tensors.pop(join(planned.name, "codes"))
        codebook = tensors.pop(join(planned.name, "codebook")).float()
        exponent = info.exponents[planned.name]
        codebook = torch.ldexp(codebook, torch.tensor(exponent))
        if not bool(codebook.isfinite().all()):
            raise InputError(f"{path}: {join(planned.name, 'codebook')} holds NaN or infinity")
        unpacked = codes.long() if codes.ndim == 2 else unpack(codes, planned.bits, planned.blocks)
        if int(unpacked.max()) >= planned.codewords:
            raise InputError(
                f"{path}: {join(planned.name, 'codes')} points beyond its {planned.codewords} "
                "codewords"
            )
        rows = unpacked.reshape(planned.layout.rows, -1)
        layers[planned.name] = Quantised(planned.layout, rows, codebook, exponent)
    return info, layers, tensors


def read_header(path: Path) -> tuple[FileInfo, Entries, str]:
    """Read and check a file's header; also returns dtypes and shapes, and the digests."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
            length = int.from_bytes(start[:8], "little")
            if len(start) < 9 or start[8:] != b"{" or length > LONGEST_HEADER:
                raise InputError(
                    f"{path} is no safetensors file; pickled checkpoints are not opened here"
                )
            text = start[8:] + file.read(length - 1)
        data = path.stat().st_size - 8 - length
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) < length:
        raise InputError(f"{path} is truncated inside its header: copy it again")
    try:
        table = json.loads(text)
        fields = json.loads(table.pop("__metadata__")[KEY])
        if fields["version"] != VERSION:
            raise InputError(
                f"{path} has version {fields['version']!r} and this library reads {VERSION}: "
                "update it"
            )
        own = fields.pop("digest")
        known = {name: dtype for dtype, name in DTYPES.items()}
        entries = {n: (known[e["dtype"]], tuple(e["shape"])) for n, e in table.items()}
        ends = {name: entry["data_offsets"][1] for name, entry in table.items()}
        for name in sorted(ends, key=ends.__getitem__):
            if ends[name] > data:
                raise InputError(f"{path} is truncated: {name} is not whole; copy it again")
        if own != digest(fields, entries):
            raise InputError(f"{path}: its header was edited or damaged: copy it again")
        return _info(fields, entries, path.stat().st_size), entries, fields["digests"]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: its header is damaged, or another program wrote it ({type(error).__name__})"
        ) from error


def _info(fields: Mapping[str, Any], entries: Entries, total: int) -> FileInfo:
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in entries.items()}
    layers = []
    kept = dict(entries)
    codes = codebooks = 0
    for name, said in fields["layers"].items():
        layout = Layout(said["kind"], tuple(said["shape"]), said.get("groups", 1))
        planned = LayerPlan(name, layout, said["block"], said["codewords"])
        if layout.kind not in get_args(Kind) or layout.groups < 1 or min(layout.shape) < 1:
            raise InputError(f"{name}: {said} is no quantised layer")
        layout.check_block(planned.block, name)
        for key, entry in layer_entries(name, layout, planned.block, planned.codewords).items():
            if kept.pop(key, None) != entry:
                shape = entries.get(key, (None, "none"))[1]
                raise InputError(f"{key} should have shape {entry[1]} and has {shape}")
        layers.append(planned)
        codes += sizes[join(name, "codes")]
        codebooks += sizes[join(name, "codebook")]
    other = sum(sizes[name] for name in kept)
    header = total - codes - codebooks - other
    return FileInfo(
        architecture=dict(fields["architecture"]),
        layers=tuple(layers),
        kept={name: shape for name, (_, shape) in kept.items()},
        aliases=dict(fields.get("aliases", {})),
        folded=tuple(fields.get("folded", ())),
        exponents={n: int(said.get("exponent", 0)) for n, said in fields["layers"].items()},
        size=Size(codes, codebooks, other, header, int(fields["uncompressed"])),
        extra=dict(fields.get("extra", {})),
    )
