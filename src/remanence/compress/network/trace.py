"""What one forward does with a network's layers: their order, their inputs, what follows them."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm

from remanence.compress.network.calibration import run, tensors_of
from remanence.compress.network.layers import find_layers
from remanence.compress.network.recorder import Geometry, Product, Recorder, listen, recording
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from torch._ops import OpOverload

    from remanence.compress.layout import Layout
    from remanence.compress.network.calibration import Batch, Forward
    from remanence.compress.network.layers import Layer


@dataclass
class Trace:
    """What one forward did with a network's layers.

    Attributes:
        calls: Products of each layer, in order of execution; layers never seen are missing.
        inputs: Equal for layers that multiplied the very same tensors.
        norms: The BatchNorm that takes the layer's output directly, where there is one.
        geometries: How each of a layer's inputs is unfolded.
        partial: Layers of which a product used only some rows.
        unseen: Layers whose weight went through an operation that is no known product.
    """

    calls: Counter[str] = field(default_factory=Counter)
    inputs: dict[str, tuple[Hashable, ...]] = field(default_factory=dict)
    geometries: dict[str, tuple[Geometry | None, ...]] = field(default_factory=dict)
    norms: dict[str, _BatchNorm] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    unseen: dict[str, str] = field(default_factory=dict)

    @property
    def order(self) -> tuple[str, ...]:
        """Layers in order of execution."""
        return tuple(self.calls)

    def require(self, names: list[str]) -> None:
        """Refuse layers that the forward did not multiply.

        Args:
            names: Layers that must be there.

        Raises:
            InputError: It lists those that are missing, and what to do.
        """
        hidden = [
            f"{n} (its weight goes through {self.unseen[n]})" for n in names if n in self.hidden
        ]
        if hidden:
            raise InputError(
                f"no product with the weight of {', '.join(hidden)} can be followed; "
                "keep it in float (`keep`)"
            )
        missing = [name for name in names if name not in self.calls]
        if missing:
            raise InputError(
                f"the calibration batch never runs {', '.join(missing)}; keep what is not used in "
                "float (`keep`), or give a `forward` that uses it"
            )

    @property
    def hidden(self) -> set[str]:
        """Layers that were used, but never in a product that can be followed."""
        return set(self.unseen) - set(self.calls)


class _Tracer(Recorder):  # type: ignore[no-untyped-call]  # torch's, untyped
    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        super().__init__(layers)
        self.trace = Trace()
        # Weak references keep a storage's identity from being given to a later one.
        # Tensors' own counts of changes in place are not kept up below autograd.
        self._changes: Counter[int] = Counter()
        self._storages: list[StorageWeakRef] = []
        self._outputs: dict[Hashable, str] = {}
        self._followers: dict[str, set[_BatchNorm]] = defaultdict(set)
        self._feeders: Counter[_BatchNorm] = Counter()
        self._means = {
            module.running_mean.untyped_storage().data_ptr(): module
            for module in model.modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        }

    def after(self, product: Product, output: Tensor) -> None:
        name = product.name
        self.trace.calls[name] += 1
        seen = (self._identity(product.input), tuple(product.input.shape), product.input.stride())
        self.trace.inputs[name] = (*self.trace.inputs.get(name, ()), seen)
        self.trace.geometries[name] = (*self.trace.geometries.get(name, ()), product.geometry)
        if not product.whole:
            self.trace.partial.add(name)
        self._outputs[self._identity(output)] = name

    def other(self, func: OpOverload, args: tuple[Any, ...], owners: list[Layer]) -> None:
        if owners and not func.is_view:
            self.trace.unseen |= {layer.name: str(func) for layer in owners}
        if "batch_norm" in str(func):
            self._norm(args)
        for argument, value in zip(func._schema.arguments, args, strict=False):  # noqa: SLF001  # no public name
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_of(value):
                    self._changes[self._storage(tensor)] += 1

    def _norm(self, args: tuple[Any, ...]) -> None:
        tensors = [arg for arg in args[1:] if isinstance(arg, Tensor)]
        found = [self._means.get(t.untyped_storage().data_ptr()) for t in tensors]
        module = next((norm for norm in found if norm is not None), None)
        if module is not None:
            self._feeders[module] += 1
            producer = self._outputs.get(self._identity(args[0]))
            if producer is not None:
                self._followers[producer].add(module)
                self.trace.norms[producer] = module

    def finish(self, layers: Mapping[str, Layer]) -> Trace:
        """Keep only norms that follow one layer at its every call, and no other."""
        for name, norms in self._followers.items():
            norm = self.trace.norms[name]
            alone = self._feeders[norm] == self.trace.calls[name]
            fits = norm.num_features == _channels(layers[name].layout)
            if len(norms) != 1 or not alone or not fits:
                del self.trace.norms[name]
        return self.trace

    def _identity(self, tensor: Tensor) -> Hashable:
        storage = self._storage(tensor)
        return storage, tensor.storage_offset(), tensor.numel(), self._changes[storage]

    def _storage(self, tensor: Tensor) -> int:
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch's, untyped
        self._storages.append(reference)
        return int(reference.cdata)


def _channels(layout: Layout) -> int:
    """Output channels of a layer."""
    return layout.shape[1] * layout.groups if layout.kind == "conv_transpose" else layout.rows


def trace(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batch: Batch,
    forward: Forward | None = None,
) -> Trace:
    """Run a network once and note which layers it multiplies, in which order.

    Args:
        model: The network.
        layers: Its layers (`find_layers`).
        batch: One calibration batch.
        forward: See `calibration.run`.

    Raises:
        InputError: The forward raised.
    """
    tracer = _Tracer(model, layers)
    with recording(model), tracer:
        run(model, batch, forward)
    return tracer.finish(layers)


def execution_order(model: nn.Module, example: Batch, forward: Forward | None = None) -> list[str]:
    """Return the names of a network's layers in the order of their first product.

    Args:
        model: The network.
        example: One batch.
        forward: See `calibration.run`.

    Raises:
        InputError: The forward raised.
    """
    return list(trace(model, find_layers(model), example, forward).order)


def record_inputs(
    model: nn.Module,
    name: str,
    batch: Batch,
    *,
    stop: bool = True,
    forward: Forward | None = None,
) -> list[Tensor]:
    """Return copies of what one layer's weight is multiplied with in one forward.

    Args:
        model: The network.
        name: The layer.
        batch: One batch.
        stop: End the forward at the layer's last product; costs one more forward to count them.
        forward: See `calibration.run`.

    Returns:
        A tensor for each product: (N, R) rows, a convolution's padded input, or indices.

    Raises:
        InputError: There is no such layer, or the batch never runs it.
    """
    layers = find_layers(model)
    if name not in layers:
        raise InputError(f"no layer is called {name!r}; there are {', '.join(layers)}")
    calls = None
    if stop:
        found = trace(model, layers, batch, forward)
        found.require([name])
        calls = found.calls
    inputs: list[Tensor] = []
    wanted = {name: layers[name]}
    listen(
        model,
        wanted,
        batch,
        lambda product, _: inputs.append(product.input.clone()),
        calls=calls,
        forward=forward,
    )
    return inputs
