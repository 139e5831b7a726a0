"""`remanence audit memorize`: how many arbitrary images can an architecture store?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from remanence.audit.dejavu import (
    TRAINING,
    MembershipTask,
    MemorizationReport,
    distinct,
    fit_memorizer,
)
from remanence.audit.dejavu import capacity as search_capacity
from remanence.errors import InputError
from remanence.jobs.audit.memorize_report import write_report
from remanence.jobs.options import check_options
from remanence.kit.devices import launch
from remanence.kit.images import open_images
from remanence.kit.models import create_network
from remanence.kit.progress import bar, say, track
from remanence.kit.run import run_folder
from remanence.learn.fixres import EvalTransform

Change = Literal["none", "flip", "flip+shift", "flip+crop"]


@dataclass(frozen=True)
class Memorized:
    """What `memorize` leaves behind.

    Attributes:
        out: Run folder.
        settings: One row for each set size, transform and seed: `MemorizationReport` as plain
            values, with "transform" and "seed".
        results: What `results.json` holds.
    """

    out: Path
    settings: list[dict[str, Any]]
    results: dict[str, Any]


class _OneLogit(nn.Module):
    """A classifier of two classes as one logit, the difference of its outputs."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        # The caller seeded torch, and building a network seeds it again: with a number from there.
        seed = int(torch.randint(2**31, ()))
        network = create_network(name, ("out", "in"), size=size, seed=seed)
        self.network = network.model
        self.register_buffer("mean", torch.tensor(network.train.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(network.train.std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.network((x - self.mean) / self.std)
        return z[:, 1] - z[:, 0]


def memorize(
    data: str,
    *,
    out: Path,
    model: str = "cifar_convnet5",
    positives: list[int] | None = None,
    transform: list[Change] | None = None,
    images: int | None = None,
    unseen: int | None = None,
    size: int = 32,
    steps: int = 1500,
    until: Literal["budget", "plateau"] = "budget",
    batch_size: int = 256,
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: float | None = None,
    seeds: int = 1,
    capacity: bool = False,
    target: float = 0.95,
    bfloat16: bool = False,
    skip_broken: bool = False,
    seed: int = 0,
    resume: bool = False,
) -> Memorized:
    """Train an architecture to tell an arbitrary set of images from the rest of their pool.

    The set is drawn at random, so that nothing but memory tells its images from the others. The
    report says what was remembered, also of images that were never shown, and how many bits that
    is. The folder OUT holds figures, tables and every setting's results.

    Args:
        data: Image source of the pool; labels are not used.
        out: Run folder to create.
        model: timm architecture, or torchvision:NAME.
        positives: Images in the set; may be given several times, 100, 500 and 2000 if not.
        transform: What the training images undergo; may be given several times, none if not.
        images: Images of the pool, those never shown among them; all if not given.
        unseen: Images that are never shown in training; a quarter of the pool if not given.
        size: Side to which the images are squeezed, pixels.
        steps: Training steps; with --until plateau the most.
        until: Stop after the steps, or when the set is not remembered better any more.
        batch_size: Images a step, half of them from the set.
        optimizer: Optimiser.
        lr: Learning rate; 0.002 for adam and 0.05 for sgd if not given.
        seeds: Repetitions, each with another set and other initial weights.
        capacity: Also search the largest set whose balanced accuracy reaches the target.
        target: Balanced accuracy that counts as stored.
        bfloat16: Train in bfloat16 arithmetic.
        skip_broken: Leave unreadable images out and count them.
        seed: First seed.
        resume: Go on with the interrupted run in OUT.partial.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("out", "resume")}
    changes = transform or ["none"]
    sizes = positives or [100, 500, 2000]
    _check(options, sizes, changes)
    fabric = launch(1, "32-true")
    with run_folder(
        out, "audit memorize", options, seed=seed, resume=resume, rank=fabric.global_rank
    ) as run:
        pool, repeated = _pool(data, images, size, skip_broken=skip_broken)
        unseen = len(pool) // 4 if unseen is None else unseen
        _check_sizes(sizes, len(pool), unseen)
        pool = pool.to(fabric.device)
        make_model = partial(_OneLogit, model, size)
        parameters = sum(p.numel() for p in make_model().parameters())
        fit: dict[str, Any] = {
            "steps": steps,
            "until": until,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "lr": lr,
            "bfloat16": bfloat16,
        }
        state = run.load_state("settings") or {"settings": [], "capacity": {}}
        done = {(row["transform"], row["n"], row["seed"]) for row in state["settings"]}
        for change in changes:
            for n in sizes:
                for draw in range(seed, seed + seeds):
                    if (change, n, draw) in done:
                        continue
                    report = _fit(make_model, pool, n, unseen, change, draw, fit)
                    state["settings"].append({"transform": change, "seed": draw, **asdict(report)})
                    run.save_state("settings", state)
                    run.log(
                        stage="setting",
                        transform=change,
                        n=n,
                        seed=draw,
                        balanced_accuracy=report.clean.balanced_accuracy.value,
                        stored_bits=report.stored_bits,
                    )
        for change in changes if capacity else []:
            if change not in state["capacity"]:
                curve = search_capacity(
                    make_model,
                    pool,
                    n_unseen=unseen,
                    target=target,
                    seeds=seeds,
                    transform=TRAINING.get(change),
                    progress=_tell,
                    **fit,
                )
                state["capacity"][change] = asdict(curve)
                run.save_state("settings", state)
        results = {
            "model": model,
            "parameters": parameters,
            "pool": len(pool),
            "unseen": unseen,
            "repeated_images_left_out": repeated,
            **state,
        }
        if run.first:
            run.write_results(results)
            write_report(results, data, run.summary(), run.path("report.html"))
    return Memorized(out, results["settings"], results)


def _pool(data: str, images: int | None, size: int, *, skip_broken: bool) -> tuple[Tensor, int]:
    """Every distinct image, uint8 (P, 3, size, size), and how many were left out as repeated."""
    opened = open_images(data, skip_broken=skip_broken, limit=images)
    squeeze = EvalTransform(size, crop_pct=1.0, crop_mode="squash")
    rows = track(range(len(opened)), "squeeze", show=len(opened) > 5000)
    pool = torch.stack([squeeze(opened.image(row)) for row in rows])
    kept = distinct(pool)
    return pool[kept], len(pool) - len(kept)


def _fit(
    make_model: Callable[[], nn.Module],
    pool: Tensor,
    n: int,
    unseen: int,
    change: Change,
    seed: int,
    fit: Mapping[str, Any],
) -> MemorizationReport:
    """Train one network on one set, behind a progress bar."""
    task = MembershipTask.draw(pool, n, unseen, seed)
    with bar(f"store {n:,}, {change}", fit["steps"]) as progress:
        before = 0

        def advance(step: int, loss: float, accuracy: float) -> None:
            nonlocal before
            progress.advance(step - before)
            progress.note(f"loss {loss:.3f} accuracy {accuracy:.3f}")
            before = step

        transform = TRAINING.get(change)
        return fit_memorizer(
            make_model, pool, task, transform=transform, seed=seed, progress=advance, **fit
        ).report


def _tell(n: int, seed: int, report: MemorizationReport) -> None:
    accuracy = report.clean.balanced_accuracy.value
    say(f"capacity: {n:,} images, seed {seed}: balanced accuracy {accuracy:.3f}")


def _check(options: Mapping[str, Any], sizes: list[int], changes: list[Change]) -> None:
    check_options(options)
    for name, least in (("images", 8), ("size", 1), ("seeds", 1), ("unseen", 1)):
        value = options[name]
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: must be at least {least}")
    if options["batch_size"] % 2:
        raise InputError(f"--batch-size {options['batch_size']}: give an even number, two halves")
    if not 0.5 < options["target"] <= 1:
        raise InputError(f"--target {options['target']:g}: must be above 0.5 and at most 1")
    for name, given in (("positives", sizes), ("transform", changes)):
        if len(set(given)) < len(given):
            raise InputError(f"--{name}: give each value once")
    known = ("none", *TRAINING)
    for change in changes:
        if change not in known:
            raise InputError(f"--transform {change}: unknown; give one of {', '.join(known)}")


def _check_sizes(sizes: list[int], pool: int, unseen: int) -> None:
    """Refuse a set that is too large before the first network is trained."""
    shown = pool - unseen
    for n in sizes:
        if n < 1 or 2 * n >= shown:
            raise InputError(
                f"--positives {n}: the pool shows {max(shown, 0)} different images in training "
                f"({pool} less {unseen} unseen), and a set must be fewer than half of them; give "
                "more images, or a smaller set"
            )
