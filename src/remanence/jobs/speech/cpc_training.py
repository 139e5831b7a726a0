"""The training loop of `remanence speech cpc`, which goes on after an interruption."""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.speech.cpc_validation import KINDS, Validation, by_step
from remanence.jobs.speech.cpc_waves import Waves
from remanence.kit.devices import seed_all, sum_over_processes
from remanence.kit.progress import Bar, bar
from remanence.kit.run import RunFolder
from remanence.speech.cpc.model import CPC
from remanence.speech.cpc.sampler import WindowSampler, same_speaker
from remanence.speech.cpc.training import Contrast, Schedule
from remanence.speech.wavaugment.chain import TwoView

if TYPE_CHECKING:
    from lightning_fabric import Fabric

STAGE = "train"
CHECK = 20  # steps between looks at the loss: a look waits for the device


@dataclass(frozen=True)
class Plan:
    """How long and how to train.

    Attributes:
        schedule: Learning rate by step.
        epochs: Passes at most.
        steps: Steps at most.
        clip: Largest norm of the gradient; None for any.
        patience: Measurements without a better one after which to stop; None to go on.
        abx_every: Epochs between ABX errors.
        checkpoint_steps: Steps between checkpoints beside that of each epoch.
        seed: Of every random draw.
    """

    schedule: Schedule
    epochs: int | None
    steps: int | None
    clip: float | None
    patience: int | None
    abx_every: int
    checkpoint_steps: int
    seed: int


@dataclass
class Progress:
    """How far training is.

    Attributes:
        step: Steps done.
        epoch: Epoch under way, from 0.
        done: Batches of it that are done.
        sums: Losses, then accuracies, of each step ahead, summed over the windows of this epoch on
            this process (2, K), float64.
        windows: These windows.
        same_speaker: Summed chances of a negative of the same speaker.
        seconds: Spent on steps.
        best: Row of the best measurement so far.
        weights: Its weights.
        worse: Measurements since.
    """

    sums: Tensor
    step: int = 0
    epoch: int = 0
    done: int = 0
    windows: int = 0
    same_speaker: float = 0.0
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    worse: int = 0


def train(
    fabric: Fabric,
    run: RunFolder,
    model: CPC,
    contrast: Contrast,
    view: TwoView | None,
    sampler: WindowSampler,
    waves: Waves,
    validation: Validation,
    plan: Plan,
) -> Progress:
    """Train a network, leave it with the best weights, and return how it went.

    Each step is seeded by (seed, process, step): what goes on from a checkpoint ends with the same
    weights, bit for bit on a CPU, as what was never interrupted.

    Raises:
        InputError: The loss became NaN or infinite, a recording cannot be read any more, or the
            interrupted run had another number of processes.
    """
    optimizer = torch.optim.Adam(model.parameters(), plan.schedule.peak)
    steps_ahead = int(model.config["steps"])
    now = Progress(torch.zeros(2, steps_ahead, dtype=torch.float64))
    saved = run.load_state(STAGE)
    if saved is not None:
        before = saved.pop("processes")
        if before != fabric.world_size:
            raise InputError(
                f"number of processes: the interrupted run in {run.partial} had {before}, not "
                f"{fabric.world_size}; give the same to resume"
            )
        model.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        now = Progress(**saved)
        if not run.first:  # the sums that were saved are those of all processes
            now.sums, now.windows, now.same_speaker = torch.zeros_like(now.sums), 0, 0.0
        run.keep_metrics({STAGE: now.step})
    wrapped, wrapped_optimizer = fabric.setup(contrast, optimizer)
    now.sums = now.sums.to(fabric.device)
    if saved is None:
        _measure(fabric, run, model, validation, plan, now, {}, last=False)
        _save(fabric, run, model, optimizer, now)
    everywhere = contrast.loss.scope == "global"
    total = _total(plan, sampler)
    with bar(STAGE, total, done=now.step, show=run.first) as progress:
        while not _finished(plan, now):
            sampler.load_state_dict({"epoch": now.epoch, "done": now.done})
            wrapped.train()
            started = time.perf_counter()
            with closing(waves.batches(iter(sampler))) as batches:
                for batch, samples in batches:
                    rate = plan.schedule.rate(now.step, now.epoch)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    past, future = _views(
                        view, fabric.to_device(samples), (plan.seed, fabric.global_rank, now.step)
                    )
                    losses, accuracies = wrapped(past, future)
                    fabric.backward(losses.sum())
                    if plan.clip is not None:
                        fabric.clip_gradients(
                            wrapped,
                            wrapped_optimizer,
                            max_norm=plan.clip,
                            error_if_nonfinite=False,
                        )
                    wrapped_optimizer.step()
                    wrapped_optimizer.zero_grad(set_to_none=True)
                    now.sums += torch.stack((losses, accuracies)).detach() * len(samples)
                    now.windows += len(samples)
                    drawn_from = batch.everyone if everywhere else batch.speakers
                    now.same_speaker += same_speaker(drawn_from) * len(samples)
                    now.step += 1
                    now.done += 1
                    progress.advance()
                    if now.step % CHECK == 0:
                        _note(progress, now, plan)
                    if now.step == plan.steps:
                        break
                    if now.step % plan.checkpoint_steps == 0:
                        now.seconds += time.perf_counter() - started
                        _save(fabric, run, model, optimizer, now)
                        started = time.perf_counter()
            now.seconds += time.perf_counter() - started
            row = _epoch_row(fabric, now)
            _checked(row["loss"], plan, now)
            now.epoch, now.done = now.epoch + 1, 0
            now.sums, now.windows, now.same_speaker = torch.zeros_like(now.sums), 0, 0.0
            row["learning_rate"] = optimizer.param_groups[0]["lr"]
            said = _measure(
                fabric, run, model, validation, plan, now, row, last=_finished(plan, now)
            )
            progress.note(said)
            _save(fabric, run, model, optimizer, now)
    if now.weights:
        model.load_state_dict(now.weights)
    return now


