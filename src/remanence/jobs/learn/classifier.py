"""`remanence learn classifier`: plain supervised training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from remanence.errors import InputError
from remanence.jobs.options import check_options, model_arguments
from remanence.kit.batches import AugmentedImages, Batches
from remanence.kit.devices import Precision, launch
from remanence.kit.evaluate import Normalise, evaluate
from remanence.kit.fit import Recipe, Schedule, Training, fit
from remanence.kit.images import Images, open_splits
from remanence.kit.models import create_network, describe, save_network
from remanence.kit.predictions import Predictions
from remanence.kit.report import Report, curve_figure
from remanence.kit.run import RunFolder, run_folder
from remanence.kit.statistics import proportion_interval
from remanence.learn.fixres.transforms import EvalTransform

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from remanence.kit.batches import Batch
    from remanence.kit.models import Network


@dataclass(frozen=True)
class Trained:
    """What `classifier` leaves behind.

    Attributes:
        out: Run folder; the model lies in `out / "model"`.
        accuracy: Top-1 accuracy on the images it was not trained on.
        predictions: Its predictions there.
    """

    out: Path
    accuracy: float
    predictions: Predictions


def classifier(
    data: str,
    *,
    out: Path,
    model: str = "resnet18",
    model_arg: list[str] | None = None,
    size: int | None = None,
    epochs: int = 30,
    batch_size: int = 64,
    lr: float = 0.05,
    optimizer: str = "sgd",
    weight_decay: float = 5e-4,
    schedule: Schedule = "cosine",
    warmup_epochs: float = 0.0,
    clip: float | None = None,
    ema: float | None = None,
    smoothing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    scale: tuple[float, float] = (0.08, 1.0),
    flip: float = 0.5,
    jitter: float = 0.0,
    augment: str | None = None,
    erase: float = 0.0,
    precision: Precision = "auto",
    devices: int = 1,
    workers: int | None = None,
    compile: bool = False,  # noqa: A002  # the option's name
    limit: int | None = None,
    checkpoint_steps: int | None = None,
    skip_broken: bool = False,
    seed: int = 0,
    resume: bool = False,
) -> Trained:
    """Train an image classifier from scratch.

    Any timm or torchvision architecture on any image source, with random resized crops. Several
    commands start from a network like this one. The folder OUT holds the model in timm's hub
    layout, metrics, predictions and a report.

    Args:
        data: Image source: digits, a folder of class folders, parquet, tar, or a timm dataset name.
        out: Run folder to create.
        model: timm architecture, or torchvision:NAME.
        model_arg: Argument of the architecture as NAME=VALUE, for example output_stride=16 or
            drop_path_rate=0.1; may be given several times.
        size: Side of the training crops, pixels; the architecture's own if not given.
        epochs: Passes over the training images.
        batch_size: Images a step, over all devices.
        lr: Peak learning rate.
        optimizer: Any of timm's optimisers.
        weight_decay: Weight decay of kernels and matrices.
        schedule: Course of the learning rate.
        warmup_epochs: Epochs of linear warm-up.
        clip: Largest gradient norm.
        ema: Decay of the averaged weights, for example 0.999; off if not given.
        smoothing: Label smoothing.
        mixup: Mixup alpha.
        cutmix: CutMix alpha.
        scale: Smallest and largest area of a random resized crop, as fractions of the image.
        flip: Probability of a horizontal flip.
        jitter: Strength of brightness, contrast and colour jitter.
        augment: timm's auto-augmentation, for example rand-m9-mstd0.5.
        erase: Probability of random erasing.
        precision: Number format; auto is bf16-mixed on a GPU that has it.
        devices: Devices on this machine; under torchrun the processes it started.
        workers: Image loading processes; by default none on a CPU.
        compile: Compile the network.
        limit: Use only so many images of each split.
        checkpoint_steps: Steps between checkpoints beside the one of each epoch.
        skip_broken: Leave unreadable images out and count them.
        seed: Seed.
        resume: Go on with the interrupted run in OUT.partial.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("out", "resume")}
    check_options(options)
    if batch_size < 2:
        raise InputError(f"--batch-size {batch_size}: must be at least 2, for batch norm")
    fabric = launch(devices, precision)
    with run_folder(
        out, "learn classifier", options, seed=seed, resume=resume, rank=fabric.global_rank
    ) as run:
        show = fabric.is_global_zero
        train, validation, test = open_splits(data, skip_broken=skip_broken, limit=limit, show=show)
        arguments = model_arguments(model_arg or [])
        network = create_network(model, train.classes, size=size, arguments=arguments, seed=seed)
        pre = network.train
        transform = augmentation(network, scale, flip, jitter, augment)
        batches = Batches(
            AugmentedImages(train, transform, seed),
            batch_size,
            seed=seed,
            rank=fabric.global_rank,
            world=fabric.world_size,
            workers=workers,
        )
        recipe = Recipe(
            epochs=epochs,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            clip=clip,
            ema=ema,
            seed=seed,
            compile=compile,
            checkpoint_steps=checkpoint_steps,
        )
        normalise = Normalise(pre.mean, pre.std)
        mix = _mixing(mixup, cutmix, smoothing, len(train.classes))
        eraser = RandomErasing(erase, mode="pixel", device=str(fabric.device)) if erase else None

        def loss(trained: nn.Module, batch: Batch) -> Tensor:
            inputs, labels = normalise(batch.inputs), batch.labels
            if mix is not None:
                inputs, labels = mix(inputs, labels)
            if eraser is not None:
                inputs = eraser(inputs)
            return nn.functional.cross_entropy(
                trained(inputs), labels, label_smoothing=0.0 if mix is not None else smoothing
            )

        def validate(training: Training) -> dict[str, float]:
            found = predict(fabric, training.best, network, validation, what="validate")
            return {"validation_accuracy": found.accuracy}

        network.model = fit(
            fabric, network.model, batches, recipe, loss, run=run, after_epoch=[validate]
        )
        held_out, name = (validation, "validation") if test is None else (test, "test")
        found = predict(fabric, network.model, network, held_out, what=name)
        if run.first:
            skipped = train.skipped + validation.skipped + (test.skipped if test else 0)
            _write(run, network, found, name, train, skipped)
    return Trained(out, found.accuracy, found)


