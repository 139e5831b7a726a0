"""Which channels of a network may be reordered, and what must move with them (torch.fx)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn.modules import batchnorm, conv, instancenorm

from remanence.compress.layout import layout_of
from remanence.compress.permutation.channel_runs import Channels, Runs, fixed, freeze, tie

# fmt: off
_ELEMENTWISE = frozenset({
    "abs", "add", "celu", "clamp", "clone", "contiguous", "detach", "div",
    "dropout", "elu", "exp", "float", "gelu", "hardsigmoid", "hardswish", "hardtanh",
    "iadd", "identity", "imul", "leaky_relu", "mish", "mul", "neg", "pow",
    "relu", "relu6", "rsub", "selu", "sigmoid", "silu", "softplus", "sqrt",
    "square", "stochastic_depth", "sub", "tanh", "to", "truediv", "type_as",
})
_SPATIAL = (
    "adaptive_avg_pool", "adaptive_max_pool", "avg_pool", "interpolate", "lp_pool", "max_pool",
    "pad", "upsample",
)
_ELEMENTWISE_MODULES = (
    nn.ReLU | nn.ReLU6 | nn.GELU | nn.SiLU | nn.Mish | nn.Sigmoid | nn.Tanh | nn.ELU | nn.SELU
    | nn.CELU | nn.LeakyReLU | nn.Softplus | nn.Hardswish | nn.Hardsigmoid | nn.Hardtanh
    | nn.Identity | nn.modules.dropout._DropoutNd  # noqa: SLF001 -- torch has no public name for the family
)
# fmt: on
_SPATIAL_MODULES = tuple(
    kind
    for module in (nn.modules.pooling, nn.modules.padding, nn.modules.upsampling)
    for name in module.__all__
    if isinstance(kind := getattr(module, name), type)
)
_LEAVES = (
    conv._ConvNd,  # noqa: SLF001 -- likewise
    batchnorm._NormBase,  # noqa: SLF001 -- likewise
    nn.GroupNorm | nn.LayerNorm | nn.Linear | nn.Embedding,
)


@dataclass(frozen=True)
class Use:
    """A parameter or buffer whose entries along one dimension follow the channels of `runs`."""

    tensor: Tensor
    dim: int
    runs: Runs


@dataclass(frozen=True)
class _Value:
    """A tensor of the traced graph, its channels along `axis`."""

    shape: tuple[int, ...]
    axis: int
    runs: Runs


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Subclasses (timm's same-padding convolutions, norms with activation) act channel by
        # channel as their parents do.
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


class ChannelGroups:
    """Groups of channels of a network that a permutation may move without changing its function.

    Channels start at an output of a convolution, linear layer or embedding, pass through norms,
    activations, pooling, additions (which tie both sides), concatenations and flattening, and end
    in the layers that read them. Whatever is not understood freezes the channels it touches.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        """Trace.

        Args:
            model: Network in evaluation mode.
            example: Arguments of its forward.

        Raises:
            Exception: Whatever torch.fx raises where it cannot trace the network.
        """
        graph = _Tracer().trace(model)
        module = fx.GraphModule(model, graph)
        with torch.no_grad():
            ShapeProp(module).propagate(*example)
        self._model = model
        self._by_tensor: dict[tuple[int, int], Use] = {}
        self._pinned: list[Tensor] = []
        self._values: dict[fx.Node, _Value] = {}
        for node in graph.nodes:
            self._visit(node)
        pinned = {id(tensor) for tensor in self._pinned}
        for use in self.uses:
            if id(use.tensor) in pinned:
                freeze(use.runs)

    @property
    def uses(self) -> list[Use]:
        """Every parameter and buffer dimension that follows channels."""
        return list(self._by_tensor.values())

    def reading(self, tensor: Tensor, dim: int) -> Runs:
        """Return the channels that a dimension of a tensor follows; none if it is not known.

        Args:
            tensor: Parameter of the traced network.
            dim: Its dimension.
        """
        found = self._by_tensor.get((id(tensor), dim))
        return found.runs if found else []

    def free(self) -> list[Channels]:
        """Return the groups that may be permuted, in the order of the network."""
        roots = {id(run.root()): run.root() for use in self.uses for run in use.runs}
        return [run for run in roots.values() if not run.frozen() and run.count > 1]

    def _visit(self, node: fx.Node) -> None:
        inputs = [self._values[n] for n in node.all_input_nodes if n in self._values]
        if node.op == "get_attr":
            return  # a parameter: looked up where it is used
        value: _Value | None = None
        if node.op == "call_module":
            called = self._model.get_submodule(str(node.target))
            value = self._module(node, called, inputs)
        elif node.op in {"call_function", "call_method"}:
            name = str(getattr(node.target, "__name__", node.target)).removeprefix("_").rstrip("_")
            value = self._function(node, name, inputs)
        elif node.op == "output":
            self._refuse(node)
        if value is not None:
            self._values[node] = value

    def _refuse(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in self._values:
                freeze(self._values[source].runs)
            elif (parameter := self._parameter(source)) is not None:
                self._pinned.append(parameter)

    def _parameter(self, node: fx.Node) -> Tensor | None:
        if node.op != "get_attr":
            return None
        owner, _, name = str(node.target).rpartition(".")
        found = getattr(self._model.get_submodule(owner), name)
        return found if isinstance(found, Tensor) else None

    def _follow(self, tensor: Tensor | None, dim: int, runs: Runs) -> None:
        """Record that a dimension of a tensor moves with the channels of `runs`."""
        if tensor is None:
            return
        known = self._by_tensor.setdefault((id(tensor), dim), Use(tensor, dim, runs))
        if known.runs is not runs:
            tie(known.runs, runs)

    def _module(self, node: fx.Node, called: nn.Module, inputs: list[_Value]) -> _Value | None:
        shape = _shape(node)
        x = inputs[0] if len(inputs) == 1 else None
        weight = called._parameters.get("weight")  # noqa: SLF001 -- decoded weights are no parameter
        layout = layout_of(called)
        if layout is not None and weight is not None and shape is not None:
            if layout.kind == "conv_transpose" and layout.groups > 1:
                return self._give_up(node, called)
            axis = 1 if layout.kind.startswith("conv") else len(shape) - 1
            read = int(layout.kind in {"conv", "linear"})  # the dimension that meets the input
            if layout.groups > 1 and layout.row_length == layout.taps and x and x.axis == axis:
                times = layout.shape[0] // layout.groups  # depthwise: channels pass through
                out = [run.repeated(times) for run in x.runs]
            elif layout.groups > 1:  # channels move within their group
                if x:
                    freeze(x.runs)
                out = [Channels(layout.rows // layout.groups) for _ in range(layout.groups)]
                self._follow(weight, read, fixed(weight.shape[read]))
            else:
                if x and x.axis != (1 if layout.kind.startswith("conv") else len(x.shape) - 1):
                    return self._give_up(node, called)
                out = [Channels(shape[axis])]
                self._follow(weight, read, x.runs if x else fixed(weight.shape[read]))
            self._follow(weight, 1 - read, out)
            self._follow(getattr(called, "bias", None), 0, out)
            return _Value(shape, axis, out)
        if x is None or shape is None:
            return self._give_up(node, called)
        if isinstance(called, _ELEMENTWISE_MODULES):
            return _Value(shape, x.axis, x.runs)
        if isinstance(called, nn.Flatten):
            return self._reshape(x, shape) or self._give_up(node, called)
        if isinstance(called, _SPATIAL_MODULES) and x.axis == 1 and shape[1] == x.shape[1]:
            return _Value(shape, x.axis, x.runs)
        if self._norm_keeps_channels(called, x):
            for tensor in (*called.parameters(False), *called.buffers(False)):
                if tensor.ndim == 1 and len(tensor) == x.shape[x.axis]:
                    self._follow(tensor, 0, x.runs)
            return _Value(shape, x.axis, x.runs)
        return self._give_up(node, called)

    @staticmethod
    def _norm_keeps_channels(called: nn.Module, x: _Value) -> bool:
        if isinstance(called, batchnorm._BatchNorm | instancenorm._InstanceNorm):  # noqa: SLF001 -- families
            return x.axis == 1
        if isinstance(called, nn.GroupNorm):
            return x.axis == 1 and called.num_groups in {1, called.num_channels}
        if isinstance(called, nn.LayerNorm):
            at = len(x.shape) - 1
            axes = {at} if type(called) is nn.LayerNorm else {1, at}  # timm's LayerNorm2d: axis 1
            return called.normalized_shape == (x.shape[x.axis],) and x.axis in axes
        return isinstance(called, nn.PReLU) and (x.axis == 1 or called.num_parameters == 1)

    def _give_up(self, node: fx.Node, called: nn.Module) -> _Value | None:
        self._refuse(node)
        self._pinned.extend(called.parameters())
        return None

    def _function(self, node: fx.Node, name: str, inputs: list[_Value]) -> _Value | None:
        shape = _shape(node)
        if not inputs:
            self._refuse(node)  # pins parameters in computations of their own
            return None
        x = inputs[0]
        if shape is None and name in {"getattr", "size", "dim", "assert", "eq"}:
            return None  # about its shape
        if shape is not None:
            value: _Value | None = None
            if name in _ELEMENTWISE:
                return self._elementwise(node, shape)
            if name == "cat" or name in {"concat", "concatenate"}:
                value = self._concatenate(node, shape)
            elif len(inputs) == 1 and any(name.startswith(kind) for kind in _SPATIAL):
                if x.axis == 1 and shape[1] == x.shape[1]:
                    value = _Value(shape, 1, x.runs)
            elif name in {"flatten", "view", "reshape", "unsqueeze", "squeeze"}:
                value = self._reshape(x, shape)
            elif name in {"permute", "transpose"}:
                value = self._transpose(node, name, x, shape)
            elif name in {"mean", "sum", "amax"}:
                dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
                reduced = {d % len(x.shape) for d in _ints(dims)} or set(range(len(x.shape)))
                if x.axis in reduced:
                    return None  # the same whatever the order
                keep = len(shape) == len(x.shape)
                axis = x.axis if keep else x.axis - sum(d < x.axis for d in reduced)
                value = _Value(shape, axis, x.runs)
            elif name == "getitem":
                value = self._index(node, x, shape)
            if value is not None:
                return value
        self._refuse(node)
        return None

    def _elementwise(self, node: fx.Node, shape: tuple[int, ...]) -> _Value | None:
        values = [self._values[n] for n in node.all_input_nodes if n in self._values]
        values.sort(key=lambda value: -value.shape[value.axis])
        first = values[0]
        from_end = len(first.shape) - first.axis
        for value in values[1:]:
            if value.shape[value.axis] == 1:
                continue  # one channel for all
            if len(value.shape) - value.axis != from_end:
                self._refuse(node)
                return None
            tie(first.runs, value.runs)
        for source in node.all_input_nodes:
            other = _shape(source)
            if source in self._values or other is None or len(other) < from_end:
                continue
            at = len(other) - from_end
            if other[at] == 1 and first.shape[first.axis] != 1:
                continue
            if (parameter := self._parameter(source)) is not None:
                self._follow(parameter, at, first.runs)
            else:
                freeze(first.runs)
        return _Value(shape, len(shape) - from_end, first.runs)

    def _concatenate(self, node: fx.Node, shape: tuple[int, ...]) -> _Value | None:
        parts: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(parts, list | tuple) or len(_ints(dims)) != 1:
            return None
        along = _ints(dims)[0] % len(shape)
        known = [self._values.get(part) for part in parts]
        axes = {value.axis for value in known if value}
        if len(axes) != 1:
            return None
        axis = axes.pop()
        if along != axis:  # tokens put together: every part has the same channels
            runs = next(value.runs for value in known if value)
            for part, value in zip(parts, known, strict=True):
                if value:
                    tie(runs, value.runs)
                elif (parameter := self._parameter(part)) is not None:
                    self._follow(parameter, axis, runs)
                else:
                    freeze(runs)
            return _Value(shape, axis, runs)
        joined: Runs = []
        for part, value in zip(parts, known, strict=True):
            if value:
                joined += value.runs
            else:
                size = _shape(part)
                if size is None:
                    return None
                joined += fixed(size[axis])
        return _Value(shape, axis, joined)

    @staticmethod
    def _reshape(x: _Value, shape: tuple[int, ...]) -> _Value | None:
        before, length = math.prod(x.shape[: x.axis]), x.shape[x.axis]
        after = math.prod(x.shape[x.axis + 1 :])
        for axis, size in enumerate(shape):
            head, tail = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
            if length == 0 or size % length:
                continue
            times = size // length
            if head == before and tail * times == after:
                return _Value(shape, axis, [run.repeated(times) for run in x.runs])
            if head * times == before and tail == after:
                return _Value(shape, axis, x.runs * times)
        return None

    @staticmethod
    def _transpose(node: fx.Node, name: str, x: _Value, shape: tuple[int, ...]) -> _Value | None:
        dims = [d % len(shape) for d in _ints(node.args[1:] or tuple(node.kwargs.values()))]
        if name == "permute":
            return _Value(shape, dims.index(x.axis), x.runs)
        if len(dims) != 2:
            return None
        swap = {dims[0]: dims[1], dims[1]: dims[0]}
        return _Value(shape, swap.get(x.axis, x.axis), x.runs)

    @staticmethod
    def _index(node: fx.Node, x: _Value, shape: tuple[int, ...]) -> _Value | None:
        asked = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if not all(isinstance(i, int | slice) for i in asked):
            return None
        if x.axis < len(asked) and asked[x.axis] != slice(None):
            return None
        dropped = sum(isinstance(i, int) for i in asked[: x.axis])
        return _Value(shape, x.axis - dropped, x.runs)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    if isinstance(meta, TensorMetadata):
        return tuple(meta.shape)
    return None


def _ints(dims: Any) -> list[int]:
    if isinstance(dims, int):
        return [dims]
    if isinstance(dims, list | tuple):
        return [i for d in dims for i in _ints(d)]
    return []
