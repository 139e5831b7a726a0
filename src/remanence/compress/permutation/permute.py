"""Reorder channels so that blocks are easier to quantise (arXiv 2010.15703, section 3).

By the Gaussian rate-distortion bound, K codewords leave a squared error per weight of at least
K^(-2/d) det(Sigma)^(1/d), with Sigma the (d, d) covariance of the layer's blocks. The order of a
layer's input channels changes Sigma and, as long as whatever makes those channels follows, not what
the network computes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from remanence.compress.layout import layout_of
from remanence.compress.permutation.channel_groups import ChannelGroups
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from remanence.compress.permutation.channel_runs import Channels, Runs

TOLERANCE = 1e-4


@dataclass(frozen=True)
class PermutedLayer:
    """What the permutation did for one layer.

    Attributes:
        name: Dotted path of the layer.
        before: log det of the covariance of its blocks, as the network was given.
        after: The same, permuted.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Permuted:
    """A network with reordered channels, the same function.

    Attributes:
        model: A copy of the network, its channels reordered.
        layers: The layers whose blocks a permutation could change.
        notice: Why part or all of the network was left as it was; empty if nothing was.
    """

    model: nn.Module
    layers: tuple[PermutedLayer, ...]
    notice: str


def permute(
    model: nn.Module,
    blocks: Mapping[str, int],
    example: Tensor | tuple[Tensor, ...],
    *,
    swaps: int = 10_000,
    seed: int = 0,
) -> Permuted:
    """Permute channels to lower the log det of the blocks' covariances.

    For each group of channels that can move: channels sorted by variance are dealt into the d
    positions of a block, a position after the other, which makes the positions' variances as
    unequal, and so their product as small, as can be; then random swaps that lower the sum over the
    layers that read the group, each weighted by its number of blocks, are kept. Groups come from
    torch.fx (`ChannelGroups`); after the search the network's outputs are compared with the
    original's, and groups that moved them by more than 1e-4 of their largest value are put back.

    Args:
        model: Float network; left as it is.
        blocks: Weights in a block, by layer name. Other layers are permuted with their neighbours,
            but not looked at. Layers whose block lies within one channel gain nothing.
        example: Arguments of the network's forward, on its device, at least two inputs.
        swaps: Swaps tried for a group; a group of C channels tries at most C * C.
        seed: Of the swaps.

    Returns:
        The permuted copy. A network that torch.fx cannot trace comes back as it was, with a notice.

    Raises:
        InputError: A layer name is unknown, or a block does not divide the layer's row.
    """
    if swaps < 0:
        raise InputError(f"{swaps} swaps: give 0 or more")
    permuted = copy.deepcopy(model)
    modules = dict(permuted.named_modules())
    for name, block in blocks.items():
        layout = layout_of(modules[name]) if name in modules else None
        if layout is not None:
            layout.check_block(block, name)
        elif not isinstance(modules.get(name.removesuffix(".in_proj")), nn.MultiheadAttention):
            raise InputError(f"{name} is no layer that can be quantised; check the names of blocks")
    arguments = example if isinstance(example, tuple) else (example,)
    modes = {module: module.training for module in permuted.modules()}
    permuted.eval()
    try:
        reference = _outputs(permuted, arguments)
        try:
            groups = ChannelGroups(permuted, arguments)
        except Exception as error:  # noqa: BLE001 -- tracing runs the network's own code on proxies
            reason = str(error).strip().partition("\n")[0]
            return Permuted(permuted, (), f"not permuted: torch.fx cannot trace it ({reason})")
        layers = _layers(modules, blocks, groups)
        before = {layer.name: layer.log_det() for layer in layers}
        found = [
            (group, _search(group, readers, swaps, np.random.default_rng([seed, number])))
            for number, group in enumerate(groups.free())
            if (readers := [layer for layer in layers if layer.places(group)])
        ]
        refused = _apply(permuted, groups, found, arguments, reference)
        after = {layer.name: layer.log_det() for layer in _layers(modules, blocks, groups)}
    finally:
        for module, training in modes.items():
            module.training = training
    notice = "" if layers else "not permuted: no layer's blocks reach over channels that may move"
    if refused:
        notice = f"{refused} of {len(found)} groups were put back: they changed the outputs"
    report = tuple(PermutedLayer(name, before[name], after[name]) for name in before)
    return Permuted(permuted, report, notice)


