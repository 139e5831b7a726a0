"""One training loop for every method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from remanence.errors import InputError
from remanence.kit.devices import seed_all, sum_over_processes
from remanence.kit.progress import bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_fabric import Fabric

    from remanence.kit.batches import Batch
    from remanence.kit.run import RunFolder

Schedule = Literal["cosine", "one-cycle", "constant"]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: Passes over the data.
        lr: Peak learning rate.
        optimizer: Any of timm's optimisers; `sgd` is SGD with Nesterov momentum.
        momentum: Momentum, where the optimiser has one.
        weight_decay: Weight decay of matrices and kernels; biases and norms have none.
        schedule: Cosine to zero, one-cycle (up to the peak in 0.3 of the run, then to zero), or
            constant.
        warmup_epochs: Epochs of linear warm-up, for cosine and constant.
        clip: Largest gradient norm, if any.
        ema: Decay of the averaged weights, if any; warmed up as min(ema, (1+t)/(10+t)).
        seed: Seed of every random draw of a step.
        compile: Compile the network with torch.compile.
        checkpoint_steps: Steps between checkpoints beside the one of each epoch, if any.
    """

    epochs: int
    lr: float
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    warmup_epochs: float = 0.0
    clip: float | None = None
    ema: float | None = None
    seed: int = 0
    compile: bool = False
    checkpoint_steps: int | None = None

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate at `step`, as a fraction of its peak.

        Args:
            step: Steps done before this one.
            steps_per_epoch: Steps an epoch.

        Returns:
            A fraction in [0, 1].
        """
        total = max(1, self.epochs * steps_per_epoch)
        if self.schedule == "one-cycle":
            rise = 0.3 * total
            if step < rise:
                return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * step / rise))
            return 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))


class EpochSource(Protocol):
    """Where `fit` gets its batches."""

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from step `start` on."""
        ...


