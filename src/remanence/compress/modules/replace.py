"""Modules whose weight is codes and a codebook, and otherwise torch's own.

A float module becomes a quantised one in place, by a change of its class (as torch's
parametrizations do): all references to it, its hooks and its attributes stay what they were.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it
from torch.nn.parameter import UninitializedParameter

from remanence.compress.layout import Layout, layout_of
from remanence.compress.modules import lookup
from remanence.compress.modules.quantised_layer import Kept, QuantisedLayer
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from remanence.compress.quantised import Quantised


class _PQConv(QuantisedLayer):
    """A convolution: forward, padding and attributes are torch's."""

    def lookup_refusal(self) -> str | None:
        if self.layout.kind != "conv":
            return "its codes run along the rows of a transposed convolution"
        return _own_forward(self)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        if not self.looks_up(input):
            out: Tensor = super().forward(input)
            return out
        conv: Any = self  # an nn.ConvNd as well, which a mixin cannot say
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        batch = input if input.dim() == len(self.layout.shape) else input[None]
        out = lookup.convolution(
            F.pad(batch, conv._reversed_padding_repeated_twice, mode=mode),  # noqa: SLF001  # ours
            self.bags(),
            self.codebook,
            conv.bias,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            dilation=conv.dilation,
        )
        return out if batch is input else out[0]


class _PQConvTranspose(QuantisedLayer):
    """A transposed convolution."""

    def lookup_refusal(self) -> str | None:
        return "a transposed convolution scatters its products"


class PQConv1d(_PQConv, nn.Conv1d):  # type: ignore[override]  # `weight` is a property here
    """`nn.Conv1d` with a quantised weight."""


class PQConv2d(_PQConv, nn.Conv2d):  # type: ignore[override]  # likewise
    """`nn.Conv2d` with a quantised weight."""


class PQConv3d(_PQConv, nn.Conv3d):  # type: ignore[override]  # likewise
    """`nn.Conv3d` with a quantised weight."""


class PQConvTranspose1d(_PQConvTranspose, nn.ConvTranspose1d):  # type: ignore[override]  # likewise
    """`nn.ConvTranspose1d` with a quantised weight."""


class PQConvTranspose2d(_PQConvTranspose, nn.ConvTranspose2d):  # type: ignore[override]  # likewise
    """`nn.ConvTranspose2d` with a quantised weight."""


class PQConvTranspose3d(_PQConvTranspose, nn.ConvTranspose3d):  # type: ignore[override]  # likewise
    """`nn.ConvTranspose3d` with a quantised weight."""


class PQLinear(QuantisedLayer, nn.Linear):  # type: ignore[override]  # likewise
    """`nn.Linear` with a quantised weight."""

    def lookup_refusal(self) -> str | None:
        """Return why `lookup` mode does not apply; None where it does."""
        return _own_forward(self)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        """Apply the layer to (..., features)."""
        if self.looks_up(input):
            return lookup.linear(input, self.bags(), self.codebook, self.bias)
        return super().forward(input)


class PQEmbedding(QuantisedLayer, nn.Embedding):  # type: ignore[override]  # likewise
    """`nn.Embedding` with a quantised weight."""

    def lookup_refusal(self) -> str | None:
        """Return why `lookup` mode does not apply; None where it does."""
        if self.max_norm is not None:
            return "it renormalises its weight (max_norm)"
        return _own_forward(self)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        """Return the rows of tokens, integers of any shape."""
        if self.looks_up(input):
            return lookup.embedding(input, self.codes, self.codebook)
        return super().forward(input)


class PQMatrix(QuantisedLayer):
    """A quantised matrix by itself: `weight` is all there is of it."""

    def forward(self) -> Tensor:
        """Return the decoded matrix."""
        return self.weight


class PQMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with a quantised packed projection, the `PQMatrix` `in_proj`.

    Torch reads `in_proj_weight` several times in a forward; it is decoded once.
    """

    in_proj: PQMatrix
    held: Tensor | None

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]  # a Parameter in the float class
        """The decoded projection (3 E, E)."""
        held = self.held
        return self.in_proj.weight if held is None else held

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend, as `nn.MultiheadAttention` does."""
        self.held = self.in_proj.weight
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.held = None


