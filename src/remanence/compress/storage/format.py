"""How the file of a quantised network is laid out: names, dtypes, metadata, digests.

It is a safetensors file. Beside its tensors it holds one text, JSON under the key
`remanence.compress`.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import TYPE_CHECKING, Any

import torch

from remanence.compress.planning.plan import code_bits
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from remanence.compress.layout import Layout

VERSION = 1
KEY = "remanence.compress"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}

Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of each tensor


def join(path: str, leaf: str) -> str:
    """Return the name of a tensor of a module; the network itself has the path ""."""
    return f"{path}.{leaf}" if path else leaf


def layer_entries(name: str, layout: Layout, block: int, codewords: int) -> Entries:
    """Return the two tensors of a quantised layer: 256 codewords are bytes, others a bit stream."""
    blocks = layout.row_length // block
    bits = code_bits(codewords)
    packed = math.ceil(layout.rows * blocks * bits / 8)
    return {
        join(name, "codes"): (torch.uint8, (layout.rows, blocks) if bits == 8 else (packed,)),
        join(name, "codebook"): (torch.float16, (codewords, block)),
    }


def record(layout: Layout, block: int, codewords: int, exponent: int = 0) -> dict[str, Any]:
    """Return what the file's metadata say of a quantised layer."""
    made: dict[str, Any] = {"kind": layout.kind, "shape": list(layout.shape)}
    made |= {"groups": layout.groups} if layout.groups != 1 else {}
    made |= {"block": block, "codewords": codewords}
    return made | ({"exponent": exponent} if exponent else {})


def metadata(
    entries: Entries,
    *,
    architecture: Mapping[str, Any],
    extra: Mapping[str, Any],
    layers: Mapping[str, Any],
    aliases: Mapping[str, str],
    folded: list[str],
    uncompressed: int,
    digests: str,
) -> str:
    """Return the metadata of a file as JSON, with a digest of itself and of the tensors' table.

    Args:
        entries: Dtype and shape of each tensor.
        architecture: How to build the network, in words that JSON can hold.
        extra: Anything else that JSON can hold.
        layers: `record` of each quantised layer.
        aliases: Further names of tensors and layers that are stored once.
        folded: Batch norms whose statistics are folded.
        uncompressed: Bytes of the parameters in float32.
        digests: CRC-32 of each tensor in hexadecimal, in the order of the names.

    Raises:
        InputError: `architecture` or `extra` holds what JSON cannot.
    """
    fields: dict[str, Any] = {
        "version": VERSION,
        "architecture": architecture,
        "uncompressed": uncompressed,
        "layers": layers,
        "digests": digests,
    }
    fields |= {"aliases": aliases} if aliases else {}
    fields |= {"folded": folded} if folded else {}
    fields |= {"extra": extra} if extra else {}
    try:
        fields = json.loads(dumps(fields))
    except (TypeError, ValueError) as error:
        raise InputError(f"architecture and extra must be plain JSON values: {error}") from error
    return dumps(fields | {"digest": digest(fields, entries)})


def digest(fields: Mapping[str, Any], entries: Entries) -> str:
    """Return the CRC-32 of metadata (without their own digest) and of the tensors' table."""
    table = {name: [DTYPES[dtype], list(shape)] for name, (dtype, shape) in entries.items()}
    return f"{zlib.crc32(dumps([fields, table]).encode()):08x}"


def crc(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, eight hexadecimal digits."""
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}"


def dumps(value: object) -> str:
    """Return JSON without spaces, keys sorted, so that equal values are equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def header_bytes(entries: Entries, text: str) -> int:
    """Return the length of a safetensors header, with the eight bytes that hold its length.

    Args:
        entries: Dtype and shape of each tensor.
        text: The metadata.
    """
    table: dict[str, Any] = {"__metadata__": {KEY: text}}
    start = 0
    # The format's own order: the widest elements first, then by name.
    for name, (dtype, shape) in sorted(entries.items(), key=lambda e: (-e[1][0].itemsize, e[0])):
        end = start + dtype.itemsize * math.prod(shape)
        table[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    length = len(json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + math.ceil(length / 8) * 8