@dataclass
class Training:
    """The state of a training run, as callbacks see it.

    Attributes:
        model: The network that is trained.
        optimizer: Its optimiser.
        averaged: The network with averaged weights, if the recipe asks for it.
        step: Steps done.
        epoch: Epoch under way.
        loss: Mean loss of the epoch so far.
        sums: Sum of losses and count of samples of the epoch so far, when it was interrupted.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averaged: ModelEmaV3 | None
    step: int = 0
    epoch: int = 0
    loss: float = math.nan
    sums: tuple[float, float] = (0.0, 0.0)

    @property
    def best(self) -> nn.Module:
        """The network to evaluate: the averaged one where there is one."""
        return self.model if self.averaged is None else self.averaged.module


def fit(
    fabric: Fabric,
    model: nn.Module,
    batches: EpochSource,
    recipe: Recipe,
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    run: RunFolder | None = None,
    stage: str = "train",
    before_epoch: Sequence[Callable[[Training], None]] = (),
    after_step: Sequence[Callable[[Training], None]] = (),
    after_epoch: Sequence[Callable[[Training], dict[str, float]]] = (),
) -> nn.Module:
    """Train a network.

    Each step is seeded by (seed, step), so a run that goes on from a checkpoint ends with the same
    weights, bit for bit on a CPU, as one that was never interrupted. In several processes the loss
    is weighted such that the gradient is that of the mean over all samples of the step, and the
    statistics of batch norms are averaged at the end of each epoch.

    Args:
        fabric: Launched Fabric.
        model: Network; its parameters that require no gradient are left alone.
        batches: Batches by epoch.
        recipe: How to train.
        loss: Mean loss of a network on a batch. Inputs are moved to the device beforehand.
        run: Run folder for metrics and checkpoints, if any; a resumed one is taken up.
        stage: Name of this training within the run.
        before_epoch: Called before each epoch.
        after_step: Called after each step.
        after_epoch: Called after each epoch; what they return goes to `metrics.jsonl`.

    Returns:
        The trained network, with averaged weights where the recipe asks for them, in eval mode.

    Raises:
        InputError: The loss became NaN or infinite, or nothing can be trained.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("nothing to train: every parameter of the network is frozen")
    model = model.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks (device, memory_format)
    optimizer = create_optimizer_v2(
        model,
        opt=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        filter_bias_and_bn=True,
    )
    averaged = None
    if recipe.ema is not None:
        # With these two constants timm's warm-up 1 - (1 + t/9)^-1 is (1 + t)/(10 + t), one step on.
        averaged = ModelEmaV3(
            model, decay=recipe.ema, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0
        )
    training = Training(model, optimizer, averaged)
    saved = run.load_state(stage) if run is not None else None
    if saved is not None:
        _restore(training, saved)
        assert run is not None
        run.keep_metrics({stage: training.step})
    compiled = cast("nn.Module", torch.compile(model)) if recipe.compile else model
    wrapped, wrapped_optimizer = fabric.setup(compiled, optimizer)
    # Fabric copies the optimiser's state to the device; the learning rate is set on what it keeps.
    groups = optimizer.param_groups
    peaks = [group.get("lr_scale", 1.0) * recipe.lr for group in groups]
    steps = batches.steps
    total = steps * recipe.epochs
    first = fabric.is_global_zero
    with bar(stage, total, done=training.step, show=first) as progress:
        for epoch in range(training.step // steps, recipe.epochs):
            training.epoch = epoch
            wrapped.train()
            for callback in before_epoch:
                callback(training)
            losses = torch.tensor(training.sums[0], dtype=torch.float64, device=fabric.device)
            seen = training.sums[1]
            training.sums = (0.0, 0.0)
            for batch in batches.epoch(epoch, training.step % steps):
                seed_all(recipe.seed, training.step)
                for group, peak in zip(groups, peaks, strict=True):
                    group["lr"] = peak * recipe.factor(training.step, steps)
                moved = batch._replace(
                    inputs=fabric.to_device(batch.inputs), labels=fabric.to_device(batch.labels)
                )
                value = loss(wrapped, moved)
                fabric.backward(value * batch.weight)
                if recipe.clip is not None:
                    fabric.clip_gradients(wrapped, wrapped_optimizer, max_norm=recipe.clip)
                wrapped_optimizer.step()
                wrapped_optimizer.zero_grad(set_to_none=True)
                if averaged is not None:
                    averaged.update(model, step=training.step + 2)
                training.step += 1
                count = len(batch.labels)
                losses += value.detach() * count
                seen += count  # on the host: a copy to the device would wait for it
                if training.step % 20 == 0:
                    training.loss = _checked(losses, seen, training.step, recipe)
                    progress.note(f"loss {training.loss:.3f}")
                progress.advance()
                for callback in after_step:
                    callback(training)
                every = recipe.checkpoint_steps
                if run is not None and every and training.step % every == 0:
                    within = training.step % steps != 0
                    training.sums = (float(losses), seen) if within else (0.0, 0.0)
                    run.save_state(stage, _snapshot(training))
                    training.sums = (0.0, 0.0)
            losses, counted = sum_over_processes(
                fabric, torch.stack([losses, losses.new_tensor(seen)])
            )
            _average_running_statistics(fabric, model)
            training.loss = _checked(losses, float(counted), training.step, recipe)
            rate = groups[0]["lr"]
            metrics: dict[str, float] = {"loss": training.loss, "lr": rate}
            for report in after_epoch:
                metrics |= report(training)
            progress.note("  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k != "lr"))
            if run is not None:
                run.log(stage=stage, step=training.step, epoch=epoch + 1, **metrics)
                run.save_state(stage, _snapshot(training))
    return training.best.eval()


def _checked(losses: Tensor, seen: float, step: int, recipe: Recipe) -> float:
    mean = float(losses) / max(seen, 1.0)
    if not math.isfinite(mean):
        raise InputError(
            f"the loss is {mean} at step {step}: lower the learning rate ({recipe.lr:g}) "
            "or clip gradients"
        )
    return mean


def _average_running_statistics(fabric: Fabric, model: nn.Module) -> None:
    if fabric.world_size == 1:
        return
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(sum_over_processes(fabric, buffer) / fabric.world_size)


def _snapshot(training: Training) -> dict[str, Any]:
    return {
        "step": training.step,
        "sums": list(training.sums),
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "averaged": None if training.averaged is None else training.averaged.state_dict(),
    }


def _restore(training: Training, saved: dict[str, Any]) -> None:
    training.step = int(saved["step"])
    training.sums = (float(saved["sums"][0]), float(saved["sums"][1]))
    training.model.load_state_dict(saved["model"])
    training.optimizer.load_state_dict(saved["optimizer"])
    if training.averaged is not None:
        training.averaged.load_state_dict(saved["averaged"])
