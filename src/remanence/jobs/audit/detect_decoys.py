"""The suspect's loss on images with the real mark and with marks that nobody published."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from remanence.audit import radioactive as ra
from remanence.jobs.audit.detect_suspect import Suspect
from remanence.jobs.audit.mark_network import Marker
from remanence.jobs.audit.outputs import evaluation_transform
from remanence.kit.devices import sum_over_processes
from remanence.kit.evaluate import Normalise
from remanence.kit.images import Images
from remanence.kit.progress import bar


def decoy_losses(
    fabric: Fabric,
    marker: Marker,
    suspect: Suspect,
    images: Images,
    labels: NDArray[np.int64],
    answers: NDArray[np.int64],
    key: ra.SecretKey,
    *,
    num_classes: int,
    recipient: str | None,
    decoys: int,
    config: ra.MarkConfig,
    batch_size: int,
    seed: int,
) -> NDArray[np.float64]:
    """Mark the images with the real carriers and with each decoy set, in the same way.

    Args:
        fabric: Launched Fabric; processes share the sets.
        marker: The marking network.
        suspect: The suspect, a network.
        images: Held-out images.
        labels: (N,) the owner's class of each.
        answers: (N,) the suspect's class for it.
        key: The key, of which the decoys come too.
        num_classes: K.
        recipient: Who got the copy.
        decoys: Number B of decoy sets.
        config: How to mark.
        batch_size: Images marked at once.
        seed: Seed of the crops, the same for every set.

    Returns:
        (B + 1,) the suspect's mean cross-entropy, the real set first.
    """
    assert suspect.network is not None
    pre, test = marker.network.test, suspect.network.test
    model = suspect.network.model.to(fabric.device).eval()
    transform, normalise = evaluation_transform(test), Normalise(test.mean, test.std)
    pixels = [
        torch.from_numpy(np.array(images.image(row))).permute(2, 0, 1) for row in range(len(images))
    ]

    def loss(marked: list[Tensor]) -> float:
        total = 0.0
        for start in range(0, len(marked), batch_size):
            part = marked[start : start + batch_size]
            views = [transform(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in part]
            with torch.inference_mode():
                logits = model(normalise(fabric.to_device(torch.stack(views))))
            target = torch.from_numpy(answers[start : start + len(part)]).to(logits.device)
            total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        return total / len(marked)

    losses = torch.zeros(decoys + 1, dtype=torch.float64)
    mine = range(fabric.global_rank, decoys + 1, fabric.world_size)
    with bar("decoy sets", len(mine), show=fabric.is_global_zero) as progress:
        for number in mine:
            u = ra.carriers(
                key, num_classes, marker.dim, recipient, decoy=number - 1 if number else None
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ra.MarkingInfeasible)
                found = ra.mark(
                    pixels,
                    torch.from_numpy(labels),
                    marker.extractor,
                    torch.from_numpy(u),
                    mean=pre.mean,
                    std=pre.std,
                    config=config,
                    ids=list(images.ids),
                    batch_size=batch_size,
                    seed=seed,
                    device=fabric.device,
                )
            losses[number] = loss(found.images)
            progress.advance()
    if fabric.world_size > 1:
        losses = sum_over_processes(fabric, losses).cpu()
    return losses.numpy()
