"""Predictors of the next K frames from the context so far (arXiv 2007.00991, Section 3).

A causal transformer layer without biases in its attention, normed after each residual sum. CPC2
shares one attention among all K steps; its feed-forward part has an output a step. CPC has a whole
layer for every step. Both also come with a mere matrix a step.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm, pad, scaled_dot_product_attention

from remanence.errors import InputError

Positions = Literal["relative", "rotary"]
ROTARY_BASE = 10_000.0


class MultiheadPredictor(nn.Module):
    """One transformer layer with an output for each step: CPC2.

    The attention's output is added to the output of every step; one norm serves all.

    Args:
        hidden: Width H.
        steps: Frames K to predict.
        heads: Heads of the attention; they divide H.
        ffn: Width of the feed-forward part.
        rate: Dropout on the attention's weights and inside the feed-forward part.
        positions: `relative`, learned for each distance (see `RelativePositions`), or `rotary`.
        distances: Distances 0 to distances - 1 that are learned, where relative.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        hidden: int,
        steps: int,
        *,
        heads: int = 8,
        ffn: int = 2048,
        rate: float = 0.1,
        positions: Positions = "relative",
        distances: int = 116,
    ) -> None:
        super().__init__()
        self.attention = Attention(1, hidden, heads, rate, positions, distances)
        self.attention_norm = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, ffn)
        self.contract = nn.Linear(ffn, steps * hidden)
        self.norm = nn.LayerNorm(hidden)
        self.steps, self.rate = steps, rate

    def forward(self, c: Tensor) -> Tensor:
        """Return predictions (B, W, K, H) from contexts (B, W, H), for any W."""
        y = self.attention_norm(c + self.attention(c).squeeze(2))
        out = dropout(self.expand(y).relu(), self.rate, self.training)
        out = self.contract(out).view(*c.shape[:2], self.steps, -1)
        predictions: Tensor = self.norm(y.unsqueeze(2) + out)
        return predictions


