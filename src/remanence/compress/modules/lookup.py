"""Products with a quantised weight that is never decoded (Vec-LUT's layout, arXiv 2512.06443).

A row of the weight is a list of codewords, so its product with an input is a sum of entries of one
table: every codeword times every block of the input. The table holds a line of positions for each
(block, codeword), hence each entry added is a contiguous vector. For a row of R weights in blocks
of d, a position costs K R multiplications for the table and Co R / d additions, against Co R for
the weight itself: this pays where there are many more rows than codewords.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

TABLE_BYTES = 1024 * 1024
"""Size of a table: a common second-level cache."""
TILE = 64
"""Positions of a table: four cache lines, so that many blocks share a pass."""


@dataclass(frozen=True)
class Bags:
    """Which entries of the table a row sums.

    Attributes:
        passes: For each pass over a few of the blocks (rows, blocks of the pass), int32: the entry
            of a block's codeword, counted from the first block of the pass.
        groups: Groups of rows; each has a table of its own.
    """

    passes: tuple[Tensor, ...]
    groups: int

    @property
    def nbytes(self) -> int:
        """Memory of the entries."""
        return sum(entries.nbytes for entries in self.passes)


def bags(codes: Tensor, codewords: int, groups: int = 1) -> Bags:
    """Cut codes into passes whose table fits the cache.

    Args:
        codes: (rows, blocks a row), integers.
        codewords: Number of codewords K.
        groups: Groups of rows.
    """
    blocks = max(1, TABLE_BYTES // (4 * codewords * TILE))
    passes = tuple(
        (part.int() + codewords * torch.arange(part.shape[1], device=codes.device)).int()
        for part in torch.split(codes, blocks, dim=1)
    )
    return Bags(passes, groups)


def look_up(inputs: Tensor, bags: Bags, codebook: Tensor) -> Tensor:
    """Multiply a quantised matrix by columns; no gradient is recorded.

    Memory beside input and output is one table, whatever their size.

    Args:
        inputs: (groups, row length, positions), float32, any strides.
        bags: The codes of the matrix.
        codebook: (K, d), float32.

    Returns:
        (rows, positions); row o is the sum over blocks b of `codebook[codes[o, b]]` times block b
        of the columns of its group.
    """
    groups, length, positions = inputs.shape
    count, size = codebook.shape
    out = inputs.new_empty(groups, bags.passes[0].shape[0] // groups, positions)
    blocks = bags.passes[0].shape[1]
    store = inputs.new_empty(blocks * count * min(TILE, positions))
    for group, columns in enumerate(inputs):
        mine = [entries.chunk(groups)[group] for entries in bags.passes]
        for at in range(0, positions, TILE):
            into, tile = out[group, :, at : at + TILE], columns[:, at : at + TILE]
            start, width = 0, tile.shape[1]
            parts = tile.reshape(length // size, size, width)
            for entries in mine:
                taken = entries.shape[1]
                table = store[: taken * count * width].view(taken, count, width)
                part = parts[start : start + taken]
                torch.bmm(codebook.expand(taken, count, size), part, out=table)
                summed = F.embedding_bag(entries, table.flatten(0, 1), mode="sum")
                (into.add_ if start else into.copy_)(summed)
                start += taken
    return out.flatten(0, 1)


def linear(x: Tensor, bags: Bags, codebook: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer.

    Args:
        x: (..., features).
        bags: The codes of its weight.
        codebook: (K, d).
        bias: (rows,), or None.

    Returns:
        (..., rows).
    """
    columns = x.reshape(-1, x.shape[-1]).t()
    out = look_up(columns[None], bags, codebook).t()
    if bias is not None:
        out = out + bias
    return out.reshape(*x.shape[:-1], -1)


def convolution(
    x: Tensor,
    bags: Bags,
    codebook: Tensor,
    bias: Tensor | None,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Apply a convolution of one to three dimensions.

    Args:
        x: Padded input (N, Ci, ...).
        bags: The codes of its weight.
        codebook: (K, d).
        bias: (Co,), or None.
        kernel_size: Of each dimension.
        stride: Likewise.
        dilation: Likewise.

    Returns:
        (N, Co, ...).
    """
    x = x.contiguous()
    steps = x.stride()[2:]
    sides = [
        (size - gap * (taps - 1) - 1) // step + 1
        for size, taps, step, gap in zip(x.shape[2:], kernel_size, stride, dilation, strict=True)
    ]
    windows = x.as_strided(
        (*x.shape[:2], *kernel_size, *sides),
        (
            *x.stride()[:2],
            *(step * gap for step, gap in zip(steps, dilation, strict=True)),
            *(step * by for step, by in zip(steps, stride, strict=True)),
        ),
    )
    # Columns of one image at a time, so that memory is bounded. Where a block is one channel's
    # taps, the table is also a bank of K filters on that channel, but torch convolves a single
    # channel more slowly than it multiplies columns.
    images = [
        look_up(image.reshape(bags.groups, -1, math.prod(sides)), bags, codebook)
        for image in windows
    ]
    out = torch.stack(images).reshape(len(x), -1, *sides)
    return out if bias is None else out + bias.reshape(-1, *(1 for _ in sides))


def embedding(tokens: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    """Decode the rows of some tokens.

    Args:
        tokens: Any shape, integers.
        codes: (V, blocks a row).
        codebook: (K, d).

    Returns:
        (*tokens' shape, row length).
    """
    return F.embedding(codes[tokens].int(), codebook).flatten(-2)