def _float_class(quantised: type[nn.Module]) -> type[nn.Module]:
    """The class that a quantised class stands for: the last of its bases."""
    return quantised.__bases__[-1]


def _own_forward(layer: QuantisedLayer) -> str | None:
    """Refuse a subclass of torch's layers that computes something else."""
    kind = _float_class(type(layer))
    torch_kind = next(base for base in kind.__mro__ if base.__module__.startswith("torch.nn."))
    for name in ("forward", "_conv_forward"):
        if getattr(kind, name, None) is not getattr(torch_kind, name, None):
            return f"{kind.__name__} has a forward of its own"
    return None


_TWINS: dict[type, type[nn.Module]] = {
    _float_class(kind): kind
    for kind in (
        PQConv1d,
        PQConv2d,
        PQConv3d,
        PQConvTranspose1d,
        PQConvTranspose2d,
        PQConvTranspose3d,
        PQLinear,
        PQEmbedding,
        PQMultiheadAttention,
    )
}


def _quantised_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The quantised twin of a float class; of a subclass, one that keeps the subclass's forward."""
    if kind not in _TWINS:
        twin = next(_TWINS[parent] for parent in kind.__mro__ if parent in _TWINS)
        _TWINS[kind] = type(f"PQ{kind.__name__}", (twin, kind), {})
    return _TWINS[kind]


def replace_layers(model: nn.Module, layers: Mapping[str, Quantised]) -> nn.Module:
    """Turn float layers into quantised ones, in place.

    All modules that share a weight become quantised with it and share codes and codebook.

    Args:
        model: Any network; it is changed.
        layers: Name of a layer -> its weight. The packed projection of an `nn.MultiheadAttention`
            at P is the layer `P.in_proj`.

    Returns:
        The same network; new layers are in `dense` mode, codebooks in the dtype and on the device
        of the weight they replace.

    Raises:
        InputError: A name is no float layer, or its weight has another shape or is shared with
            something that is no layer, or codes are out of range. Nothing is changed then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((path, module, key))
    found: dict[int, tuple[str, nn.Parameter, Quantised]] = {}
    for name, quantised in layers.items():
        weight = _weight_of(modules, name, quantised.layout)
        _check(quantised, name)
        for path, module, key in owners[id(weight)]:
            if not _is_layer_weight(module, key):
                raise InputError(f"{name} shares its weight with {path}.{key}; keep it float")
        first, _, other = found.setdefault(id(weight), (name, weight, quantised))
        same = other is quantised or (
            torch.equal(other.codes, quantised.codes)
            and torch.equal(other.codebook, quantised.codebook)
        )
        if not same:
            raise InputError(f"{first} and {name} share one weight: give codes for one of them")
    for key_, (_, weight, quantised) in found.items():
        device = quantised.codebook.device if weight.is_meta else weight.device
        codebook = nn.Parameter(
            quantised.codebook.detach().to(device, weight.dtype, copy=True),
            requires_grad=weight.requires_grad,
        )
        dtype = torch.uint8 if len(codebook) <= 256 else torch.int32
        codes = quantised.codes.to(device, dtype, copy=True)
        kept = Kept()
        for _, module, key in owners[key_]:
            _quantise(module, key, (quantised.layout, codes, codebook, kept))
    return model


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLayer]:
    """Return the quantised layers by name, in the order of `named_modules`."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLayer)}


