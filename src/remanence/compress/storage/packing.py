"""Codes as a stream of bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError

CHUNK = 2**18  # codes unfolded into bits at a time; a multiple of 8, so that a chunk ends a byte


def pack(codes: Tensor, bits: int) -> Tensor:
    """Write codes one after another, `bits` bits each, lowest bit first.

    Bit i of the stream is bit i % 8 of byte i // 8; the last byte is filled up with zeros. For 8
    bits the stream is the codes as bytes.

    Args:
        codes: Integers of any shape, from 0 to 2**bits - 1; read in row-major order.
        bits: From 1 to 16.

    Returns:
        Bytes (ceil(codes * bits / 8),), uint8, on the processor.

    Raises:
        InputError: `bits` is out of range, or a code does not fit.
    """
    _check_bits(bits)
    flat = codes.detach().cpu().flatten().numpy()
    if flat.size and not (flat.min() >= 0 and flat.max() < 1 << bits):
        raise InputError(f"codes from {flat.min()} to {flat.max()} do not fit {bits} bits")
    parts = [np.empty(0, np.uint8)]
    for start in range(0, flat.size, CHUNK):
        pairs = flat[start : start + CHUNK].astype("<u2").view(np.uint8).reshape(-1, 2)
        unfolded = np.unpackbits(pairs, axis=1, count=bits, bitorder="little")
        parts.append(np.packbits(unfolded, bitorder="little"))
    return torch.from_numpy(np.concatenate(parts))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: Bytes (ceil(count * bits / 8),), uint8.
        bits: From 1 to 16.
        count: Number of codes.

    Returns:
        Codes (count,), int64, on the processor.

    Raises:
        InputError: `bits` is out of range, or the stream is not bytes of that length.
    """
    _check_bits(bits)
    size = (count * bits + 7) // 8
    if count < 0 or packed.dtype != torch.uint8 or packed.shape != (size,):
        raise InputError(
            f"{count} codes of {bits} bits fill {size} bytes; there are "
            f"{tuple(packed.shape)} of {packed.dtype}"
        )
    stream = packed.detach().cpu().numpy()
    codes = np.empty(count, np.int64)
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        chunk = stream[start * bits // 8 : (stop * bits + 7) // 8]
        unfolded = np.unpackbits(chunk, count=(stop - start) * bits, bitorder="little")
        pairs = np.packbits(unfolded.reshape(-1, bits), axis=1, bitorder="little")
        if bits <= 8:
            codes[start:stop] = pairs[:, 0]
        else:
            codes[start:stop] = pairs.view("<u2")[:, 0]
    return torch.from_numpy(codes)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise InputError(f"{bits} bits a code: give 1 to 16")
