"""Exact, label-free re-estimation of batch-norm statistics at a new resolution.

FixRes re-estimates the last batch norm at test size (arXiv 1906.06423, section 4). A running
average of batch statistics depends on batch size, order and momentum; here the statistics are those
of the whole collection, whatever the batches.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from remanence.errors import InputError
from remanence.learn.fixres.layers import find_last_norms
from remanence.learn.fixres.norm_graph import (
    norm_graph,
)
from remanence.modes import evaluating


class _EnoughError(Exception):
    """Ends a forward pass whose last wanted norm has been reached."""


class Moments:
    """Running mean and sum of squared deviations per channel, in float64 (Chan et al., 1979)."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.m2 = torch.zeros_like(self.mean)

    def update(self, x: Tensor) -> None:
        """Merge a batch (N, C, ...)."""
        n = x.numel() // x.shape[1]
        if n == 0:
            return
        var, mean = torch.var_mean(x.double(), dim=[0, *range(2, x.ndim)], correction=0)
        total = self.count + n
        delta = mean - self.mean
        self.mean += delta * (n / total)
        self.m2 += var * n + delta.square() * (self.count * n / total)
        self.count = total

    def merge(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Merge the moments of all processes, given a sum over them."""
        count = reduce(self.count.clone())
        mean = reduce(self.count * self.mean) / count.clamp(min=1)
        self.m2 = reduce(self.m2 + self.count * (self.mean - mean).square())
        self.mean, self.count = mean, count


@torch.no_grad()
def recalibrate_bn_(
    model: nn.Module,
    batches: Iterable[Tensor],
    which: Literal["last", "all"] | Sequence[str] = "last",
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> list[str]:
    """Set the statistics of batch norms to those of their inputs over a whole collection, in place.

    The running mean is the population mean of the norm's input over all images and positions, the
    running variance its unbiased variance, which is what PyTorch stores. All else stays in eval
    mode: affine parts, `num_batches_tracked` and the other norms do not change. Since new
    statistics in one norm change the inputs of those behind it, norms are re-estimated in the order
    of execution, each behind norms that are final already. Norms that do not depend on each other
    share a pass, and a pass stops at its last norm: "last" costs one pass (PNASNet: two); "all"
    costs as many as the longest chain of norms, each half a forward pass on average.

    Args:
        model: any classifier; modes are given back as they were.
        batches: (N, 3, K, K) image batches on the model's device, of any and varying N: a list, a
            DataLoader; a generator where one pass will do.
        which: "last" for the last norm(s) before pooling, "all", or names of norms.
        reduce: sums a tensor over processes that hold disjoint, non-empty slices of the
            collection, and returns the sum; all of them end with the same statistics.

    Returns:
        Names of the re-estimated norms, in execution order; empty, with a warning, when "last" or
        "all" finds no BatchNorm.

    Raises:
        InputError: unknown name, no images, non-finite activations, fewer than two values per
            channel, or an iterator that would be needed twice.
    """
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise InputError("no image batch to re-estimate batch norms from: give at least one")
    once = stream is batches
    norms = _chosen(model, first[:1], which)
    graph = norm_graph(model, norms, first[:1])
    if not graph.ancestors:
        warnings.warn("the model has no BatchNorm with statistics to re-estimate", stacklevel=2)
        return []
    depth: dict[str, int] = {}
    for name, before in graph.ancestors.items():
        depth[name] = 1 + max((depth[a] for a in before if a in depth), default=-1)
    passes = 1 + max(depth.values())
    if once and passes > 1:
        raise InputError(
            f"{passes} passes over the batches are needed: give a list or a DataLoader, "
            "not a generator"
        )

    for level in range(passes):
        now = {n: norms[n] for n in depth if depth[n] == level}
        moments = {n: Moments(m.num_features, first.device) for n, m in now.items()}
        calls = sum(graph.calls[n] for n in now)
        images = itertools.chain([first], stream) if once else batches
        with evaluating(model), _recording(now, moments, calls):
            for x in images:
                with suppress(_EnoughError):
                    model(x)
        for name, norm in now.items():
            _store(name, norm, moments[name], reduce)
    return list(depth)


def _chosen(
    model: nn.Module, example: Tensor, which: Literal["last", "all"] | Sequence[str]
) -> dict[str, _BatchNorm]:
    """Pick the batch norms to re-estimate."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    tracked = {n: m for n, m in norms.items() if m.running_mean is not None}
    if which == "all":
        return tracked
    if which == "last":
        return {n: tracked[n] for n in find_last_norms(model, example) if n in tracked}
    for name in which:
        if name not in tracked:
            raise InputError(f"{name!r} is no BatchNorm with statistics: see model.named_modules()")
    return {n: tracked[n] for n in which}


@contextmanager
def _recording(
    norms: dict[str, _BatchNorm], moments: dict[str, Moments], calls: int
) -> Iterator[None]:
    """Collect the norms' inputs, and end each forward pass at the last of their `calls`."""
    seen = 0

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal seen
            moments[name].update(args[0])
            seen += 1
            if seen % calls == 0:
                raise _EnoughError

        return hook

    handles = [norm.register_forward_pre_hook(record(name)) for name, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _store(
    name: str, norm: _BatchNorm, moments: Moments, reduce: Callable[[Tensor], Tensor] | None
) -> None:
    """Write the final moments into the norm's buffers."""
    if reduce is not None:
        moments.merge(reduce)
    if moments.count < 2:
        raise InputError(f"batch norm {name!r} saw one value per channel: give at least two images")
    if not bool((moments.mean + moments.m2).isfinite().all()):
        raise InputError(f"input of batch norm {name!r} is not finite: check images and weights")
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(moments.mean)
    norm.running_var.copy_(moments.m2 / (moments.count - 1))
