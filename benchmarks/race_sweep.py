"""Race of resolution sweeps: each photograph decoded once for all sizes, or once for each size.

Ours is remanence.kit.evaluate; the peer follows timm's validate.py, with its data set and loader,
one pass a size. Opening the images is part of a lap. The accuracies and the largest difference
between the logits of the two show that they did the same work.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import harness
from remanence.kit import architectures
from remanence.kit.devices import launch
from remanence.kit.evaluate import Normalise, evaluate
from remanence.kit.images import Images, open_images
from remanence.learn.fixres import EvalTransform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_fabric import Fabric

assert architectures.default_cfgs  # names of small networks, for timm
CROP_PCT = 0.875


@dataclass(frozen=True)
class Course:
    """What both contestants have in common."""

    fabric: Fabric
    folder: Path
    network: nn.Module
    sizes: list[int]
    batch_size: int
    workers: int
    logits: dict[str, list[Tensor]] = field(default_factory=dict)

    def lap(
        self, who: str, seconds: float, logits: list[Tensor], hits: float, names: Sequence[str]
    ) -> harness.Lap:
        """Sum up: images by sizes, seconds, mean accuracy, and how far the logits are apart."""
        # The two list a folder in different orders.
        order = sorted(range(len(names)), key=names.__getitem__)
        found = self.logits[who] = [of_size[order] for of_size in logits]
        pairs = zip(self.logits["remanence"], found, strict=True)
        facts = {
            "seconds": seconds,
            "accuracy, %": hits,
            "largest difference / std": max(float((a - b).abs().max() / a.std()) for a, b in pairs),
        }
        return harness.Lap(sum(map(len, found)), seconds, facts)


def ours(course: Course) -> harness.Lap:
    """Make one pass: every photograph is decoded once and feeds all sizes."""
    began = time.perf_counter()
    images = open_images(str(course.folder))
    normalise = Normalise(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    logits = evaluate(
        course.fabric,
        dict.fromkeys(course.sizes, lambda x: course.network(normalise(x))),
        {size: EvalTransform(size, CROP_PCT) for size in course.sizes},
        images,
        batch_size=course.batch_size,
        workers=course.workers,
    )
    labels = torch.from_numpy(images.labels)
    hits = [float((logits[s].argmax(1) == labels).double().mean()) for s in course.sizes]
    seconds = time.perf_counter() - began
    found = [logits[size] for size in course.sizes]
    return course.lap("remanence", seconds, found, 100 * sum(hits) / len(hits), images.ids)


def one_by_one(course: Course, layout: torch.memory_format) -> harness.Lap:
    """Follow timm's recipe, one pass a size."""
    device = course.fabric.device
    began = time.perf_counter()
    found, hits = [], AverageMeter()
    for size in course.sizes:
        data = create_dataset("", root=str(course.folder))
        loader = create_loader(
            data,
            input_size=(3, size, size),
            batch_size=course.batch_size,
            use_prefetcher=True,
            interpolation="bilinear",
            crop_pct=CROP_PCT,
            num_workers=course.workers,
            pin_memory=device.type == "cuda",
            device=device,
        )
        losses, outputs = AverageMeter(), []
        with torch.inference_mode():
            for pixels, labels in loader:
                images = pixels.contiguous(memory_format=layout)
                with course.fabric.autocast():
                    output = course.network(images)
                    loss = cross_entropy(output, labels)
                losses.update(loss.item(), len(labels))
                hits.update(accuracy(output, labels)[0].item(), len(labels))
                outputs.append(output.float().cpu())
        found.append(torch.cat(outputs))
    seconds = time.perf_counter() - began
    return course.lap("timm", seconds, found, hits.avg, data.filenames())


def _link(images: Images, source: Path, folder: Path) -> None:
    """Lay out the chosen photographs as class folders of their own, in the order of their names."""
    for name, label in zip(images.ids, images.labels, strict=True):
        target = folder / images.classes[label] / Path(name).name
        target.parent.mkdir(exist_ok=True)
        target.symlink_to((source / name).resolve())


def main() -> None:
    """Run a race for each network."""
    options = harness.parser(__doc__)
    options.set_defaults(rounds=3)
    add = options.add_argument
    photographs = harness.SHARED / "clothing" / "validation"
    add("--data", type=Path, default=photographs, help="folder of class folders of photographs")
    add("--limit", type=int, default=160, help="photographs")
    add("--model", nargs="+", default=["resnet18", "mobilenetv3_small_050"])
    add("--sizes", type=int, nargs="+", default=[96, 128, 160, 192, 224, 256], help="pixels")
    add("--batch-size", type=int, default=32)
    add("--workers", type=int, default=-1, help="loader processes; -1: none, or beside a GPU many")
    add(
        "--peer-layout",
        choices=["channels_last", "contiguous_format"],
        default="channels_last",
        help="memory layout of the peer; ours has the first, timm's default is the second",
    )
    asked = options.parse_args()
    facts = harness.environment(["torch", "torchvision", "timm", "lightning-fabric"], asked.threads)
    fabric = launch(1, accelerator=asked.accelerator)
    many = min(16, os.cpu_count() or 1) if fabric.device.type == "cuda" else 0
    workers = many if asked.workers < 0 else asked.workers
    races = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = open_images(str(asked.data), limit=asked.limit, cache_bytes=0)
        _link(chosen, asked.data, Path(folder))
        for name in asked.model:
            torch.manual_seed(0)
            network = timm.create_model(name, num_classes=len(chosen.classes)).eval()
            course = Course(
                fabric,
                Path(folder),
                network.to(fabric.device).to(memory_format=torch.channels_last),
                asked.sizes,
                asked.batch_size,
                workers,
            )
            layout = getattr(torch, asked.peer_layout)
            placed = copy.deepcopy(course.network).to(memory_format=layout)
            peer = replace(course, network=placed)
            sizes = "/".join(map(str, asked.sizes))
            title = f"{name}, {len(chosen)} photographs at {sizes} px, {workers} workers"
            contestants = {
                "remanence": partial(ours, course),
                "timm": partial(one_by_one, peer, layout),
            }
            races.append(harness.race(title, contestants, asked, unit="images/s"))
    harness.finish(races, facts, asked)


if __name__ == "__main__":
    main()