def predict(
    fabric: Fabric, model: nn.Module, network: Network, images: Images, *, what: str
) -> Predictions:
    """Predict each image of a collection with a network's evaluation preprocessing."""
    pre = network.test
    was_training = model.training
    model = model.to(fabric.device).eval()
    normalise = Normalise(pre.mean, pre.std)
    logits = evaluate(
        fabric,
        {0: lambda x: model(normalise(x))},
        {0: EvalTransform(pre.size, pre.crop_pct, pre.crop_mode, pre.interpolation)},
        images,
        what=what,
    )[0]
    model.train(was_training)
    return Predictions.from_logits(list(images.ids), torch.from_numpy(images.labels), logits)


def augmentation(
    network: Network,
    scale: tuple[float, float],
    flip: float,
    jitter: float,
    augment: str | None,
) -> Any:
    """Return a network's training transform: PIL image to uint8 (3, K, K), at random.

    Raises:
        InputError: timm does not know the auto-augmentation.
    """
    pre = network.train
    try:
        return create_transform(
            input_size=pre.size,
            is_training=True,
            use_prefetcher=True,
            scale=scale,
            hflip=flip,
            color_jitter=jitter or None,
            auto_augment=augment,
            interpolation=pre.interpolation,
            mean=pre.mean,
            std=pre.std,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(
            f"--augment {augment}: not one of timm's augmentations ({' '.join(str(error).split())})"
            "; for example rand-m9-mstd0.5"
        ) from error


def _mixing(mixup: float, cutmix: float, smoothing: float, classes: int) -> Any:
    if not (mixup or cutmix):
        return None
    mixing = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)

    def mix(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # timm mixes pairs; where the step has an odd number, the first image is mixed twice.
        odd = len(labels) % 2
        if odd:
            inputs = torch.cat([inputs, inputs[:1]])
            labels = torch.cat([labels, labels[:1]])
        mixed, soft = mixing(inputs, labels)
        return mixed[: len(mixed) - odd], soft[: len(soft) - odd]

    return mix


def _write(
    run: RunFolder, network: Network, found: Predictions, name: str, train: Images, skipped: int
) -> None:
    save_network(network, run.path("model"))
    found.write(run.path("predictions.parquet"))
    hits = int(found.correct.sum())
    low, high = proportion_interval(hits, len(found.ids))
    results = {
        "split": name,
        "images": len(found.ids),
        "accuracy": found.accuracy,
        "accuracy_interval_95": [low, high],
        "accuracy_top5": float(found.correct5.mean()),
        "train_images": len(train),
        "classes": len(train.classes),
        "skipped": skipped,
        "parameters": sum(p.numel() for p in network.model.parameters()),
        "preprocessing": describe(network.test),
    }
    run.write_results(results)
    report = Report(f"{network.name} on {train.source}", "remanence learn classifier")
    report.text(
        f"Top-1 accuracy on {len(found.ids):,} {name} images: {100 * found.accuracy:.2f} % "
        f"(95 % interval {100 * low:.2f} to {100 * high:.2f} %)."
    )
    report.section("Training")
    rows = run.metrics("train")
    epochs = [row["epoch"] for row in rows]
    report.figure(
        curve_figure({"loss": (epochs, [r["loss"] for r in rows], None, None)}, "epoch", "loss"),
        "Mean training loss of each epoch.",
        "training loss by epoch",
    )
    accuracy = [100 * r["validation_accuracy"] for r in rows]
    report.figure(
        curve_figure({"validation": (epochs, accuracy, None, None)}, "epoch", "top-1 accuracy, %"),
        "Accuracy on the validation images after each epoch.",
        "validation accuracy by epoch",
    )
    report.section("Accuracy by class")
    correct = found.correct
    report.table(
        ["class", "images", "accuracy, %"],
        [
            [label, int(mask.sum()), 100 * float(correct[mask].mean()) if mask.any() else None]
            for number, label in enumerate(train.classes)
            if (mask := found.labels == number) is not None
        ],
    )
    report.section("Run")
    report.facts(run.summary())
    report.write(run.path("report.html"))
