"""How a weight is cut into rows and blocks (arXiv 1907.05686, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from remanence.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["conv", "linear", "conv_transpose", "embedding"]
Clamp = Literal["paper", "official"]


@dataclass(frozen=True)
class Layout:
    """A weight seen as a matrix: a row per output, its blocks side by side.

    Attributes:
        kind: What multiplies the weight.
        shape: Shape of the weight as its module holds it.
        groups: Groups of a convolution.
    """

    kind: Kind
    shape: tuple[int, ...]
    groups: int = 1

    @property
    def rows(self) -> int:
        """Number of rows."""
        if self.kind == "conv_transpose":
            return self.groups * math.prod(self.shape[1:])
        return self.shape[0]

    @property
    def row_length(self) -> int:
        """Number of weights in a row."""
        if self.kind == "conv_transpose":
            return self.shape[0] // self.groups
        return math.prod(self.shape[1:])

    @property
    def taps(self) -> int:
        """Number of neighbouring weights of a row that share an input channel."""
        return math.prod(self.shape[2:]) if self.kind == "conv" else 1

    def to_rows(self, weight: Tensor) -> Tensor:
        """Flatten a weight.

        Args:
            weight: Weight of shape `shape`.

        Returns:
            Matrix (rows, row length). A convolution's row runs over input channel, then kernel
            position; a transposed convolution has a row for each group, output channel and kernel
            position.
        """
        if self.kind != "conv_transpose":
            return weight.reshape(self.rows, self.row_length)
        grouped = weight.reshape(self.groups, self.row_length, -1)  # (g, Ci/g, Co/g * taps)
        return grouped.transpose(1, 2).reshape(self.rows, self.row_length)

    def to_weight(self, rows: Tensor) -> Tensor:
        """Undo `to_rows`.

        Args:
            rows: Matrix (rows, row length).

        Returns:
            Weight of shape `shape`.
        """
        if self.kind != "conv_transpose":
            return rows.reshape(self.shape)
        grouped = rows.reshape(self.groups, -1, self.row_length)  # (g, Co/g * taps, Ci/g)
        return grouped.transpose(1, 2).reshape(self.shape)

    def check_block(self, block: int, name: str) -> None:
        """Refuse a block size that does not divide a row.

        Args:
            block: Weights in a block.
            name: The layer, for the message.

        Raises:
            InputError: It does not divide; the message lists those that do.
        """
        if block < 1 or self.row_length % block:
            legal = [d for d in range(1, min(self.row_length, 64) + 1) if not self.row_length % d]
            raise InputError(
                f"{name}: a row of {self.row_length} weights cannot be cut into blocks of {block}; "
                f"choose one of {', '.join(map(str, legal))}"
            )


def layout_of(module: nn.Module) -> Layout | None:
    """Return the layout of a module's weight; None where the module has none to quantise.

    Args:
        module: Any module; convolutions of one to three dimensions, their transposes, linear layers
            and embeddings have a layout.
    """
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return Layout("conv_transpose", tuple(module.weight.shape), module.groups)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Layout("conv", tuple(module.weight.shape), module.groups)
    if isinstance(module, nn.Linear):
        return Layout("linear", tuple(module.weight.shape))
    if isinstance(module, nn.Embedding):
        return Layout("embedding", tuple(module.weight.shape))
    return None


def codeword_count(requested: int, blocks: int, clamp: Clamp = "paper") -> int:
    """Return how many codewords a layer gets.

    At least four blocks share a codeword (section 4.1); the count is a power of two, so that an
    index fills its bits.

    Args:
        requested: Codewords asked for, a power of two from 2 to 65,536.
        blocks: Blocks of the layer.
        clamp: `paper` allows a quarter of the blocks; the released code (`official`) takes the
            largest power of two strictly below a quarter.

    Returns:
        Number of codewords, at least 1.

    Raises:
        InputError: The request is not such a power of two.
    """
    if not (2 <= requested <= 65_536 and requested & (requested - 1) == 0):
        raise InputError(
            f"{requested} codewords: give a power of two from 2 to 65536, for example 256"
        )
    most = blocks // 4 if clamp == "paper" else math.ceil(blocks / 4) - 1
    return min(requested, 1 << max(most.bit_length() - 1, 0))
