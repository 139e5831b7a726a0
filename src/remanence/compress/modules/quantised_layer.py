"""The part that all quantised modules have: codes, a codebook, and when they are decoded."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

from remanence.compress.modules import lookup
from remanence.compress.quantised import Quantised

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from remanence.compress.layout import Layout

Mode = Literal["dense", "lazy", "lookup"]


class QuantisedLayer(nn.Module):
    """A weight as codes and a codebook; what multiplies it is left to the subclass.

    Attributes:
        codes: Buffer (rows, blocks a row): uint8, or int32 where there are more than 256 codewords.
        codebook: Parameter (K, d). Its gradient is the sum over the blocks that share a codeword.
        layout: How the weight is cut into rows.
        mode: `dense` keeps the decoded weight while no gradient is asked for, `lazy` decodes at
            each use, `lookup` sums table entries in `forward` and decodes only where something else
            reads `weight`. In training every mode decodes at each use.
        kept: What is kept for speed; tied modules share it.
    """

    codes: Tensor
    codebook: Tensor
    layout: Layout
    mode: Mode
    kept: Kept

    @property
    def weight(self) -> Tensor:
        """The decoded weight, in the float module's shape.

        It follows the codebook, except changes made behind autograd's back (`codebook.data`) in
        `dense` mode; `train()` and `eval()` make it read anew.
        """
        asked = torch.is_grad_enabled() and self.codebook.requires_grad
        # functional_call puts plain tensors, perhaps wrapped, in the place of the Parameter.
        own = isinstance(self.codebook, nn.Parameter)
        compiling = torch.compiler.is_compiling()
        if self.mode != "dense" or self.training or asked or not own or compiling:
            return self.decode()
        stamp = (*_version(self.codebook), *_version(self.codes))
        if self.kept.dense is None or self.kept.dense[0] != stamp:
            self.kept.dense = None  # before the next is built, so that only one is held
            with torch.inference_mode(mode=False), torch.no_grad():
                self.kept.dense = (stamp, self.decode())
        return self.kept.dense[1]

    def decode(self) -> Tensor:
        """Decode the weight, whatever the mode."""
        # F.embedding, since its gradient is the same whatever the number of threads.
        rows = F.embedding(self.codes.int(), self.codebook)
        return self.layout.to_weight(rows.reshape(self.layout.rows, self.layout.row_length))

    def quantised(self) -> Quantised:
        """Return codes and codebook as they are now, detached.

        The codebook is float32, as trained: it is rounded to float16 only when it is stored.
        """
        return Quantised(self.layout, self.codes.long(), self.codebook.detach().float())

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation; the kept weight is dropped."""
        self.kept.dense = None
        return super().train(mode)

    def lookup_refusal(self) -> str | None:
        """Why `lookup` mode does not apply to this layer; None where it does."""
        return "it has no product of its own"

    def looks_up(self, x: Tensor) -> bool:
        """Whether this forward may sum table entries: in inference, in float32."""
        if self.mode != "lookup" or self.training or torch.compiler.is_compiling():
            return False
        tensors = [x, *self.parameters(recurse=False)]
        recording = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        floats = [t.dtype for t in tensors if t.is_floating_point()]
        return (
            x.numel() > 0
            and not recording
            and all(dtype == torch.float32 for dtype in floats)
            and not torch.is_autocast_enabled(x.device.type)
            and self.lookup_refusal() is None
        )

    def bags(self) -> lookup.Bags:
        """Return the table entries of each row, kept while the codes stay what they are."""
        stamp = _version(self.codes)
        if self.kept.bags is None or self.kept.bags[0] != stamp:
            found = lookup.bags(self.codes, len(self.codebook), self.layout.groups)
            self.kept.bags = (stamp, found)
        return self.kept.bags[1]

    def drop_kept(self) -> None:
        """Drop what is kept for speed: the decoded weight and the table entries."""
        self.kept.dense = self.kept.bags = None

    def kept_bytes(self) -> int:
        """Return the memory of what is kept for speed."""
        dense, entries = self.kept.dense, self.kept.bags
        return (dense[1].nbytes if dense else 0) + (entries[1].nbytes if entries else 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.drop_kept()
        before = self.codes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        self.codes = self.kept.moved(before, self.codes)
        return self


class Kept:
    """What tied modules share beside codes and codebook; copies start empty."""

    def __init__(self) -> None:
        self.dense: tuple[tuple[int, ...], Tensor] | None = None
        self.bags: tuple[tuple[int, ...], lookup.Bags] | None = None
        self._move: tuple[weakref.ref[Tensor], Tensor] | None = None

    def moved(self, before: Tensor, after: Tensor) -> Tensor:
        """Keep the codes of tied modules one tensor: torch moves a buffer once for each owner."""
        if self._move is not None:
            source, result = self._move
            if source() is before and result.device == after.device:
                return result
        self._move = (weakref.ref(before), after)
        return after

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()


def _version(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies and how often it was changed in place."""
    changes = 0 if tensor.is_inference() else tensor._version  # noqa: SLF001  # no public name
    return tensor.data_ptr(), changes