class SeparatePredictors(nn.Module):
    """K independent transformer layers, run as one: CPC. The arguments are `MultiheadPredictor`'s.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        hidden: int,
        steps: int,
        *,
        heads: int = 8,
        ffn: int = 2048,
        rate: float = 0.1,
        positions: Positions = "relative",
        distances: int = 116,
    ) -> None:
        super().__init__()
        self.attention = Attention(steps, hidden, heads, rate, positions, distances)
        self.attention_norm = _Norms(steps, hidden)
        self.expand = _Linears(steps, hidden, ffn)
        self.contract = _Linears(steps, ffn, hidden)
        self.norm = _Norms(steps, hidden)
        self.rate = rate

    def forward(self, c: Tensor) -> Tensor:
        """Return predictions (B, W, K, H) from contexts (B, W, H), for any W."""
        y = self.attention_norm(c.unsqueeze(2) + self.attention(c))
        out = dropout(self.expand(y).relu(), self.rate, self.training)
        predictions: Tensor = self.norm(y + self.contract(out))
        return predictions


class LinearPredictor(nn.Module):
    """A matrix for each step, without bias (arXiv 1807.03748)."""

    def __init__(self, hidden: int, steps: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, steps * hidden, bias=False)
        self.steps = steps

    def forward(self, c: Tensor) -> Tensor:
        """Return predictions (B, W, K, H) from contexts (B, W, H)."""
        predictions: Tensor = self.linear(c).unflatten(2, (self.steps, -1))
        return predictions


class Attention(nn.Module):
    """G causal self-attentions of the same inputs, without biases.

    Args:
        groups: Independent attentions G.
        hidden: Width H.
        heads: Heads of each; they divide H.
        rate: Dropout on the weights.
        positions: `relative` or `rotary`.
        distances: Learned distances, where relative.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        groups: int,
        hidden: int,
        heads: int,
        rate: float,
        positions: Positions,
        distances: int,
    ) -> None:
        super().__init__()
        if heads < 1 or hidden % heads:
            raise InputError(f"heads {heads} of width {hidden}: give a divisor of the width")
        if positions not in get_args(Positions):
            raise InputError(f"positions {positions!r}: give one of {get_args(Positions)}")
        size = hidden // heads
        self.qkv = nn.Linear(hidden, 3 * groups * hidden, bias=False)
        self.out = _Linears(groups, hidden, hidden, bias=False)
        self.relative = None
        if positions == "relative":
            self.relative = RelativePositions(groups, size, distances)
        elif size % 2:
            raise InputError(f"rotary positions of heads of size {size}: give an even size")
        self.groups, self.size, self.rate = groups, size, rate

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, W, G, H) from (B, W, H); position i sees 0 to i."""
        rate = self.rate if self.training else 0.0
        # (3, B, G heads, W, size)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, -1, self.size).permute(2, 0, 3, 1, 4)
        if self.relative is not None:
            bias = self.relative(q)
            y = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate)
        else:
            q, k = _rotate(q), _rotate(k)
            y = scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(*x.shape[:2], self.groups, -1))
        return out


class RelativePositions(nn.Module):
    """A learned vector for each distance back; its product with a query is added to the logit.

    The heads of a group share them. A position sees any distance: those beyond the learned ones
    use the furthest one's vector, so that a sequence of any length will do.

    Args:
        groups: Independent sets G.
        size: Size of a head.
        distances: Distances D that are learned, from 0 on: at most as many as positions trained on.
    """

    def __init__(self, groups: int, size: int, distances: int) -> None:
        super().__init__()
        if distances < 1:
            raise InputError(f"{distances} relative distances: give a window longer than the steps")
        # Column D - 1 - d serves distance d.
        self.table = nn.Parameter(torch.empty(groups, size, distances))
        nn.init.uniform_(self.table, -(size**-0.5), size**-0.5)

    def forward(self, q: Tensor) -> Tensor:
        """Return what to add to scaled logits (B, G heads, W, W) of queries (B, G heads, W, size).

        -inf where a position would see a later one.
        """
        groups, size, distances = self.table.shape
        batch, width = len(q), q.shape[2]
        table = self.table[:, :, max(distances - width, 0) :]
        if width > distances:
            table = torch.cat([table[:, :, :1].expand(-1, -1, width - distances), table], dim=2)
        products = q.reshape(batch, groups, -1, size) @ (table * size**-0.5)
        later = torch.ones(width, width, dtype=torch.bool, device=q.device).triu(1)
        return skew(products.view(batch, -1, width, width)).masked_fill(later, -torch.inf)


def skew(x: Tensor) -> Tensor:
    """Move column W-1-d of row i to column i-d, of (..., W, W); what is above is meaningless."""
    width = x.shape[-1]
    return pad(x, (1, 0)).flatten(-2)[..., width:].view(x.shape)


def _rotate(x: Tensor) -> Tensor:
    """Rotate pairs of (..., W, size) by angles that grow with the position (arXiv 2104.09864)."""
    width, half = x.shape[-2], x.shape[-1] // 2
    powers = torch.arange(half, device=x.device, dtype=torch.float32) / half
    at = torch.arange(width, device=x.device, dtype=torch.float32)
    angles = torch.outer(at, ROTARY_BASE**-powers)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class _Linears(nn.Module):
    """G linear maps, each of its own input: (B, W, G, inputs) to (B, W, G, outputs)."""

    def __init__(self, groups: int, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        bound = inputs**-0.5  # of nn.Linear's start
        self.weight = nn.Parameter(torch.empty(groups, outputs, inputs).uniform_(-bound, bound))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(groups, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bwgi,goi->bwgo", x, self.weight)
        return y if self.bias is None else y + self.bias


class _Norms(nn.Module):
    """G layer norms, of (B, W, G, H)."""

    def __init__(self, groups: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, hidden))
        self.bias = nn.Parameter(torch.zeros(groups, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:]) * self.weight + self.bias
