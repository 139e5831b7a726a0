"""Training the codewords against the float network, without labels (section 3.3)."""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from remanence.compress.modules.replace import quantised_layers
from remanence.compress.network.calibration import (
    Batch,
    Forward,
    device_of,
    kl_divergence,
    logits_of,
    mean_kl,
    own_randomness,
    rank_and_ranks,
    run,
    sum_over_ranks,
)
from remanence.compress.network.norms import batch_statistics, running_norms
from remanence.compress.quantizer.float16 import round_to_float16
from remanence.errors import InputError
from remanence.modes import evaluating

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from remanence.compress.modules.quantised_layer import QuantisedLayer

Schedule = Literal["step", "cosine", "constant"]
Gradient = Literal["mean", "sum"]
Part = Literal["codebooks", "norms", "biases"]

CHECKS = 10  # looks at the held-out batches, beside the one before the first step


@dataclass(frozen=True)
class CurvePoint:
    """One look at the held-out batches.

    Attributes:
        step: Steps done.
        loss: Mean training loss (KL, nats) since the last look; NaN before the first step.
        holdout_kl: KL(teacher || model) on the held-out batches in nats, codebooks as stored.
    """

    step: int
    loss: float
    holdout_kl: float


def finetune(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    holdout: Iterable[Batch],
    steps: int,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    schedule: Schedule = "step",
    train: Sequence[Part] = ("codebooks",),
    grad: Gradient = "mean",
    layers: Sequence[str] | None = None,
    norms_train: bool = True,
    clip: float = 1.0,
    forward: Forward | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[CurvePoint, ...]:
    """Train a quantised network's codebooks to give the teacher's outputs; codes stay.

    The loss is KL(teacher || model). The state with the lowest KL on the held-out batches is kept,
    which may be the one before the first step. Codebooks end in values that float16 holds. Under
    `torch.distributed` gradients and statistics are averaged over the ranks.

    Args:
        model: A network with quantised layers (a DDP wrapper is looked through); changed in place.
        teacher: The float network; it shares no tensor with the model.
        batches: Unlabelled batches, read again and again.
        holdout: Other batches, read at every look, which choose the state that is kept.
        steps: Optimiser steps.
        lr: Learning rate.
        momentum: Momentum of SGD; Adam's first decay rate with `grad="sum"`.
        weight_decay: Of everything that is trained.
        schedule: `step` divides the rate by 10 half way, `cosine` lets it fall to 0.
        train: What is trained: codebooks, scales and shifts of norms, biases.
        grad: `mean` divides a codeword's gradient by the number of its blocks and takes SGD, as the
            paper does; `sum` leaves it and takes Adam, as arXiv 2010.15703 does (its rate: 1e-3).
        layers: Quantised layers whose codebooks are trained; all without it.
        norms_train: BatchNorm uses and learns each batch's statistics; otherwise it stays in eval
            mode. Everything else, dropout too, is in eval mode.
        clip: Largest norm of the gradient; infinity for none.
        forward: See `calibration.run`.
        seed: For a forward that draws random numbers.
        on_step: Gets the number of steps done and the loss.

    Returns:
        The curve; the kept state is its lowest `holdout_kl`.

    Raises:
        InputError: An option is out of range, the model has no such quantised layer, shares a
            tensor with the teacher or gives no logits, or the loss is not finite.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    _check_options(steps, lr, schedule, train, grad)
    _check_apart(model, teacher)
    chosen = _chosen(model, layers)
    parameters = _parameters(model, chosen, train)
    optimiser: torch.optim.Optimizer
    if grad == "mean":
        optimiser = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    else:
        optimiser = torch.optim.Adam(
            parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay
        )
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(schedule, step, steps))
    state = [*parameters, *(_statistics(model) if norms_train else ())]

    curve: list[CurvePoint] = []
    best: list[Tensor] = []
    losses: list[float] = []
    stream = _cycle(batches)
    with ExitStack() as stack:
        stack.enter_context(own_randomness(device_of(model), seed))
        stack.enter_context(_training_only(model, parameters))
        stack.enter_context(evaluating(teacher))
        if grad == "mean" and "codebooks" in train:
            stack.enter_context(mean_gradients(chosen))
        for step in range(steps + 1):
            if step % max(1, steps // CHECKS) == 0 or step == steps:
                _average_over_ranks(state[len(parameters) :])
                with _stored_codebooks(chosen):
                    kl = mean_kl(teacher, model, holdout, forward)
                    if kl is None or not math.isfinite(kl):
                        raise InputError(
                            f"the held-out KL is {kl} at step {step}; give held-out batches and a "
                            "`forward` that returns logits, or lower the learning rate"
                        )
                    if not curve or kl < min(point.holdout_kl for point in curve):
                        best = [tensor.detach().clone() for tensor in state]
                mean_loss = sum(losses) / len(losses) if losses else math.nan
                curve.append(CurvePoint(step, mean_loss, kl))
                losses = []
            if step == steps:
                break
            loss = _step(model, teacher, next(stream), parameters, norms_train, clip, forward)
            optimiser.step()
            rates.step()
            losses.append(loss)
            if on_step is not None:
                on_step(step + 1, loss)
        with torch.no_grad():
            for tensor, value in zip(state, best, strict=True):
                tensor.copy_(value)
    return tuple(curve)


def _step(
    model: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    parameters: list[nn.Parameter],
    norms_train: bool,
    clip: float,
    forward: Forward | None,
) -> float:
    with torch.no_grad():
        expected = logits_of(run(teacher, batch, forward))
    with batch_statistics(model) if norms_train else evaluating(model), torch.enable_grad():
        actual = logits_of(run(model, batch, forward))
        if expected is None or actual is None:
            raise InputError("the model gives no logits; give a `forward` that returns them")
        if expected.ndim == 2 and expected.shape[1] == 1:
            raise InputError("the model gives one logit, of which the KL is 0; give a `forward`")
        loss = kl_divergence(expected, actual)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]  # torch's, half typed
    if not bool(loss.isfinite()):
        raise InputError("the loss is not finite; lower the learning rate")
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    _average_over_ranks([parameter.grad for parameter in parameters if parameter.grad is not None])
    nn.utils.clip_grad_norm_(parameters, clip)
    return loss.item()


@contextmanager
def mean_gradients(layers: Iterable[QuantisedLayer]) -> Iterator[None]:
    """Divide each codeword's gradient by the number of blocks that it stands for.

    With SGD this is the paper's rule: the gradients of a codeword's blocks are averaged.

    Args:
        layers: Quantised layers; a codebook that several share is divided once.
    """
    hooks = []
    try:
        for layer in {id(layer.codebook): layer for layer in layers}.values():
            counts = torch.bincount(layer.codes.flatten().long(), minlength=len(layer.codebook))
            divisor = counts.clamp_min(1).unsqueeze(1)  # a codeword without blocks has gradient 0
            hook = layer.codebook.register_hook(lambda g, n=divisor: g / n)  # type: ignore[no-untyped-call]  # torch's, untyped
            hooks.append(hook)
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _stored_codebooks(layers: Iterable[QuantisedLayer]) -> Iterator[None]:
    """Round codebooks to float16 for a look, and go on from the unrounded ones."""
    codebooks = [layer.codebook for layer in layers]
    unrounded = [codebook.detach().clone() for codebook in codebooks]
    with torch.no_grad():
        for codebook in codebooks:
            codebook.copy_(round_to_float16(codebook.detach().float())[0])
        try:
            yield
        finally:
            for codebook, value in zip(codebooks, unrounded, strict=True):
                codebook.copy_(value)


@contextmanager
def _training_only(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to some parameters alone; flags and old gradients are put back."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        model.requires_grad_(requires_grad=False)
        for parameter in parameters:
            parameter.requires_grad_()
        yield
    finally:
        for parameter, flag, old in before:
            parameter.requires_grad_(flag)
            parameter.grad = old


def _chosen(model: nn.Module, names: Sequence[str] | None) -> list[QuantisedLayer]:
    found = quantised_layers(model)
    if not found:
        raise InputError("the model has no quantised layer; compress it first")
    unknown = [name for name in names or () if name not in found]
    if unknown:
        raise InputError(
            f"no quantised layer is called {unknown[0]!r}; there are {', '.join(found)}"
        )
    return [found[name] for name in (found if names is None else names)]


def _parameters(
    model: nn.Module, chosen: list[QuantisedLayer], train: Sequence[Part]
) -> list[nn.Parameter]:
    wanted: list[Tensor] = []
    if "codebooks" in train:
        wanted += [layer.codebook for layer in chosen]
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            part = "norms" if is_norm else "biases" if name.endswith("bias") else ""
            if part in train:
                wanted.append(parameter)
    unique = {id(parameter): parameter for parameter in wanted}
    return [parameter for parameter in unique.values() if isinstance(parameter, nn.Parameter)]


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    for norm in running_norms(model).values():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        yield norm.running_mean
        yield norm.running_var


def _average_over_ranks(tensors: Iterable[Tensor]) -> None:
    ranks = rank_and_ranks()[1]
    if ranks > 1:
        for tensor in tensors:
            tensor.copy_(sum_over_ranks(tensor) / ranks)


def _cycle(batches: Iterable[Batch]) -> Iterator[Batch]:
    steps = 0
    while True:
        before = steps
        for batch in batches:
            steps += 1
            yield batch
        if steps == before:
            raise InputError(
                f"the batches ran out after {steps} steps; give a list or a loader that can be "
                "read again and again"
            )


def _rate(schedule: Schedule, step: int, steps: int) -> float:
    if schedule == "step":
        return 1.0 if 2 * step < steps else 0.1
    if schedule == "cosine":
        return (1 + math.cos(math.pi * step / steps)) / 2
    return 1.0


def _check_options(steps: int, lr: float, schedule: str, train: Sequence[str], grad: str) -> None:
    if steps < 1:
        raise InputError(f"{steps} steps: give at least 1")
    if not 0 < lr < math.inf:
        raise InputError(f"learning rate {lr}: give a positive number, for example 0.05")
    for name, value, legal in (
        ("schedule", schedule, get_args(Schedule)),
        ("grad", grad, get_args(Gradient)),
        *(("train", part, get_args(Part)) for part in train),
    ):
        if value not in legal:
            raise InputError(f"{name} {value!r} is unknown: give one of {legal}")
    if not train:
        raise InputError(f"nothing to train: give one of {get_args(Part)}")


def _check_apart(model: nn.Module, teacher: nn.Module) -> None:
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
        if tensor.numel() and tensor.untyped_storage().data_ptr() in ours:
            raise InputError(f"model and teacher share {name}; give a copy of the float network")
