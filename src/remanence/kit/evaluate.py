"""Logits of a network over an image collection: each image once, over all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from remanence.kit.batches import stack
from remanence.kit.devices import sum_over_processes
from remanence.kit.progress import bar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning_fabric import Fabric
    from PIL import Image

    from remanence.kit.images import Images


class Normalise(nn.Module):
    """Turn uint8 images (N, 3, H, W) into normalised float32, channels last, on their device."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Keep the statistics.

        Args:
            mean: Mean of each channel, for pixels in [0, 1].
            std: Standard deviation of each channel.
        """
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise a batch."""
        if self.mean.device != images.device:
            self.to(images.device)  # once: a copy in every step would wait for the device
        count, channels, height, width = images.shape
        # Whole image rows at a time: broadcasting over three adjacent channels is slow on a CPU.
        rows = images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        floats = rows.reshape(count * height, width * channels).float()
        floats.sub_(self.mean.flatten().repeat(width)).div_(self.std.flatten().repeat(width))
        return floats.view(count, height, width, channels).permute(0, 3, 1, 2)


class _Views(Dataset[tuple[list[Tensor], int]]):
    """Every image under several transforms, decoded once."""

    def __init__(self, images: Images, transforms: Sequence[Callable[[Image.Image], Any]]) -> None:
        self._images, self._transforms = images, transforms

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> tuple[list[Tensor], int]:
        image = self._images.image(row)
        return [torch.as_tensor(transform(image)) for transform in self._transforms], row


def _collate(samples: Sequence[tuple[list[Tensor], int]]) -> tuple[list[Tensor], Tensor]:
    views, rows = zip(*samples, strict=True)
    return [stack(view) for view in zip(*views, strict=True)], torch.tensor(rows)


def evaluate(
    fabric: Fabric,
    functions: Mapping[Any, Callable[[Tensor], Tensor]],
    transforms: Mapping[Any, Callable[[Image.Image], Any]],
    images: Images,
    *,
    batch_size: int = 64,
    workers: int = 0,
    what: str = "evaluate",
) -> dict[Any, Tensor]:
    """Apply a function to each image under each of several transforms, decoding it once.

    Every process takes its share of the images, and each image is counted exactly once whatever
    the number of processes.

    Args:
        fabric: Launched Fabric.
        functions: For each key, a map from uint8 (B, 3, K, K) on the device to (B, D).
        transforms: For each key, a map from an RGB image to uint8 (3, K, K).
        images: The collection, N images.
        batch_size: Images at a time on each device.
        workers: Loader processes.
        what: What the progress bar says.

    Returns:
        For each key a float32 tensor (N, D) on the CPU, in the order of the images, on every rank.
    """
    keys = list(functions)
    mine = np.arange(fabric.global_rank, len(images), fabric.world_size)
    loader = DataLoader(
        _Views(images, [transforms[key] for key in keys]),
        batch_sampler=[mine[i : i + batch_size].tolist() for i in range(0, len(mine), batch_size)],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
    found: dict[Any, Tensor] = {}
    with torch.inference_mode(), bar(what, len(mine), show=fabric.is_global_zero) as progress:
        for views, rows in loader:
            for key, view in zip(keys, views, strict=True):
                with fabric.autocast():
                    out = functions[key](fabric.to_device(view))
                out = out.float().cpu()
                if key not in found:
                    found[key] = torch.zeros(len(images), *out.shape[1:])
                found[key][rows] = out
            progress.advance(len(rows))
    if fabric.world_size > 1:
        # Rows of other ranks are zero, so the sum is exact. A rank without rows learns the width.
        width = torch.tensor([t.shape[1] for t in found.values()] or [0] * len(keys))
        width = fabric.broadcast(width, src=0)
        for key, columns in zip(keys, width.tolist(), strict=True):
            local = found.get(key, torch.zeros(len(images), columns))
            found[key] = sum_over_processes(fabric, local).cpu()
    return found
