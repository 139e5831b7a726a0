"""Predictions and activations of many settings over one image collection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from remanence.jobs.learn.fixres_adapt import Setting
from remanence.kit.evaluate import Normalise, evaluate
from remanence.kit.images import Images
from remanence.kit.models import Network
from remanence.kit.predictions import Predictions
from remanence.learn.fixres import MultiResolution, activation_statistics, forward_embedding


@dataclass(frozen=True)
class Predictor:
    """Predicts every image in every setting, decoding it once.

    Attributes:
        fabric: Launched Fabric.
        networks: The networks that settings refer to.
        batch_size: Images at a time on each device.
        workers: Image loading processes.
    """

    fabric: Fabric
    networks: list[Network]
    batch_size: int
    workers: int

    def __call__(
        self, served: Mapping[Setting, nn.Module], images: Images, what: str
    ) -> dict[Setting, Predictions]:
        """Predict with the adapted network of each setting; `what` names the progress bar."""
        transforms = {s: s.transform(self.networks[s.network]) for s in served}
        functions = {s: self._function(s, model) for s, model in served.items()}
        return self._run(functions, transforms, images, what)

    def fused(
        self, together: MultiResolution, members: list[Setting], images: Images
    ) -> Predictions:
        """Predict with all members of the bank together."""
        network = self.networks[0]
        normalise = Normalise(network.test.mean, network.test.std)
        transforms = [s.transform(network) for s in members]
        lengths = [3 * s.size**2 for s in members]

        def forward(packed: Tensor) -> Tensor:  # (B, sum of 3 K^2): one image's views in a row
            views = torch.split(packed, lengths, dim=1)
            images_by_size = {
                s.size: normalise(view.reshape(-1, 3, s.size, s.size))
                for s, view in zip(members, views, strict=True)
            }
            logits: Tensor = together(images_by_size)
            return logits

        def pack(image: Any) -> Tensor:
            return torch.cat([transform(image).flatten() for transform in transforms])

        return self._run({0: forward}, {0: pack}, images, "fuse")[0]

    def activations(
        self, served: Mapping[Setting, nn.Module], images: Images
    ) -> list[dict[str, float]]:
        """Measure the pooled embedding at each test size (arXiv 1906.06423, section 3.2)."""
        sizes = {s.size: s for s in served if s.crop_pct == self.networks[0].test.crop_pct}
        network = self.networks[0]
        normalise = Normalise(network.test.mean, network.test.std)

        def embed(model: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda x: forward_embedding(model, normalise(x))

        z = evaluate(
            self.fabric,
            {size: embed(served[s]) for size, s in sizes.items()},
            {size: s.transform(network) for size, s in sizes.items()},
            images.subset(np.arange(min(512, len(images)))),
            batch_size=self.batch_size,
            workers=self.workers,
            what="activations",
        )
        found = {size: activation_statistics(values) for size, values in z.items()}
        return [
            {"size": size, "zero_fraction": s.zero_fraction, "std": s.std, "mean": s.mean}
            for size, s in found.items()
        ]

    def _function(self, setting: Setting, model: nn.Module) -> Callable[[Tensor], Tensor]:
        pre = self.networks[setting.network].test
        normalise = Normalise(pre.mean, pre.std)
        model.eval()
        return lambda x: model(normalise(x))

    def _run(
        self, functions: Mapping[Any, Any], transforms: Mapping[Any, Any], images: Images, what: str
    ) -> dict[Any, Predictions]:
        logits = evaluate(
            self.fabric,
            functions,
            transforms,
            images,
            batch_size=self.batch_size,
            workers=self.workers,
            what=what,
        )
        labels = torch.from_numpy(images.labels)
        ids = list(images.ids)
        return {key: Predictions.from_logits(ids, labels, logits[key]) for key in functions}
