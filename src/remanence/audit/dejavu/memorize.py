"""Explicit memorisation: a network learns to tell an arbitrary set of images from the rest.

arXiv 1809.06396, "explicit memorisation". The set is drawn at random from a pool, so nothing but
memory tells its images from the others. The network has one logit; above 0 says "in".
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from remanence.audit.dejavu.intervals import Scores
from remanence.audit.dejavu.memorization_report import MemorizationReport, View, report, view
from remanence.audit.dejavu.sampling import InOutBatchSampler, MembershipTask
from remanence.audit.dejavu.transforms import EVALUATION, Transform
from remanence.errors import InputError

MakeModel = Callable[[], nn.Module]
Progress = Callable[[int, float, float], None]
Optimizer = Literal["adam", "sgd"]
Until = Literal["budget", "plateau"]

CHUNK = 1024  # images a forward pass in evaluation
REPORT_EVERY = 50  # steps


@dataclass(frozen=True)
class Memorizer:
    """A trained network, in eval mode, and what it remembers."""

    model: nn.Module
    report: MemorizationReport


def fit_memorizer(
    make_model: MakeModel,
    images: Tensor,
    task: MembershipTask,
    *,
    transform: Transform | None = None,
    steps: int = 1500,
    until: Until = "budget",
    batch_size: int = 256,
    optimizer: Optimizer = "adam",
    lr: float | None = None,
    views: Mapping[str, Transform] = EVALUATION,
    bfloat16: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Memorizer:
    """Train a network to answer whether an image is in the set, and measure what it holds.

    Every batch is half positives and half negatives in one forward pass: batch normalisation never
    sees one kind alone. Both kinds get the same transform; there is no weight decay.

    Args:
        make_model: makes the network; (B, C, H, W) floats to (B,) or (B, 1) logits.
        images: (P, C, H, W) pool on the device to train on; floats are given to the network as
            they are, uint8 as floats in [0, 1].
        task: which images of the pool are in, out, and unseen.
        transform: of the training images of both kinds; none by default.
        steps: training steps; with "plateau" the most that are made.
        until: "budget" decays the learning rate by a cosine over `steps`. "plateau" keeps it, and
            stops when the balanced accuracy on set and seen negatives gains less than 0.002 over
            3 evaluations.
        batch_size: even; half of it positives.
        optimizer: "adam", or "sgd" with momentum 0.9.
        lr: learning rate; 2e-3 for Adam and 0.05 for SGD by default.
        views: named transforms under which the network is evaluated, each by itself.
        bfloat16: train under autocast to bfloat16.
        seed: of the initialisation, the batches and the transforms.
        progress: called now and then with the step, and loss and accuracy since the last call.

    Returns:
        The network in eval mode and its report.

    Raises:
        InputError: an argument is out of range, the network has not one logit, or the loss is not
            finite.
    """
    _check(images, task, steps, optimizer, until)
    device = images.device
    sampler = InOutBatchSampler(task, batch_size, seed=seed)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = make_model().to(device)
        taken, accuracy = _train(
            model,
            images,
            task,
            sampler,
            transform=transform,
            generator=generator,
            steps=steps,
            until=until,
            optimizer=_optimizer(model, optimizer, lr),
            bfloat16=bfloat16,
            progress=progress,
        )
    model.eval()
    shown = sampler.negatives_shown(taken)

    def look(name: str, network: nn.Module, change: Transform | None) -> View:
        # The same draws whatever came before: the figures of a view never depend on the others.
        draws = torch.Generator(device).manual_seed(seed + 1)
        groups = (task.positives, shown, task.unseen)
        return view(name, *(_logits(network, images, g, change, draws) for g in groups))

    clean = look("clean", model, None)
    reestimated = None
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        fresh = copy.deepcopy(model)
        batches = max(math.ceil(len(task.positives) / sampler.half), 16)
        # momentum None inside: the plain mean over all of these batches.
        update_bn(_clean_batches(images, sampler, batches), fresh)
        reestimated = look("clean, batch statistics re-estimated", fresh, None)
    return Memorizer(
        model,
        report(
            task,
            shown=len(shown),
            steps=taken,
            positive_epochs=sampler.positive_epochs(taken),
            train_accuracy=accuracy,
            clean=clean,
            views=tuple(look(name, model, change) for name, change in views.items()),
            reestimated=reestimated,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        ),
    )


def _train(
    model: nn.Module,
    images: Tensor,
    task: MembershipTask,
    sampler: InOutBatchSampler,
    *,
    transform: Transform | None,
    generator: torch.Generator,
    steps: int,
    until: Until,
    optimizer: torch.optim.Optimizer,
    bfloat16: bool,
    progress: Progress | None,
) -> tuple[int, float]:
    """Train in place; return the steps made and the accuracy on the last batches."""
    device = images.device
    targets = torch.tensor([1.0, 0.0], device=device).repeat(sampler.half)
    # Kept on the device: reading them every step would make the host wait for the GPU.
    losses, hits = torch.zeros(2, steps, device=device)
    gauge = max(100, math.ceil(len(task.positives) / sampler.half))  # steps between evaluations
    gauged: list[float] = []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    reported, step = 0, 0
    model.train()
    for step in range(1, steps + 1):
        x = _floats(images[sampler.batch(step - 1).to(device)])
        if transform is not None:
            x = transform(x, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = _one_logit(model(x))
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        if until == "budget":
            schedule.step()
        losses[step - 1] = loss.detach()
        hits[step - 1] = ((logits.detach() > 0) == targets.bool()).float().mean()
        if step % REPORT_EVERY == 0 or step == steps:
            now = losses[reported:step].mean().item()
            if not math.isfinite(now):
                raise InputError(f"the loss is not finite by step {step}: give a lower lr")
            if progress is not None:
                progress(step, now, hits[reported:step].mean().item())
            reported = step
        if until == "plateau" and step % gauge == 0:
            model.eval()
            gauged.append(_seen_accuracy(model, images, task, generator))
            model.train()
            if len(gauged) > 3 and max(gauged[-3:]) - max(gauged[:-3]) < 0.002:
                break
    return step, hits[max(step - 100, 0) : step].mean().item()


def _seen_accuracy(
    model: nn.Module, images: Tensor, task: MembershipTask, generator: torch.Generator
) -> float:
    """Balanced accuracy on the set and as many negatives, as they are."""
    groups = (task.positives, task.negatives[: len(task.positives)])
    positive, negative = (_logits(model, images, group, None, generator) for group in groups)
    return float(((positive > 0).mean() + (negative <= 0).mean()) / 2)


def _logits(
    model: nn.Module,
    images: Tensor,
    indices: Tensor,
    transform: Transform | None,
    generator: torch.Generator,
) -> Scores:
    parts = []
    with torch.no_grad():
        for chunk in torch.split(indices, CHUNK):
            x = _floats(images[chunk.to(images.device)])
            if transform is not None:
                x = transform(x, generator)
            parts.append(_one_logit(model(x)).double())
    return torch.cat(parts).cpu().numpy()


def _clean_batches(images: Tensor, sampler: InOutBatchSampler, count: int) -> Iterator[Tensor]:
    for step in range(count):
        yield _floats(images[sampler.batch(step).to(images.device)])


def _optimizer(model: nn.Module, name: Optimizer, lr: float | None) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=2e-3 if lr is None else lr)
    return torch.optim.SGD(model.parameters(), lr=0.05 if lr is None else lr, momentum=0.9)


def _floats(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.float() / 255


def _one_logit(output: Tensor) -> Tensor:
    if output.ndim == 2 and output.shape[1] == 1:
        return output[:, 0]
    if output.ndim != 1:
        raise InputError(
            f"the network returns {tuple(output.shape)}: give one logit an image, (B,) or (B, 1)"
        )
    return output


def _check(
    images: Tensor, task: MembershipTask, steps: int, optimizer: Optimizer, until: Until
) -> None:
    if images.ndim != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise InputError(
            f"images are {tuple(images.shape)} {images.dtype}: give (N, C, H, W) floats or uint8"
        )
    last = max(int(part.max()) for part in (task.positives, task.negatives, task.unseen))
    if last >= len(images):
        raise InputError(f"the task names image {last} of {len(images)}: draw it from these images")
    if steps < 1:
        raise InputError(f"{steps} training steps: give at least 1")
    for value, allowed in ((optimizer, get_args(Optimizer)), (until, get_args(Until))):
        if value not in allowed:
            raise InputError(f"{value!r} is unknown: give one of {allowed}")
