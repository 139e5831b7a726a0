"""Race of training loops: remanence.kit.fit, Lightning's Trainer and timm's loop, on CIFAR-10.

All train the same network from the same weights on the same images: one epoch of warm-up, then the
timed ones. The last row is the limit: the same steps on one batch that already lies on the device.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import harness
from fit_peers import (
    LR,
    MEAN,
    MOMENTUM,
    SIZE,
    STD,
    WEIGHT_DECAY,
    Course,
    cudnn_benchmark,
    lightning,
    timm_loop,
)
from remanence.kit import architectures
from remanence.kit.batches import AugmentedImages, Batches
from remanence.kit.devices import launch
from remanence.kit.evaluate import Normalise
from remanence.kit.fit import Recipe, fit
from remanence.kit.images import Images, open_images

if TYPE_CHECKING:
    import argparse

    from remanence.kit.batches import Batch

assert architectures.default_cfgs  # names of small networks, for timm


def ours(course: Course) -> harness.Lap:
    """Run remanence.kit.fit, set up as `remanence learn classifier` does."""
    model, watch = course.start()
    transform = create_transform(
        input_size=SIZE,
        is_training=True,
        use_prefetcher=True,
        scale=(course.scale, 1.0),
        hflip=0.5,
        color_jitter=None,
        interpolation="bilinear",
    )
    data = AugmentedImages(course.images, transform, seed=0)
    batches = Batches(data, course.batch_size, seed=0, workers=course.workers)
    recipe = Recipe(1 + course.epochs, LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    normalise = Normalise(MEAN, STD)
    losses: list[Tensor] = []

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        value = cross_entropy(network(normalise(batch.inputs)), batch.labels)
        losses.append(value.detach())
        return value

    fit(course.fabric, model, batches, recipe, loss, after_step=[lambda _: watch.tick()])
    return course.lap(watch, losses)


def limit(course: Course) -> harness.Lap:
    """Run the network alone, on one batch: no data, no schedule, and a fused optimiser."""
    model, watch = course.start()
    model = model.to(course.device).to(memory_format=torch.channels_last).train()
    optimizer = course.optimizer(model, fused=True)
    images = torch.randn(course.batch_size, 3, SIZE, SIZE, device=course.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(course.batch_size, device=course.device) % len(course.images.classes)
    with cudnn_benchmark():
        for _ in range(course.steps * (1 + course.epochs)):
            with course.autocast():
                loss = cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation
            optimizer.step()
            optimizer.zero_grad()
            watch.tick()
    return harness.Lap(len(course.images) * course.epochs, watch.seconds)


def as_folders(images: Images, root: Path) -> Path:
    """Write the images as class folders: JPEG files where the source holds them, else PNG."""
    for row, label in enumerate(images.labels):
        raw = images.store.read(int(images.order[row]))
        folder = root / images.classes[label]
        folder.mkdir(exist_ok=True)
        if isinstance(raw, bytes):
            (folder / f"{row}.jpg").write_bytes(raw)
        else:
            raw.save(folder / f"{row}.png")
    return root


def main() -> None:
    """Run a race for each network."""
    options = _options()
    warnings.filterwarnings("ignore", module="lightning.*")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    facts = harness.environment(
        ["torch", "torchvision", "timm", "lightning", "lightning-fabric"], options.threads
    )
    fabric = launch(1, options.precision, options.accelerator)
    on_gpu = fabric.device.type == "cuda"
    count = options.limit or (25_600 if on_gpu else 1_280)
    many = min(16, os.cpu_count() or 1) if on_gpu else 0
    workers = many if options.workers < 0 else options.workers
    precision = options.precision
    if precision == "auto":
        precision = "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"
    with ExitStack() as stack:
        images = open_images(options.data, split="train", limit=count - count % options.batch_size)
        folder = None
        if options.read == "files":
            folder = as_folders(images, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            images = open_images(str(folder))
        races = []
        for name in options.model:
            torch.manual_seed(0)
            network = timm.create_model(name, num_classes=len(images.classes))
            course = Course(
                fabric,
                images,
                folder,
                network,
                precision,
                options.batch_size,
                options.epochs,
                workers,
                options.scale,
                getattr(torch, options.peer_layout),
            )
            title = (
                f"{name}, {SIZE} px, batch {options.batch_size}, {precision}, {workers} workers, "
                f"peers {options.peer_layout} and reading {options.read}"
            )
            contestants = {
                "remanence": partial(ours, course),
                "Lightning": partial(lightning, course),
                "timm": partial(timm_loop, course),
                "limit": partial(limit, course),
            }
            races.append(harness.race(title, contestants, options, unit="images/s"))
    harness.finish(races, facts, options)


def _options() -> argparse.Namespace:
    options = harness.parser(__doc__)
    add = options.add_argument
    add("--data", default=str(harness.SHARED / "cifar10"), help="image source of 32-pixel images")
    add("--limit", type=int, help="images; 1,280 on a CPU and 25,600 on a GPU if not given")
    add("--model", nargs="+", default=["cifar_resnet20", "resnet18"])
    add("--batch-size", type=int, default=128)
    add("--epochs", type=int, default=2, help="timed epochs, after one of warm-up")
    add("--scale", type=float, default=0.08, help="smallest area of a random resized crop")
    add("--precision", choices=["auto", "32-true", "bf16-mixed"], default="auto")
    add("--workers", type=int, default=-1, help="loader processes; -1: none, or beside a GPU many")
    add(
        "--peer-layout",
        choices=["channels_last", "contiguous_format"],
        default="channels_last",
        help="memory layout of the peers; ours always has the first, their default is the second",
    )
    add(
        "--read",
        choices=["memory", "files"],
        default="memory",
        help="peers read decoded images from memory, or class folders of files; ours decodes once",
    )
    return options.parse_args()


if __name__ == "__main__":
    main()
