"""How quantised layers are run: weight kept decoded, decoded at each use, or looked up.

None of these makes a network faster by itself. A kept weight costs what the float network costs; to
decode at each use saves its memory for some time; to look up pays where a layer has many more
outputs than codewords. Hence each layer is measured.
"""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from remanence.compress.modules.quantised_layer import Mode, QuantisedLayer
from remanence.compress.modules.replace import quantised_layers
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


@dataclass(frozen=True)
class Cost:
    """What one layer costs in one mode.

    Attributes:
        seconds: Median time of a forward.
        kept: Bytes kept between forwards beside codes and codebook.
        working: Largest sum of bytes of the tensors that a forward makes, its output included.
    """

    seconds: float
    kept: int
    working: int


@dataclass(frozen=True)
class Choice:
    """The mode of one layer.

    Attributes:
        mode: The one chosen.
        costs: What was measured, by mode; empty where the example does not run the layer's own
            forward (its weight is read by another module).
    """

    mode: Mode
    costs: Mapping[Mode, Cost]


def set_mode(model: nn.Module, mode: Mode | Mapping[str, Mode]) -> dict[str, Mode]:
    """Set how quantised layers are run in inference.

    Args:
        model: A network with quantised layers.
        mode: One mode for all, or modes by name of layer. Where `lookup` for all does not apply to
            a layer (transposed convolutions, packed projections, subclasses with a forward of
            their own), that layer becomes `lazy`.

    Returns:
        The mode of each layer.

    Raises:
        InputError: A mode or name is unknown, or `lookup` is asked of a named layer to which it
            does not apply.
    """
    layers = quantised_layers(model)
    wanted = dict(mode) if isinstance(mode, Mapping) else dict.fromkeys(layers, mode)
    for name, each in wanted.items():
        if each not in get_args(Mode):
            raise InputError(f"mode {each!r} is unknown: give one of {', '.join(get_args(Mode))}")
        if name not in layers:
            raise InputError(f"{name}: the network has no such quantised layer")
        refusal = layers[name].lookup_refusal() if each == "lookup" else None
        if refusal and isinstance(mode, Mapping):
            raise InputError(f"{name}: lookup does not apply, {refusal}; give dense or lazy")
        if refusal:
            wanted[name] = "lazy"
    for name, each in wanted.items():
        layers[name].mode = each
        layers[name].drop_kept()
    return {name: layer.mode for name, layer in layers.items()}


@torch.no_grad()
def choose_modes(
    model: nn.Module,
    example: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    slack: float = 0.1,
    seconds: float = 0.05,
) -> dict[str, Choice]:
    """Measure every quantised layer in every mode and set the best.

    The best keeps the least memory among the modes that take at most `1 + slack` times as long as
    the fastest. Each layer is measured inside one forward of the network, on the input that it gets
    there; times hold for that batch size, device and number of threads.

    Args:
        model: A network with quantised layers; their modes are set.
        example: A batch: a tensor, positional arguments, or keyword arguments.
        slack: Time given for memory, as a share of the fastest; 0 takes the fastest.
        seconds: Time spent on each layer and mode; a mode that is three times slower than another
            is measured once.

    Returns:
        Choices by name of layer.

    Raises:
        InputError: The slack or time is not positive, or no layer is quantised.
    """
    if slack < 0 or seconds <= 0:
        raise InputError(f"slack {slack} and seconds {seconds}: give 0 or more, and more than 0")
    layers = quantised_layers(model)
    if not layers:
        raise InputError("no layer of the network is quantised: compress it first")
    training = {module: module.training for module in model.modules()}
    costs: dict[str, dict[Mode, Cost]] = {name: {} for name in layers}
    before = set_mode(model, "lazy") | {name: layer.mode for name, layer in layers.items()}
    try:
        model.eval()
        for name, layer in layers.items():
            # In the instance, and not as a hook: hooks turn torch's fast paths off.
            layer.forward = partial(_measured, layer, costs[name], seconds)
        if isinstance(example, Mapping):
            model(**example)
        else:
            model(*((example,) if isinstance(example, Tensor) else example))
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)
        set_mode(model, before)
        for module, was in training.items():
            module.training = was
    chosen = {name: Choice(_best(found, slack), found) for name, found in costs.items()}
    set_mode(model, {name: choice.mode for name, choice in chosen.items()})
    return chosen


def _best(costs: Mapping[Mode, Cost], slack: float) -> Mode:
    if not costs:
        return "dense"
    limit = (1 + slack) * min(cost.seconds for cost in costs.values())
    quick = [mode for mode, cost in costs.items() if cost.seconds <= limit]
    return min(quick, key=lambda mode: (costs[mode].kept, costs[mode].seconds))


def _measured(
    layer: QuantisedLayer,
    costs: dict[Mode, Cost],
    seconds: float,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a layer's forward; in the first call, measure it in all modes as well."""
    forward: Callable[..., Any] = partial(type(layer).forward, layer, *args, **kwargs)
    if not costs:
        for mode in get_args(Mode):
            if mode == "lookup" and layer.lookup_refusal() is not None:
                continue
            layer.mode = mode
            layer.drop_kept()
            forward()  # keeps what the mode keeps
            with _LiveBytes() as live:
                forward()
            needed = _seconds(forward, layer.codes.device, 0)
            if needed < 3 * min((cost.seconds for cost in costs.values()), default=math.inf):
                needed = _seconds(forward, layer.codes.device, seconds)
            costs[mode] = Cost(needed, layer.kept_bytes(), live.peak)
        layer.mode = "lazy"
        layer.drop_kept()
    return forward()


def _seconds(forward: Callable[[], Any], device: torch.device, at_least: float) -> float:
    """Return a call's median time, over as many calls as take so long together."""
    # torch.utils.benchmark would do, but its import looks for a compiler, and warns without a GPU.
    times: list[float] = []
    while sum(times) <= at_least:
        started = _now(device)
        forward()
        times.append(_now(device) - started)
    return statistics.median(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is untyped
    """Counts the bytes of the tensors made since it was entered that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._owners: Counter[int] = Counter()
        self._now = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        out = func(*args, **kwargs)
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self._count(made, given)
        return out

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in given and not self._owners[address]:
            return  # a view of something that was there before
        if not self._owners[address]:
            self._now += size
            self.peak = max(self.peak, self._now)
        self._owners[address] += 1
        weakref.finalize(tensor, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._owners[address] -= 1
        if not self._owners[address]:
            self._now -= size
