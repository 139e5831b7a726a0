"""The products that a network's weights take part in, seen where torch computes them.

Module hooks miss weights that a forward uses on its own (`F.linear(x, layer.weight)`, attention's
packed projection) and padding that a module adds before the product. Below autograd every one of
these is one of a few matrix products or a convolution, whose factor lies in a known parameter.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode

from remanence.compress.layout import Kind, Layout
from remanence.compress.network.calibration import (
    Batch,
    Forward,
    device_of,
    own_randomness,
    run,
)
from remanence.compress.quantizer.moments import input_rows
from remanence.modes import evaluating

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch._ops import OpOverload

    from remanence.compress.network.layers import Layer

# Matrix products and the places of their two factors.
MATRIX_PRODUCTS = {
    "aten.mm": (0, 1),
    "aten.bmm": (0, 1),
    "aten.mv": (0, 1),
    "aten.addmm": (1, 2),
    "aten._addmm_activation": (1, 2),
    "aten.baddbmm": (1, 2),
    "aten.addmv": (1, 2),
}


@dataclass(frozen=True)
class Geometry:
    """How an input is unfolded into the rows that the weight's rows are multiplied with."""

    layout: Layout
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()


@dataclass(frozen=True)
class Product:
    """One use of a layer's weight.

    Attributes:
        name: The layer.
        input: The other factor: rows (N, R) of a matrix product, what the convolution saw
            (N, C, *spatial), or the indices of an embedding.
        geometry: How the input is unfolded; None for an embedding, which multiplies nothing.
        whole: Whether the product used every row of the weight.
    """

    name: str
    input: Tensor
    geometry: Geometry | None
    whole: bool = True

    def copied(self) -> Product:
        """Return the product with a copy of its input, which outlives the forward."""
        return replace(self, input=self.input.clone())

    def rows_per_item(self) -> int:
        """Return the positions that one item of the input unfolds into."""
        assert self.geometry is not None
        g, spatial = self.geometry, self.input.shape[2:]
        if g.layout.kind == "linear":
            return 1
        if g.layout.kind == "conv_transpose":
            return math.prod(spatial)
        axes = zip(spatial, g.layout.shape[2:], g.stride, g.padding, g.dilation, strict=True)
        return math.prod((n + 2 * p - gap * (k - 1) - 1) // s + 1 for n, k, s, p, gap in axes)

    def rows(self, part: slice, positions: int | None, generator: torch.Generator | None) -> Tensor:
        """Unfold some of the items.

        Args:
            part: Which items (along the input's first axis).
            positions: Draw this many positions where there are more.
            generator: For that draw.

        Returns:
            Rows (positions, G, R).
        """
        assert self.geometry is not None
        g = self.geometry
        unfolding: dict[str, Any] = {}
        if g.layout.kind != "linear":
            unfolding = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}
        return input_rows(
            self.input[part],
            layout=g.layout,
            transposed=g.layout.kind == "conv_transpose",
            positions=positions,
            generator=generator,
            **unfolding,
        )


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, untyped
    """Calls `before` and `after` around every product with a layer's weight."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        """Watch the weights of these layers."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch's, untyped
        self._weights: dict[int, list[tuple[int, int, Layer]]] = defaultdict(list)
        for layer in layers.values():
            weight = layer.weight
            start = int(weight.storage_offset())
            spot = (start, start + weight.numel(), layer)
            self._weights[weight.untyped_storage().data_ptr()].append(spot)

    def before(self, product: Product) -> None:
        """Called before the product is computed."""

    def after(self, product: Product, output: Tensor) -> None:
        """Called with the product's value."""

    def other(self, func: OpOverload, args: tuple[Any, ...], owners: list[Layer]) -> None:
        """Called for every other operation, with the layers whose weights it takes."""

    def owner(self, tensor: object) -> Layer | None:
        """Return the layer in whose weight a tensor lies."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return None
        spots = self._weights.get(tensor.untyped_storage().data_ptr(), ())
        offset = tensor.storage_offset()
        return next((layer for start, end, layer in spots if start <= offset < end), None)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See one operation."""
        kwargs = kwargs or {}
        # Under inference mode composite operations arrive whole; their parts come back to us.
        if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        product = self._product(func, args)
        if product is None:
            owners = [layer for layer in map(self.owner, args) if layer is not None]
            self.other(func, args, owners)
            return func(*args, **kwargs)
        self.before(product)
        output = func(*args, **kwargs)
        self.after(product, output)
        return output

    def _product(self, func: OpOverload, args: tuple[Any, ...]) -> Product | None:
        name = str(func).rsplit(".", 1)[0]
        if name == "aten.convolution":
            return self._convolution(args)
        if name in {"aten.embedding", "aten._embedding_bag", "aten._embedding_bag_forward_only"}:
            layer = self.owner(args[0])
            return Product(layer.name, args[1], None) if layer else None
        if name in MATRIX_PRODUCTS:
            left, right = (args[place] for place in MATRIX_PRODUCTS[name])
            if (layer := self.owner(right)) is not None:
                return _matrix_product(layer, right.mT, left) if right.ndim > 1 else None
            if (layer := self.owner(left)) is not None:
                return _matrix_product(layer, left, right.mT if right.ndim > 1 else right[None])
        return None

    def _convolution(self, args: tuple[Any, ...]) -> Product | None:
        x, weight, _, stride, padding, dilation, transposed, _, groups = args
        layer = self.owner(weight)
        if layer is None:
            return None
        kind: Kind = "conv_transpose" if transposed else "conv"
        layout = Layout(kind, tuple(weight.shape), groups)
        if layer.layout != layout:
            return None
        geometry = Geometry(layout, tuple(stride), tuple(padding), tuple(dilation))
        return Product(layer.name, x, geometry)


