"""The part of a network that an adaptation may change, and the proof that nothing else did.

FixRes (arXiv 1906.06423, section 4) trains the classifier and the last batch norm while the rest of
the network stays in eval mode. `Adaptation` is that network, for any training loop.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from remanence.errors import InputError
from remanence.learn.fixres.layers import find_head, find_last_norms, modules_of
from remanence.learn.fixres.norm_graph import (
    norm_graph,
)
from remanence.modes import evaluating

SCOPES: Final = (
    "none",
    "bn_stats",
    "equalize",
    "classifier",
    "released",
    "classifier+last_bn",
    "head_block",
    "last_stage",
    "full",
)
MIN_VALUES: Final = 64  # per channel, below which batch statistics are too noisy to train with
_STATISTICS: Final = ("running_mean", "running_var")


class Adaptation(nn.Module):
    """A classifier of which only one scope can train.

    | scope                | trainable                     | in train mode  |
    |----------------------|-------------------------------|----------------|
    | `none`               | nothing                       | nothing        |
    | `bn_stats`           | nothing                       | nothing        |
    | `equalize`           | nothing                       | nothing        |
    | `classifier`         | head                          | nothing        |
    | `released`           | head                          | last BatchNorm |
    | `classifier+last_bn` | head, last norm               | last BatchNorm |
    | `head_block`         | from the last layer to head   | last BatchNorm |
    | `last_stage`         | from the last stage to head   | its BatchNorms |
    | `full`               | everything                    | everything     |

    `train()` obeys that table, so dropout, drop-path and every other norm stay as in inference,
    except under `full`. Under `bn_stats` the last BatchNorm's statistics may move
    (`recalibrate_bn_`), under `equalize` the head (an affine map is folded in). `released` is what
    the authors' code does: the last BatchNorm's statistics move but its affine part does not.
    `head_block` (arXiv 2003.08237) is the layer that feeds the last norm, that norm, and all that
    runs after it: an EfficientNet's `conv_head`, `bn2` and `classifier`. `last_stage` is all that
    runs after the last but one feature stage that timm declares (`feature_info`); elsewhere it is
    the last child with several layers, inside the module that holds most of the network, and
    all that runs after it.

    Args:
        model: any classifier; changed in place (`requires_grad` and modes), not copied.
        scope: one of `SCOPES`.
        example: (1, 3, K, K) image of the size to adapt to.
        num_classes: number of classes, to find the head where timm does not name it.

    Attributes:
        model: the classifier; `adaptation.model.state_dict()` has the classifier's own keys.
        head: name of the head.
        last_norms: names of the last norms before pooling.
        trainable: names of the parameters that train.
        moving: names of the `state_dict()` tensors that the scope may change.
        cells: values per channel and image in the last BatchNorm, for `check_batch`; None when the
            scope trains with no batch statistics there.

    Raises:
        InputError: unknown scope, quantised or BN-folded model, no head, or no stages to choose
            the last of.
    """

    def __init__(
        self, model: nn.Module, scope: str, example: Tensor, num_classes: int | None = None
    ) -> None:
        super().__init__()
        if scope not in SCOPES:
            raise InputError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
        _refuse_converted(model)
        self.model = model
        self.scope = scope
        self.head, head = find_head(model, num_classes, example)
        if not any(p.is_floating_point() for p in head.parameters()):
            raise InputError(f"head {self.head!r} has no float weights: adapt before quantising")
        self.last_norms = find_last_norms(model, example)

        modules = self._modules_in_scope(example)
        state = model.state_dict(keep_vars=True)
        chosen = {id(p) for m in modules for p in model.get_submodule(m).parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen and parameter.is_floating_point())
        self.trainable = [name for name, tensor in state.items() if tensor.requires_grad]

        norms = modules_of(model, _BatchNorm)
        prefixes = [f"{m}." if m else "" for m in modules]
        if scope in ("released", "classifier+last_bn", "head_block"):
            self._live_norms = [n for n in norms if n in self.last_norms]
        elif scope in ("last_stage", "full"):
            self._live_norms = [n for n in norms if any(f"{n}.".startswith(m) for m in prefixes)]
        else:
            self._live_norms = []

        moving = set(self.trainable)
        if scope == "equalize":
            moving.update(n for n in state if n.startswith(f"{self.head}."))
        if scope == "bn_stats":
            moving.update(f"{n}.{s}" for n in self.last_norms for s in _STATISTICS)
        for name in self._live_norms:
            moving.update(f"{name}.{s}" for s in (*_STATISTICS, "num_batches_tracked"))
        self.moving = [name for name in state if name in moving]

        self.cells = None
        last = {n: norms[n] for n in self.last_norms if n in self._live_norms}
        if last and not all(isinstance(m, nn.SyncBatchNorm) for m in last.values()):
            self.cells = min(norm_graph(model, last, example).cells.values())
        self.train()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the classifier."""
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set train mode as the scope demands: see the table above."""
        super().train(mode and self.scope == "full")
        for name in self._live_norms:
            # The flag alone: timm's norms hold activations and dropout as children.
            self.model.get_submodule(name).training = mode
        self.training = mode
        return self

    def check(self, before: Mapping[str, str]) -> None:
        """Raise when a tensor outside the scope has changed.

        Args:
            before: `hash_state(adaptation.model)` from before the adaptation.

        Raises:
            RuntimeError: names the tensors that should not have moved.
        """
        strayed = sorted(
            set(changed_tensors(before, hash_state(self.model))).difference(self.moving)
        )
        if strayed:
            raise RuntimeError(f"scope {self.scope!r} must not change {', '.join(strayed)}")

    def _modules_in_scope(self, example: Tensor) -> list[str]:
        """Name the modules whose parameters train; '' is the whole model."""
        match self.scope:
            case "classifier" | "released":
                return [self.head]
            case "classifier+last_bn":
                return [self.head, *self.last_norms]
            case "head_block":
                return [self.head, *_head_block(self.model, self.last_norms, self.head, example)]
            case "last_stage":
                return [self.head, *_last_stage(self.model, self.head, example)]
            case "full":
                return [""]
        return []


def check_batch(batch_size: int, cells: int) -> None:
    """Refuse a batch too small for batch statistics.

    Args:
        batch_size: images per device and step.
        cells: values per channel and image in the last BatchNorm (`Adaptation.cells`).

    Raises:
        InputError: fewer than 64 values per channel.
    """
    if batch_size * cells < MIN_VALUES:
        raise InputError(
            f"batch of {batch_size} x {cells} cells leaves {batch_size * cells} values per channel "
            f"for batch statistics, below {MIN_VALUES}: use at least "
            f"{math.ceil(MIN_VALUES / cells)} images per device, SyncBatchNorm, or the scope "
            "'classifier' or 'bn_stats'"
        )


def hash_state(model: nn.Module) -> dict[str, str]:
    """Hash every tensor of `model.state_dict()` (dtype, shape and bytes) with SHA-256."""
    return {name: _hash(tensor) for name, tensor in model.state_dict().items()}


def changed_tensors(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """List the tensors whose hash differs, or that only one side has, sorted."""
    return sorted(n for n in {*before, *after} if before.get(n) != after.get(n))


def _hash(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(raw.data)
    return digest.hexdigest()


def _refuse_converted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantized")):
            raise InputError(
                f"module {name!r} is quantised or has its BatchNorm folded in: "
                "adapt the float model first, then convert it"
            )


def _execution(model: nn.Module, example: Tensor) -> dict[str, tuple[int, int]]:
    """Map every module that runs to the times of its first start and last end."""
    clock = 0
    times: dict[str, tuple[int, int]] = {}

    def tick() -> int:
        nonlocal clock
        clock += 1
        return clock

    handles = []
    for name, module in model.named_modules():

        def start(_module: nn.Module, _args: Any, name: str = name) -> None:
            times.setdefault(name, (tick(), 0))

        def end(_module: nn.Module, _args: Any, _output: Any, name: str = name) -> None:
            times[name] = (times[name][0], tick())

        handles += [module.register_forward_pre_hook(start), module.register_forward_hook(end)]
    try:
        with torch.no_grad(), evaluating(model):
            model(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    for name, _ in model.named_modules():
        inner = [t for n, t in times.items() if n.startswith(f"{name}.")]
        if name not in times and inner:  # a ModuleList, which never runs itself
            times[name] = min(t[0] for t in inner), max(t[1] for t in inner)
    return times


def _head_block(model: nn.Module, norms: list[str], head: str, example: Tensor) -> list[str]:
    """Name the layers that feed the last norms, these norms, and all that runs after them."""
    times = _execution(model, example)
    layers = [n for n in modules_of(model, (nn.Conv2d, nn.Linear)) if n in times]
    block = set(norms)
    for name in norms or [head]:
        feeding = [n for n in layers if times[n][1] < times[name][0]]
        block.update(sorted(feeding, key=lambda n: times[n])[-1:])
    cut = max(times[n][1] for n in norms or [head])
    return [n for n, (start, _) in times.items() if n in block or start > cut]


def _last_stage(model: nn.Module, head: str, example: Tensor) -> list[str]:
    """Name the modules that run after the last but one feature stage."""
    times = _execution(model, example)
    info = getattr(model, "feature_info", None)
    if isinstance(info, list) and len(info) > 1 and info[-2].get("module") in times:
        cut = times[info[-2]["module"]][1]
        return [n for n, (start, _) in times.items() if start > cut]

    layers = [n for n in modules_of(model, (nn.Conv2d, nn.Linear)) if n != head and n in times]

    def inside(name: str) -> int:
        return sum(n.startswith(f"{name}.") for n in layers)

    stage = ""
    while True:
        prefix = f"{stage}." if stage else ""
        children = [f"{prefix}{n}" for n, _ in model.get_submodule(stage).named_children()]
        blocks = [n for n in children if n in times and inside(n) > 1]
        if not blocks or (stage and inside(stage) <= len(layers) / 2):
            break
        stage = max(blocks, key=lambda n: times[n])
    if not stage:
        raise InputError(
            "the model has no stages, only layers: use the scope 'head_block' or 'full'"
        )
    start = times[stage][0]
    return [n for n, (began, _) in times.items() if began >= start]
