"""What a prediction costs at each size: multiply-adds, latency, memory of activations."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Cost:
    """Cost of predicting one image.

    Attributes:
        gmacs: Multiply-adds, in units of 1e9.
        latency_ms: Median time of a forward pass with one image, milliseconds.
        activation_mib: Largest amount of memory that tensors made by the forward pass hold at one
            moment, MiB; the weights are not counted.
    """

    gmacs: float
    latency_ms: float
    activation_mib: float


def measure_cost(model: nn.Module, size: int, *, repeats: int = 10) -> Cost:
    """Measure the cost of one image at one size.

    Multiply-adds grow as (K / K0)^2 for convolutional networks (arXiv 1906.06423, section 4), with
    a K^4 term for attention; the latency of a single image grows more slowly, so it is measured.

    Args:
        model: Network in eval mode, on its device.
        size: Side of the input, pixels.
        repeats: Timed forward passes, after two that are not timed.

    Returns:
        The cost.
    """
    device = next(model.parameters()).device
    x = torch.zeros(1, 3, size, size, device=device)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as flops:
            model(x)
        with _LiveBytes() as live:
            model(x)
        seconds = sorted(_timed(lambda: model(x), device) for _ in range(repeats + 2))
    return Cost(
        gmacs=flops.get_total_flops() / 2e9,
        latency_ms=1e3 * seconds[len(seconds) // 2],
        activation_mib=live.peak / 2**20,
    )


def _timed(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Follow the storages that operators return until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage(), given)
        return out

    def _follow(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        address = storage.data_ptr()
        # A view, or an operator in place, takes no new memory.
        if address in given or address in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size