def _matrix_product(layer: Layer, factor: Tensor, x: Tensor) -> Product | None:
    """A product of rows x (..., n, R) with the rows of a factor (..., rows, R), or None."""
    length = layer.layout.row_length
    rows = factor.shape[-2]
    plain = layer.layout.groups == 1 and layer.layout.kind != "conv_transpose"
    batched = any(n > 1 and s for n, s in zip(factor.shape[:-2], factor.stride()[:-2], strict=True))
    if not plain or batched or factor.shape[-1] != length or factor.stride(-1) != 1:
        return None
    if rows > 1 and factor.stride(-2) != length:
        return None
    geometry = Geometry(Layout("linear", (layer.layout.rows, length)))
    return Product(layer.name, x.reshape(-1, length), geometry, rows == layer.layout.rows)


@contextmanager
def recording(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Run a network so that its products can be seen, and leave no trace.

    Eval mode, no gradient, no autocast, attention's fused path off; modes and random state are
    restored.

    Args:
        model: The network.
        seed: For a forward that draws random numbers.
    """
    device = device_of(model)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            evaluating(model),
            own_randomness(device, seed),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _Stop(BaseException):
    """Ends a forward; no model's `except Exception` may catch it."""


class _Listener(Recorder):  # type: ignore[no-untyped-call]  # torch's, untyped
    def __init__(
        self,
        layers: Mapping[str, Layer],
        calls: Mapping[str, int] | None,
        listen: Callable[[Product, int], None],
    ) -> None:
        super().__init__(layers)
        self._left = None if calls is None else sum(calls[name] for name in layers)
        self._seen: Counter[str] = Counter()
        self._listen = listen

    def before(self, product: Product) -> None:
        self._listen(product, self._seen[product.name])
        self._seen[product.name] += 1
        if self._left is not None and self._seen.total() == self._left:
            raise _Stop


def listen(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batch: Batch,
    hear: Callable[[Product, int], None],
    *,
    calls: Mapping[str, int] | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> None:
    """Run a network and hand out each product of some layers before it is computed.

    Args:
        model: The network.
        layers: The layers to listen to.
        batch: One calibration batch.
        hear: Gets the product and how many the layer had before; the input may be overwritten
            later in the forward, so what is needed of it is taken at once.
        calls: Products of each layer in one forward; the forward ends after the last of them.
            Without it the forward runs to its end.
        forward: See `calibration.run`.
        seed: See `recording`.

    Raises:
        InputError: The forward raised.
    """
    try:
        with recording(model, seed), _Listener(layers, calls, hear):
            run(model, batch, forward)
    except _Stop:
        return
