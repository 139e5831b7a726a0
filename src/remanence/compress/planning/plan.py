"""Which layers are quantised, and how finely (arXiv 1907.05686, section 4.1)."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from remanence.compress.layout import Clamp, Layout, codeword_count
from remanence.compress.network.layers import find_layers
from remanence.compress.planning.recipe import read_recipe
from remanence.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from remanence.compress.network.layers import Layer


def code_bits(codewords: int) -> int:
    """Return the bits that hold any index of a codebook."""
    return max((codewords - 1).bit_length(), 1)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantised.

    Attributes:
        name: Dotted path of the layer.
        layout: How its weight is cut into rows.
        block: Weights in a block (d).
        codewords: Codewords (K), a power of two from 2 to 65,536.
        note: Where the recipe could not be followed to the letter, what was done instead.
    """

    name: str
    layout: Layout
    block: int
    codewords: int
    note: str = ""

    @property
    def blocks(self) -> int:
        """Blocks of the weight (n), and so codes."""
        return self.layout.rows * self.layout.row_length // self.block

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return code_bits(self.codewords)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes, rounded up once for the layer."""
        return math.ceil(self.blocks * self.bits / 8)

    @property
    def codebook_bytes(self) -> int:
        """Bytes of the codebook in float16."""
        return 2 * self.codewords * self.block


@dataclass(frozen=True)
class Kept:
    """A layer that stays in float.

    Attributes:
        name: Dotted path of the layer.
        layout: How its weight would be cut into rows.
        reason: Why it stays.
    """

    name: str
    layout: Layout
    reason: str


@dataclass(frozen=True)
class Plan:
    """How every layer of a network is stored; each layer is in one of the two tuples.

    Attributes:
        layers: Layers that are quantised, in the order of the network's modules.
        kept: Layers that stay in float.
    """

    layers: tuple[LayerPlan, ...]
    kept: tuple[Kept, ...] = ()

    def table(self) -> list[dict[str, str | int | float]]:
        """Return a row for each layer: what it is, how it is stored, in how many bytes.

        A kept layer is counted in float16; `bits_per_weight` includes the codebook.
        """
        rows: list[dict[str, str | int | float]] = []
        for layer in self.layers:
            stored = layer.code_bytes + layer.codebook_bytes
            rows.append(_row(layer, stored, layer.block, layer.codewords, layer.note))
        rows += [_row(kept, 2 * _weights(kept.layout), 0, 0, kept.reason) for kept in self.kept]
        return rows

    def recipe(self) -> dict[str, Any]:
        """Return the recipe that gives this plan again, as a mapping of plain values."""
        rules: dict[str, Any] = {kept.name: "keep" for kept in self.kept}
        for layer in self.layers:
            channels = layer.block // layer.layout.taps
            rules[layer.name] = {"channels": channels, "codewords": layer.codewords}
        return {"base": "small", "layers": rules}


def plan(
    model: nn.Module,
    recipe: str | Mapping[str, Any] = "small",
    *,
    keep: Sequence[str] = (),
    clamp: Clamp = "paper",
) -> Plan:
    """Plan a network's compression from its layers' shapes alone; no data, no values.

    The first convolution and the head are what timm's `pretrained_cfg` names, else the first
    convolution and the last linear layer of `model.modules()`. Where the channels that a rule asks
    for do not divide a row they are halved until they do, and an odd row gets its nearest divisor.

    Args:
        model: A float network; it may live on the `meta` device.
        recipe: A name of `RECIPES`, or a mapping, see `recipe`.
        keep: Layers, or modules with all layers under them, that stay in float: names, or regular
            expressions after `re:` that match whole names.
        clamp: How the number of codewords is bounded, see `codeword_count`.

    Returns:
        The plan. A layer stays in float, with the reason, where it is too small for two codewords
        or would be no smaller than in float16.

    Raises:
        InputError: The recipe or a name in it is unknown, or there is nothing to quantise.
    """
    if clamp not in get_args(Clamp):
        raise InputError(f"clamp {clamp!r} is unknown: give one of {', '.join(get_args(Clamp))}")
    roles, overrides = read_recipe(recipe)
    layers = find_layers(model)
    if not layers:
        raise InputError("the network has no convolution, linear layer or embedding to quantise")
    first, heads = _first_and_heads(model, layers)

    rules: dict[str, Any] = {}
    for name, layer in layers.items():
        role = _role(name, layer.layout, first, heads)
        rules[name] = "keep: " + role if roles[role] == "keep" else roles[role]
    for pattern, rule in overrides.items():
        for name in matching(pattern, layers):
            plain = {"channels": 4, "codewords": 256}
            before = rules[name] if isinstance(rules[name], Mapping) else plain
            rules[name] = "keep: recipe" if rule == "keep" else {**before, **rule}
    for pattern in keep:
        rules |= dict.fromkeys(matching(pattern, layers), "keep: asked for")

    planned: list[LayerPlan] = []
    kept: list[Kept] = []
    for name, layer in layers.items():
        if isinstance(rules[name], str):
            kept.append(Kept(name, layer.layout, rules[name].removeprefix("keep: ")))
            continue
        made = plan_layer(name, layer.layout, **rules[name], clamp=clamp)
        planned.append(made) if isinstance(made, LayerPlan) else kept.append(made)
    if not planned:
        raise InputError("the plan keeps every layer: nothing would be quantised")
    return Plan(tuple(planned), tuple(kept))


def plan_layer(
    name: str, layout: Layout, channels: int, codewords: int, clamp: Clamp = "paper"
) -> LayerPlan | Kept:
    """Fit one rule to one layer.

    Args:
        name: Dotted path of the layer.
        layout: How its weight is cut into rows.
        channels: Input channels that a block should hold.
        codewords: Codewords that it should have, a power of two.
        clamp: See `codeword_count`.

    Returns:
        The layer's plan, or why it stays in float.
    """
    fitting = _divisor(channels, layout.row_length // layout.taps, layout.taps)
    note = "" if fitting == channels else f"{channels} channels a block do not divide the row"
    block = fitting * layout.taps
    blocks = _weights(layout) // block
    made = LayerPlan(name, layout, block, codeword_count(codewords, blocks, clamp), note)
    if made.codewords < 2:
        return Kept(name, layout, f"{blocks} blocks are too few for two codewords")
    if made.code_bytes + made.codebook_bytes >= 2 * _weights(layout):
        return Kept(name, layout, "no smaller than in float16")
    return made


def matching(pattern: str, layers: Mapping[str, Any]) -> list[str]:
    """Return the layers that a name (its own, or a module's above it) or a `re:` pattern means.

    Raises:
        InputError: The pattern is no regular expression, or no layer is meant.
    """
    if pattern.startswith("re:"):
        try:
            found = [name for name in layers if re.fullmatch(pattern[3:], name)]
        except re.error as error:
            raise InputError(f"{pattern!r} is not a regular expression: {error}") from error
    else:
        found = [name for name in layers if name == pattern or name.startswith(pattern + ".")]
    if not found:
        near = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.3) or list(layers)[:3]
        raise InputError(f"no layer is called {pattern!r}; there are {', '.join(near)}")
    return found


def _first_and_heads(model: nn.Module, layers: Mapping[str, Layer]) -> tuple[str, set[str]]:
    """Return the first convolution (or "") and the classifiers."""
    named = getattr(model, "pretrained_cfg", None) or {}
    first = _under(named.get("first_conv"), layers)
    heads = _under(named.get("classifier"), layers)
    if not first:
        first = [name for name, layer in layers.items() if layer.layout.kind == "conv"]
    if not heads and not named.get("classifier"):
        heads = [name for name, layer in layers.items() if layer.layout.kind == "linear"][-1:]
    return next(iter(first), ""), set(heads)


def _under(names: str | Sequence[str] | None, layers: Mapping[str, Layer]) -> list[str]:
    tops = (names,) if isinstance(names, str) else tuple(names or ())
    return [
        name for name in layers if any(name == top or name.startswith(top + ".") for top in tops)
    ]


def _role(name: str, layout: Layout, first: str, heads: set[str]) -> str:
    if name == first:
        return "first"
    if name in heads:
        return "head"
    if layout.groups > 1 and layout.row_length == layout.taps:
        return "depthwise"
    if layout.kind == "conv":
        return "spatial" if layout.taps > 1 else "pointwise"
    return "transposed" if layout.kind == "conv_transpose" else layout.kind


def _divisor(wanted: int, channels: int, taps: int) -> int:
    halved = wanted
    while channels % halved:
        halved //= 2
    if halved > 1 or wanted == 1 or taps > 1:
        return halved
    legal = [c for c in range(2, 2 * wanted + 1) if channels % c == 0]
    return min(legal, key=lambda c: (abs(c - wanted), c), default=1)


def _weights(layout: Layout) -> int:
    return math.prod(layout.shape)


def _row(
    layer: LayerPlan | Kept, stored: int, block: int, codewords: int, note: str
) -> dict[str, str | int | float]:
    return {
        "layer": layer.name,
        "kind": layer.layout.kind,
        "shape": "x".join(map(str, layer.layout.shape)),
        "groups": layer.layout.groups,
        "block": block,
        "codewords": codewords,
        "bytes": stored,
        "bits_per_weight": 8 * stored / _weights(layer.layout),
        "note": note,
    }