class _Layer:
    """The blocks of one layer under the permutation so far."""

    def __init__(self, name: str, rows: Tensor, block: int, taps: int, runs: Runs) -> None:
        self.name, self._block = name, block
        # (R, Co): a column of the weight lies together.
        self._columns = rows.detach().float().cpu().numpy().T.copy()
        self._order = np.arange(len(self._columns))
        self._count = self._columns.size // block
        self._places: dict[int, list[tuple[int, int]]] = {}
        start = 0
        for run in runs:
            width = run.repeat * taps
            if not run.frozen() and width % block:
                self._places.setdefault(id(run.root()), []).append((start, width))
            start += run.count * width
        blocks = np.arange(len(self._columns) // block)
        self._moments, self._sums = self._blocks(self._order, blocks)
        self._second, self._first = self._moments.sum(0), self._sums.sum(0)
        variance = np.trace(self._second) / self._count / block
        self._ridge = np.eye(block) * max(1e-6 * variance, np.finfo(float).tiny)

    @property
    def weight(self) -> int:
        """Number of blocks."""
        return self._count

    def places(self, group: Channels) -> list[tuple[int, int]]:
        """Return (first column, columns a channel) of each run of a group that matters here."""
        return self._places.get(id(group), [])

    def log_det(self) -> float:
        """Return log det of the covariance as it stands."""
        return self._log_det(self._second, self._first)

    def _log_det(self, second: NDArray[np.float64], first: NDArray[np.float64]) -> float:
        mean = first / self._count
        covariance = second / self._count - np.outer(mean, mean) + self._ridge
        return float(np.linalg.slogdet(covariance)[1])

    def _blocks(
        self, order: NDArray[np.int64], which: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        moments = np.empty((len(which), self._block, self._block))
        sums = np.empty((len(which), self._block))
        for at in range(0, len(which), 64):  # bounded memory
            part = slice(at, at + 64)
            values = self._columns[order.reshape(-1, self._block)[which[part]]]  # (b, d, Co)
            # einsum without BLAS: the same sums for any number of threads.
            moments[part] = np.einsum("bic,bjc->bij", values, values)
            sums[part] = values.sum(2)
        return moments, sums

    def swapped(self, group: Channels, i: int, j: int) -> _Swap:
        """Return what the layer would be with slots i and j of a group exchanged."""
        order = self._order.copy()
        touched = []
        for start, width in self.places(group):
            a, b = start + i * width, start + j * width
            order[a : a + width], order[b : b + width] = (
                self._order[b : b + width],
                self._order[a : a + width],
            )
            touched += [
                np.arange(at // self._block, (at + width - 1) // self._block + 1) for at in (a, b)
            ]
        which = np.unique(np.concatenate(touched))
        moments, sums = self._blocks(order, which)
        second = self._second + (moments - self._moments[which]).sum(0)
        first = self._first + (sums - self._sums[which]).sum(0)
        return _Swap(order, which, moments, sums, second, first, self._log_det(second, first))

    def accept(self, swap: _Swap) -> None:
        """Make a swap."""
        self._order = swap.order
        self._moments[swap.which], self._sums[swap.which] = swap.moments, swap.sums
        self._second, self._first = swap.second, swap.first

    def arrange(self, group: Channels, permutation: NDArray[np.int64]) -> None:
        """Put channel `permutation[i]` of a group into its slot i."""
        for start, width in self.places(group):
            within = start + np.arange(width)
            self._order[start : start + width * len(permutation)] = (
                permutation[:, None] * width + within
            ).ravel()
        self._moments, self._sums = self._blocks(self._order, np.arange(len(self._moments)))
        self._second, self._first = self._moments.sum(0), self._sums.sum(0)

    def dealt(self, group: Channels) -> NDArray[np.int64]:
        """Return the permutation that deals channels, by variance, into the block's positions."""
        start, width = self.places(group)[0]
        columns = self._columns[start : start + width * group.count]
        variances = columns.var(1).reshape(group.count, width).mean(1)
        positions = (start + width * np.arange(group.count)) % self._block
        permutation = np.empty(group.count, np.int64)
        permutation[positions.argsort(kind="stable")] = (-variances).argsort(kind="stable")
        return permutation


@dataclass(frozen=True)
class _Swap:
    order: NDArray[np.int64]
    which: NDArray[np.int64]
    moments: NDArray[np.float64]
    sums: NDArray[np.float64]
    second: NDArray[np.float64]
    first: NDArray[np.float64]
    log_det: float


def _layers(
    modules: Mapping[str, nn.Module], blocks: Mapping[str, int], groups: ChannelGroups
) -> list[_Layer]:
    layers = []
    for name, block in blocks.items():
        layout = layout_of(modules[name]) if name in modules else None
        if layout is None or layout.groups > 1:
            continue
        weight: Tensor = modules[name].weight  # type: ignore[assignment]  # layers have one
        runs = groups.reading(weight, 0 if layout.kind == "conv_transpose" else 1)
        if any(not run.frozen() and run.repeat * layout.taps % block for run in runs):
            layers.append(_Layer(name, layout.to_rows(weight), block, layout.taps, runs))
    return layers


def _search(
    group: Channels, readers: list[_Layer], swaps: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Return the permutation found: slot i takes channel `permutation[i]`."""

    def total() -> float:
        return sum(layer.weight * layer.log_det() for layer in readers)

    permutation = np.arange(group.count)
    best = total()
    dealt = max(readers, key=lambda layer: layer.weight).dealt(group)
    for layer in readers:
        layer.arrange(group, dealt)
    if (reached := total()) < best:
        permutation, best = dealt, reached
    else:
        for layer in readers:
            layer.arrange(group, permutation)
    for i, j in generator.integers(group.count, size=(min(swaps, group.count**2), 2)).tolist():
        if i == j:
            continue
        tried = [layer.swapped(group, i, j) for layer in readers]
        reached = sum(
            layer.weight * swap.log_det for layer, swap in zip(readers, tried, strict=True)
        )
        if reached < best:
            best = reached
            permutation[[i, j]] = permutation[[j, i]]
            for layer, swap in zip(readers, tried, strict=True):
                layer.accept(swap)
    return permutation


def _apply(
    model: nn.Module,
    groups: ChannelGroups,
    found: list[tuple[Channels, NDArray[np.int64]]],
    arguments: tuple[Tensor, ...],
    reference: list[Tensor],
) -> int:
    """Permute the parameters; return how many groups had to be put back."""
    for group, permutation in found:
        _move(groups, group, permutation)
    if _same(_outputs(model, arguments), reference):
        return 0
    for group, permutation in found:
        _move(groups, group, permutation.argsort())
    refused = 0
    for group, permutation in found:
        _move(groups, group, permutation)
        if not _same(_outputs(model, arguments), reference):
            _move(groups, group, permutation.argsort())
            refused += 1
    return refused


@torch.no_grad()
def _move(groups: ChannelGroups, group: Channels, permutation: NDArray[np.int64]) -> None:
    for use in groups.uses:
        index = np.arange(use.tensor.shape[use.dim])
        start = 0
        for run in use.runs:
            length = run.count * run.repeat
            if run.root() is group:
                entries = permutation[:, None] * run.repeat + np.arange(run.repeat)
                index[start : start + length] = start + entries.ravel()
            start += length
        if (index != np.arange(len(index))).any():
            picked = torch.from_numpy(index).to(use.tensor.device)
            use.tensor.copy_(use.tensor.index_select(use.dim, picked))


@torch.no_grad()
def _outputs(model: nn.Module, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(*arguments)) if isinstance(leaf, Tensor)]


def _same(ours: list[Tensor], reference: list[Tensor]) -> bool:
    return all(
        bool((mine - theirs).abs().max() <= TOLERANCE * theirs.abs().max())
        for mine, theirs in zip(ours, reference, strict=True)
    )
