"""The reference models of `remanence audit membership`: trained, reused, or read as logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from remanence.audit.membership import (
    ReferencePool,
    References,
    balanced_design,
    model_signals,
    references_from_logits,
    train_references,
)
from remanence.errors import InputError
from remanence.jobs.audit.membership_samples import Samples, noted
from remanence.jobs.audit.outputs import read_array
from remanence.kit.devices import sum_over_processes
from remanence.kit.evaluate import Normalise
from remanence.kit.models import Network, create_network
from remanence.kit.progress import bar, track
from remanence.kit.run import RunFolder, write_json

POOL, ABOUT = "references.safetensors", "references.json"


@dataclass(frozen=True)
class ReferenceRecipe:
    """How references are trained; `together` is the most that are trained at once."""

    count: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    flip: float
    shift: int
    together: int | None
    seed: int


def trained(
    run: RunFolder, fabric: Fabric, samples: Samples, views: Tensor, recipe: ReferenceRecipe
) -> ReferencePool:
    """Train references on random halves of all samples, or take up those of an interrupted run.

    Every process trains its share of them; the pool is written as soon as it is there.

    Args:
        run: Run folder.
        fabric: Launched Fabric.
        samples: The samples.
        views: Their pixels, uint8 (N, 3, K, K).
        recipe: How to train.

    Raises:
        InputError: The samples or the network cannot be learned from, or memory is too small.
    """
    assert samples.network is not None
    make = _factory(samples.network, samples.classes)
    if run.load_state("references") is not None:
        return ReferencePool.load(run.path(POOL), make, str(fabric.device))
    labels = samples.signals.labels
    if len(np.unique(labels)) < 2:
        raise InputError(
            f"all samples are of one class ({samples.class_name(int(labels[0]))}): references "
            "cannot be trained on one class; give samples of two or more"
        )
    by_class = labels if samples.groups is None else None
    design = balanced_design(
        recipe.count, len(samples), recipe.seed, groups=samples.groups, labels=by_class
    )
    if fabric.world_size > recipe.count:
        raise InputError(
            f"--references {recipe.count}: fewer than the {fabric.world_size} processes that train "
            "them; give at least one for each"
        )
    rows = np.array_split(np.arange(recipe.count), fabric.world_size)[fabric.global_rank]
    normalise = Normalise(samples.network.test.mean, samples.network.test.std)
    total = recipe.epochs * len(rows)
    with bar("train references", total, show=fabric.is_global_zero) as shown:
        before = 0

        def progress(done: int, _: int, loss: float) -> None:
            nonlocal before
            shown.advance(done - before)
            shown.note(f"loss {loss:.4g}")
            before = done
            run.log(stage="references", step=done, loss=loss)

        try:
            pool = train_references(
                make,
                views.to(fabric.device),
                torch.from_numpy(labels),
                design[rows],
                epochs=recipe.epochs,
                batch_size=recipe.batch_size,
                lr=recipe.lr,
                weight_decay=recipe.weight_decay,
                prepare=normalise,
                augment=_augmentation(recipe.flip, recipe.shift),
                chunk_size=recipe.together,
                seed=recipe.seed + int(rows[0]),
                progress=progress,
            )
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"--references {recipe.count}: the device's memory does not hold so many at once; "
                "give --reference-together a smaller number, or smaller batches"
            ) from error
    if fabric.world_size > 1:
        pool = _gathered(fabric, pool, design, rows)
    if run.first:
        pool.save(run.path(POOL))
        about = {"architecture": samples.network.name, "samples": samples.fingerprint}
        write_json(run.path(ABOUT), about | asdict(recipe))
        run.save_state("references", {"count": recipe.count})
    return pool


def reused(fabric: Fabric, samples: Samples, path: Path) -> ReferencePool:
    """Open the references that another run trained on the same samples.

    Raises:
        InputError: There are none, or they were trained on other samples or another architecture.
    """
    assert samples.network is not None
    file = path / POOL if path.is_dir() else path
    try:
        about = json.loads(file.with_name(ABOUT).read_text(encoding="utf-8"))
        same = about["samples"] == samples.fingerprint
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: holds no {POOL} with its {ABOUT}; give the folder of a run with --references"
        ) from error
    if not same or not file.is_file():
        raise InputError(
            f"{path}: its references were trained on other samples; give the same --members and "
            "--nonmembers in the same order, or train new ones with --references"
        )
    return ReferencePool.load(file, _factory(samples.network, samples.classes), str(fabric.device))


def pool_signals(
    fabric: Fabric, samples: Samples, pool: ReferencePool, views: Tensor
) -> References:
    """Signals of every reference on every sample."""
    assert samples.network is not None
    normalise = Normalise(samples.network.test.mean, samples.network.test.std)
    labels = torch.from_numpy(samples.signals.labels)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(torch.split(views, 512), torch.split(labels, 512), strict=True):
            yield normalise(x.to(fabric.device)), y

    what, show = "evaluate references", fabric.is_global_zero
    signals = [
        model_signals(pool.model(k).to(fabric.device), batches())
        for k in track(range(len(pool)), what, show=show)
    ]
    return References.stack(signals, pool.design)


def read_references(
    logits: Path, members: Path, samples: Samples, notes: list[str], *, probabilities: bool
) -> References:
    """Read what references said of members and non-members, in this order.

    Args:
        logits: File of floats (K, N, C), or (K, N) for one logit a sample.
        members: File of Booleans (K, N), True where reference k was trained on sample n.
        samples: The N samples.
        notes: Takes up warnings.
        probabilities: Whether the file holds probabilities.

    Raises:
        InputError: A file is missing or broken, or its shape is not that of the samples.
    """
    values, mask = read_array(logits), read_array(members)
    n, classes = len(samples), samples.classes
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[1:] != (n, classes) or values.dtype.kind != "f":
        raise InputError(
            f"{logits}: {values.dtype} {values.shape}; give floats (references, {n}, {classes}), "
            "members first"
        )
    if mask.dtype != np.bool_ or mask.shape != values.shape[:2]:
        raise InputError(
            f"{members}: {mask.dtype} {mask.shape}; give bool {values.shape[:2]}, True where the "
            "reference was trained on the sample"
        )
    if samples.groups is not None:
        _, of_group, sizes = np.unique(samples.groups, return_inverse=True, return_counts=True)
        inside = np.stack([np.bincount(of_group, row) for row in mask])
        if ((inside > 0) & (inside < sizes)).any():
            raise InputError(
                f"{members}: some references were trained on a part of a group; a group is in or "
                "out as a whole"
            )
    with noted(notes):
        return references_from_logits(
            values, samples.signals.labels, mask, probabilities=probabilities
        )


def _factory(network: Network, classes: int) -> Callable[[], nn.Module]:
    if classes < 2:
        raise InputError(
            f"{network.name}: references with one logit cannot be trained here; give what yours "
            "say as --reference-logits"
        )

    def make() -> nn.Module:
        # The trainer seeds torch for each reference; this keeps to it.
        return create_network(
            network.name,
            [str(label) for label in range(classes)],
            size=network.test.size,
            arguments=network.arguments,
            seed=torch.initial_seed(),
        ).model

    return make


def _augmentation(flip: float, shift: int) -> Callable[[Tensor, torch.Generator], Tensor] | None:
    """Mirror with a probability, and move by up to so many pixels each way, padding with 0."""
    if not flip and not shift:
        return None

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:  # (B, 3, H, W)
        count, _, height, width = x.shape
        if flip:
            mirrored = torch.rand(count, generator=generator, device=x.device) < flip
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        if shift:
            x = nn.functional.pad(x, [shift] * 4)
            draw = {"generator": generator, "device": x.device}
            top, left = torch.randint(0, 2 * shift + 1, (2, count), **draw)  # type: ignore[call-overload]  # it does not see through the dict
            rows = top[:, None] + torch.arange(height, device=x.device)  # (B, H)
            columns = left[:, None] + torch.arange(width, device=x.device)  # (B, W)
            which = torch.arange(count, device=x.device)[:, None, None]
            moved = x.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
            x = moved.permute(0, 3, 1, 2)
        return x

    return augment


def _gathered(
    fabric: Fabric, pool: ReferencePool, design: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]
) -> ReferencePool:
    """Join the shares of all processes; rows of the others are zero, so the sum is exact."""

    def whole(values: dict[str, Tensor]) -> dict[str, Tensor]:
        joined = {}
        for name, own in values.items():
            full = torch.zeros(len(design), *own.shape[1:], dtype=own.dtype, device=own.device)
            full[torch.from_numpy(rows).to(own.device)] = own
            joined[name] = sum_over_processes(fabric, full)
        return joined

    return ReferencePool(pool.skeleton, whole(pool.parameters), whole(pool.buffers), design)
