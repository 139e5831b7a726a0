"""A weight as codes and a codebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from remanence.compress.layout import Layout


@dataclass(frozen=True)
class Quantised:
    """A product-quantised weight (arXiv 1907.05686, section 3.1).

    Attributes:
        layout: How the weight is cut into rows.
        codes: Index of each block's codeword (rows, blocks a row), int64.
        codebook: Codewords (K, d), float32; after `exponent` is taken out, every value is one that
            float16 holds.
        exponent: The codebook is stored as `codebook * 2**-exponent` in float16: not zero only
            where the weights leave float16's range.
    """

    layout: Layout
    codes: Tensor
    codebook: Tensor
    exponent: int = 0

    def rows(self) -> Tensor:
        """Return the decoded rows (rows, row length), float32."""
        return self.codebook[self.codes].reshape(self.layout.rows, self.layout.row_length)

    def weight(self) -> Tensor:
        """Return the decoded weight in its module's shape, float32."""
        return self.layout.to_weight(self.rows())
