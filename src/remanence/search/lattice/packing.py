"""Codes without the bits that fill up their last byte, for storage."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.errors import InputError

CHUNK = 2**16  # codes at a time; of any number of bits, they fill whole bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Join codes to a stream of bits, the lowest bit first.

    Args:
        codes: (n, ceil(bits / 8)), uint8, the lowest byte first.
        bits: Bits of a code; those above must be 0.

    Returns:
        Stream (ceil(n * bits / 8),), uint8.

    Raises:
        InputError: The shape or type does not match.
    """
    if codes.ndim != 2 or codes.shape[1] != -(-bits // 8) or codes.dtype != torch.uint8:
        raise InputError(f"codes {codes.dtype} {tuple(codes.shape)} are none of {bits} bits")
    parts = [
        _bytes(_bits(codes[start : start + CHUNK])[:, :bits].flatten())
        for start in range(0, len(codes), CHUNK)
    ]
    return torch.cat([codes.new_zeros(0), *parts])


def unpack(stream: Tensor, n: int, bits: int) -> Tensor:
    """Return the n codes (n, ceil(bits / 8)), uint8, that `pack` joined.

    Raises:
        InputError: The stream is not as long as n codes.
    """
    if stream.ndim != 1 or stream.dtype != torch.uint8 or len(stream) != -(-n * bits // 8):
        raise InputError(
            f"a stream of {tuple(stream.shape)} does not hold {n} codes of {bits} bits"
        )
    codes = stream.new_zeros(n, -(-bits // 8))
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        part = _bits(stream[start * bits // 8 : -(-stop * bits // 8)].unsqueeze(1)).flatten()
        rows = part[: (stop - start) * bits].view(-1, bits)
        whole = rows.new_zeros(len(rows), 8 * codes.shape[1])
        whole[:, :bits] = rows
        codes[start:stop] = _bytes(whole.flatten()).view(len(rows), -1)
    return codes


def _bits(values: Tensor) -> Tensor:
    """Return the bits (n, 8 k) of bytes (n, k), the lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=values.device)
    return ((values.unsqueeze(2) >> shifts) & 1).flatten(1)


def _bytes(bits: Tensor) -> Tensor:
    """Join bits, the lowest first; zeros fill up the last byte."""
    whole = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (whole << shifts).sum(1, dtype=torch.uint8)