def float_copy(model: nn.Module) -> nn.Module:
    """Return a copy of plain float modules with the decoded weights.

    Args:
        model: A network with quantised layers, or none; it is left as it is.

    Returns:
        The copy, of the classes that the network had before it was quantised; ties are kept. This
        is what to give to `torch.compile` for dense speed: under it a quantised layer decodes at
        each call.
    """
    model = copy.deepcopy(model)
    weights: dict[int, nn.Parameter] = {}

    def weight(layer: QuantisedLayer) -> nn.Parameter:
        codebook = layer.codebook
        if id(codebook) not in weights:
            with torch.no_grad():
                decoded = layer.decode()
            weights[id(codebook)] = nn.Parameter(decoded, requires_grad=codebook.requires_grad)
        return weights[id(codebook)]

    for module in list(model.modules()):
        if isinstance(module, PQMultiheadAttention):
            projection = weight(module.in_proj)
            del module.in_proj, module.held
            _swap(module, _float_class(type(module)), None, in_proj_weight=projection)
        elif isinstance(module, QuantisedLayer) and not isinstance(module, PQMatrix):
            decoded = weight(module)
            del module.codes, module.layout, module.mode, module.kept
            _swap(module, _float_class(type(module)), "codebook", weight=decoded)
    return model


def _weight_of(modules: Mapping[str, nn.Module], name: str, layout: Layout) -> nn.Parameter:
    """Find the weight of a float layer and check that it is what the layout says."""
    path, _, last = name.rpartition(".")
    parent = modules.get(path)
    if name not in modules and last == "in_proj" and isinstance(parent, nn.MultiheadAttention):
        weight = dict(parent.named_parameters(recurse=False)).get("in_proj_weight")
        if weight is None:
            raise InputError(
                f"{name}: query, key and value of different widths have no packed projection; "
                "keep them float"
            )
        own: Layout | None = Layout("linear", tuple(weight.shape))
    elif name not in modules:
        raise InputError(f"{name}: the network has no such layer")
    else:
        module = modules[name]
        if isinstance(module, QuantisedLayer):
            raise InputError(f"{name} is quantised already: take float_copy of the network first")
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or isinstance(weight, UninitializedParameter):
            raise InputError(
                f"{name} has no weight of its own: remove its parametrisation, or run the network "
                "once if it is lazy"
            )
        own = layout_of(module)
    if own != layout:
        raise InputError(f"{name}: codes are for {layout}, the layer is {own}")
    return weight


def _check(quantised: Quantised, name: str) -> None:
    layout, codes = quantised.layout, quantised.codes
    count, size = quantised.codebook.shape
    layout.check_block(size, name)
    expected = (layout.rows, layout.row_length // size)
    if codes.shape != expected:
        raise InputError(f"{name}: codes have shape {tuple(codes.shape)}; give {expected}")
    low, high = map(int, codes.aminmax())
    if not 0 <= low <= high < count:
        raise InputError(f"{name}: codes run from {low} to {high}, the codebook holds {count}")


def _is_layer_weight(module: nn.Module, key: str) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return key == "in_proj_weight"
    return key == "weight" and layout_of(module) is not None


def _quantise(
    module: nn.Module, key: str, parts: tuple[Layout, Tensor, nn.Parameter, Kept]
) -> None:
    layout, codes, codebook, kept = parts
    layer: Any = module  # its class changes below
    if isinstance(module, nn.MultiheadAttention):
        layer = PQMatrix()
        layer.training = module.training
        layer.codebook = codebook
        _swap(module, _quantised_class(type(module)), key)
        module.held = None  # type: ignore[assignment]  # it is a PQMultiheadAttention now
        module.in_proj = layer
    else:
        _swap(module, _quantised_class(type(module)), key, codebook=codebook)
    if isinstance(module, nn.Embedding):
        module.sparse = False  # a sparse gradient does not flow through the decoding
    layer.layout, layer.mode, layer.kept = layout, "dense", kept
    layer.register_buffer("codes", codes)


def _swap(module: nn.Module, kind: type[nn.Module], old: str | None, **new: nn.Parameter) -> None:
    """Change a module's class and put a new parameter, before the others, for an old one."""
    rest = dict(module.named_parameters(recurse=False))
    for key in rest:
        delattr(module, key)
    module.__class__ = kind
    for key, parameter in (new | rest).items():
        if key != old:
            module.register_parameter(key, parameter)