def _total(plan: Plan, sampler: WindowSampler) -> int:
    sampler.set_epoch(0)
    by_epochs = math.inf if plan.epochs is None else plan.epochs * len(sampler)
    return int(min(by_epochs, math.inf if plan.steps is None else plan.steps))


def _finished(plan: Plan, now: Progress) -> bool:
    return (
        (plan.epochs is not None and now.epoch >= plan.epochs)
        or (plan.steps is not None and now.step >= plan.steps)
        or (plan.patience is not None and now.worse >= plan.patience)
    )


def _views(
    view: TwoView | None, samples: Tensor, seeds: tuple[int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """Return past and future, (B, T) each; no future where one copy serves as both."""
    seed_all(*seeds)  # dropout and negatives
    if view is None:
        return samples, None
    state = np.random.SeedSequence((*seeds, 1)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    past, future = view(samples[:, None], generator=generator)
    return past[:, 0], None if past is future else future[:, 0]


def _note(progress: Bar, now: Progress, plan: Plan) -> None:
    losses, accuracies = (now.sums / now.windows).mean(1).tolist()
    _checked(losses, plan, now)
    progress.note(f"loss {losses:.3f}, accuracy {100 * accuracies:.1f} %")


def _checked(loss: float, plan: Plan, now: Progress) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is {loss} at step {now.step}: lower --lr ({plan.schedule.peak:g} "
            "at its peak) or --clip"
        )


def _summed(fabric: Fabric, now: Progress) -> tuple[Tensor, int, float]:
    """Return the sums of all processes."""
    counts = now.sums.new_tensor([now.windows, now.same_speaker])
    summed = sum_over_processes(fabric, torch.cat((now.sums.flatten(), counts)))
    return summed[:-2].reshape(now.sums.shape), int(summed[-2]), float(summed[-1])


def _epoch_row(fabric: Fabric, now: Progress) -> dict[str, float]:
    sums, windows, same = _summed(fabric, now)
    row = by_step("", *(sums / windows).tolist())
    return row | {"windows": windows, "same_speaker": same / windows}


def _measure(
    fabric: Fabric,
    run: RunFolder,
    model: CPC,
    validation: Validation,
    plan: Plan,
    now: Progress,
    row: dict[str, float],
    *,
    last: bool,
) -> str:
    """Measure the network as it is, log it, and keep it where it is the best; say what was seen."""
    with_abx = last or now.epoch % plan.abx_every == 0
    seen = validation.measure(model, abx=with_abx) if run.first else {}
    row = row | fabric.broadcast(seen)
    merit = validation.merit(row)
    run.log(stage=STAGE, step=now.step, epoch=now.epoch, **row)
    # The untrained network is a measure to compare with, and never the best.
    if now.step and merit is not None:
        best = None if now.best is None else validation.merit(now.best)
        if best is None or merit > best:
            now.best = {"step": now.step, "epoch": now.epoch, **row}
            state = model.state_dict()
            now.weights = {name: value.cpu().clone() for name, value in state.items()}
            now.worse = 0
        else:
            now.worse += 1
    # Short: it stands beside a bar on a terminal of 80 columns.
    said = [f"loss {row['loss']:.3f}"] if "loss" in row else []
    if "valid_accuracy" in row:
        said.append(f"held out {100 * row['valid_accuracy']:.1f} %")
    errors = [f"{100 * row[f'abx_{kind}']:.1f}" for kind in KINDS if f"abx_{kind}" in row]
    if errors:
        said.append(f"ABX {' '.join(errors)} %")
    return ", ".join(said)


def _save(
    fabric: Fabric,
    run: RunFolder,
    model: CPC,
    optimizer: torch.optim.Optimizer,
    now: Progress,
) -> None:
    sums, windows, same = _summed(fabric, now)
    state = {name: getattr(now, name) for name in now.__dataclass_fields__}
    state |= {"sums": sums.cpu(), "windows": windows, "same_speaker": same}
    # How many batches of an epoch are done says which only for so many processes.
    state["processes"] = fabric.world_size
    run.save_state(
        STAGE, state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    )
