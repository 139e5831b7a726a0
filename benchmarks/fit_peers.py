"""The course of the race of training loops, and the two peers on it."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

import harness

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lightning_fabric import Fabric

    from remanence.kit.images import Images

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SIZE, LR, MOMENTUM, WEIGHT_DECAY = 32, 0.05, 0.9, 5e-4


class Decoded(Dataset[tuple[Any, int]]):
    """Decoded images in memory, as torchvision's CIFAR10 keeps them; timm sets `transform`."""

    def __init__(self, images: Images, transform: Any = None) -> None:
        assert images.decoded is not None
        self._pixels, self._labels, self.transform = images.decoded, images.labels, transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self._pixels[row])), int(self._labels[row])


@dataclass(frozen=True)
class Course:
    """What all contestants have in common."""

    fabric: Fabric
    images: Images
    folder: Path | None
    network: nn.Module
    precision: str
    batch_size: int
    epochs: int
    workers: int
    scale: float
    layout: torch.memory_format

    @property
    def device(self) -> torch.device:
        """Device of the race."""
        return self.fabric.device

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return len(self.images) // self.batch_size

    def start(self) -> tuple[nn.Module, harness.Stopwatch]:
        """Return the network with its initial weights, and a stopwatch that skips one epoch."""
        watch = harness.Stopwatch(self.steps, self.steps * (1 + self.epochs), self.device)
        return copy.deepcopy(self.network), watch

    def optimizer(self, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        """Return the optimiser that all of them use."""
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, "sgd", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **options
        )
        return optimizer

    def autocast(self) -> torch.autocast:
        """Return the precision of the race as a context."""
        bf16 = self.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def lap(self, watch: harness.Stopwatch, losses: list[Tensor]) -> harness.Lap:
        """Sum up: images of the timed epochs, and mean loss of the first epoch and of the last."""
        assert len(losses) == self.steps * (1 + self.epochs), "not the same number of steps"
        value = torch.stack(losses).float()
        facts = {
            "steps": float(len(losses)),
            "first loss": float(value[: self.steps].mean()),
            "last loss": float(value[-self.steps :].mean()),
        }
        return harness.Lap(len(self.images) * self.epochs, watch.seconds, facts)


class LitClassifier(LightningModule):
    """The network as Lightning's documentation writes one."""

    def __init__(self, course: Course, network: nn.Module) -> None:
        super().__init__()
        self.course, self.network = course, network
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Return the loss of one batch."""
        images, labels = batch
        loss = cross_entropy(
            self.network(images.contiguous(memory_format=self.course.layout)), labels
        )
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule, a cosine by steps."""
        optimizer = self.course.optimizer(self.network)
        total = self.course.steps * (1 + self.course.epochs)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Ticker(Callback):
    """Tell the stopwatch of every finished step."""

    def __init__(self, watch: harness.Stopwatch) -> None:
        self._watch = watch

    def on_train_batch_end(self, *_: Any) -> None:
        """Count a step."""
        self._watch.tick()


def lightning(course: Course) -> harness.Lap:
    """Run Lightning's Trainer with a plain DataLoader; no logger, checkpoints or progress bar."""
    model, watch = course.start()
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(course.scale, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    data: Dataset[Any] = (
        Decoded(course.images, transform)
        if course.folder is None
        else ImageFolder(course.folder, transform)
    )
    loader = DataLoader(
        data,
        course.batch_size,
        shuffle=True,
        num_workers=course.workers,
        pin_memory=course.device.type == "cuda",
        persistent_workers=course.workers > 0,
    )
    module = LitClassifier(course, model.to(memory_format=course.layout))
    trainer = Trainer(
        accelerator=course.device.type,
        devices=1,
        precision=course.precision,  # type: ignore[arg-type]  # one of two strings that it knows
        max_epochs=1 + course.epochs,
        callbacks=[Ticker(watch)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return course.lap(watch, module.losses)


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN choose by trial, as timm's train.py does."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def timm_loop(course: Course) -> harness.Lap:
    """Follow timm's train.py: its loader with prefetcher, optimiser, schedule and meter."""
    model, watch = course.start()
    loader = create_loader(
        Decoded(course.images)
        if course.folder is None
        else create_dataset("", root=str(course.folder), is_training=True),
        input_size=(3, SIZE, SIZE),
        batch_size=course.batch_size,
        is_training=True,
        use_prefetcher=True,
        scale=(course.scale, 1.0),
        hflip=0.5,
        color_jitter=0.0,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=course.workers,
        pin_memory=course.device.type == "cuda",
        device=course.device,
    )
    model = model.to(course.device).to(memory_format=course.layout)
    optimizer = course.optimizer(model)
    schedule, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=1 + course.epochs,
        warmup_epochs=0,
        cooldown_epochs=0,
        min_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    losses, updates = [], 0
    with cudnn_benchmark():
        for _ in range(epochs):
            model.train()
            meter = AverageMeter()
            optimizer.zero_grad()
            for pixels, labels in loader:
                images = pixels.contiguous(memory_format=course.layout)
                with course.autocast():
                    loss = cross_entropy(model(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation
                optimizer.step()
                meter.update(loss.item(), len(labels))
                optimizer.zero_grad()
                updates += 1
                schedule.step_update(num_updates=updates, metric=meter.avg)
                losses.append(loss.detach())
                watch.tick()
    return course.lap(watch, losses)
