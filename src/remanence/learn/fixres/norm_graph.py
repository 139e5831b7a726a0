"""Trace which norm of a network follows which, from one forward pass of any `nn.Module`."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remanence.modes import evaluating


@dataclass(frozen=True)
class NormGraph:
    """How the norms of a network follow each other.

    Attributes:
        ancestors: per norm, in order of first execution, the norms that its input depends on.
        calls: per norm, how often it runs in one forward pass.
        cells: per norm, the values per channel and image.
        last: norms that no other norm follows on their way to the sink, in execution order.
        lone: norms that were passed over because they see one value per channel.
    """

    ancestors: dict[str, set[str]]
    calls: Counter[str]
    cells: dict[str, int]
    last: list[str]
    lone: set[str]


def norm_graph(
    model: nn.Module,
    norms: Mapping[str, nn.Module],
    example: Tensor,
    sink: nn.Module | None = None,
    *,
    spatial: bool = False,
) -> NormGraph:
    """Trace which norm's output enters which other norm, and which reach the sink's input.

    Every norm's output is replaced by a fresh autograd leaf of equal value, so that the graph
    behind any tensor ends at the norms just before it. Only the shape of that graph is read, never
    a gradient: a dead ReLU or a zero weight hides nothing.

    Args:
        model: any network; runs in eval mode.
        norms: the modules to trace, by name.
        example: (1, 3, K, K) image.
        sink: the module whose input ends the trace; left out, `last` is empty.
        spatial: pass over norms that see one value per channel.
    """
    leaves: dict[int, str] = {}
    kept: list[Tensor] = []  # keeps the leaves alive, hence their ids unique
    ancestors: dict[str, set[str]] = {}
    calls: Counter[str] = Counter()
    cells: dict[str, int] = {}
    lone: set[str] = set()
    seen: dict[Any, set[str]] = {}
    entering: list[Tensor] = []

    def union(_node: Any, parts: list[set[str]]) -> set[str]:
        return set[str]().union(*parts)

    def newest(node: Any, parts: list[set[str]]) -> set[str]:
        """Drop what another summed path has already been through; concatenation keeps all."""
        if "Cat" in node.name():
            return set[str]().union(*parts)
        return {
            a
            for part in parts
            for a in part
            if not any(a not in other and a in ancestors[b] for other in parts for b in other)
        }

    def cut(name: str) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            size = output.numel() // output.shape[1]
            if spatial and size <= 1:
                lone.add(name)
                return None
            direct = _fold(args[0], leaves, union, seen)
            before = direct.union(*(ancestors[a] for a in direct)) - {name}
            ancestors[name] = ancestors.get(name, set()) | before
            calls[name] += 1
            cells[name] = min(size, cells.get(name, size))
            leaf = output.detach().requires_grad_()
            kept.append(leaf)
            leaves[id(leaf)] = name
            return leaf.clone()  # an in-place ReLU may follow, and may not write on a leaf

        return hook

    handle = (
        sink.register_forward_pre_hook(lambda _, args: entering.append(args[0])) if sink else None
    )
    try:
        with torch.enable_grad(), hooked(norms, cut), evaluating(model):
            model(example[:1])
    finally:
        if handle:
            handle.remove()
    reached = set[str]().union(*(_fold(tensor, leaves, newest, {}) for tensor in entering))
    return NormGraph(ancestors, calls, cells, [n for n in ancestors if n in reached], lone)


def _fold(
    tensor: Tensor,
    leaves: Mapping[int, str],
    merge: Callable[[Any, list[set[str]]], set[str]],
    done: dict[Any, set[str]],
) -> set[str]:
    """Fold the autograd graph behind a tensor from its marked leaves on, without recursion."""
    root: Any = tensor.grad_fn
    if root is None:
        return set()
    stack = [root]
    while stack:
        node = stack[-1]
        inputs = [parent for parent, _ in node.next_functions if parent is not None]
        waiting = [parent for parent in inputs if parent not in done]
        if waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        name = leaves.get(id(getattr(node, "variable", None)))
        done[node] = merge(node, [done[i] for i in inputs]) if name is None else {name}
    return done[root]


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], hook: Callable[[str], Callable[..., Any]]
) -> Iterator[None]:
    """Run a block with the forward hook `hook(name)` on every module."""
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
