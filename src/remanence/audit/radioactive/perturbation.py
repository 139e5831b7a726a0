"""The loss of marking and its projected minimiser, for one batch (arXiv 2002.00937, Section 3.3).

Everything is in grey levels, 0 to 255, so that the radius, the range and the rounding are exact.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.linalg import vector_norm

from remanence.audit.radioactive.augment import Windows, apply, image_generator
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from remanence.audit.radioactive.features import FeatureExtractor
    from remanence.audit.radioactive.marking import MarkConfig

# Values of a 375 x 500 colour image, the size that lambda_1 was chosen for.
_PAPER_VALUES = 3 * 375 * 500
_FRESH_CROPS = 4


class Perturbation:
    """The loss and its minimiser for one batch: stacks (n_s, C, H_s, W_s) of N images in all."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        mean: Sequence[float],
        std: Sequence[float],
        config: MarkConfig,
        seed: int,
        device: torch.device | str | None,
    ) -> None:
        parameter = next(extractor.parameters(), torch.zeros(0))
        self.device = torch.device(parameter.device if device is None else device)
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.half = config.precision == "bfloat16"
        self.extractor = copy.deepcopy(extractor).to(self.device, self.dtype)
        if self.half:
            self.extractor = self.extractor.to(memory_format=torch.channels_last)
        self.mean, self.std = (
            255 * torch.tensor(list(values)).to(self.device, self.dtype)[:, None, None]
            for values in (mean, std)
        )
        self.config = config
        self.seed = seed

    def features(self, stacks: Sequence[Tensor], windows: Sequence[Windows]) -> Tensor:
        """Return the features (N, d) of stacks of grey levels, each seen through its windows."""
        seen = torch.cat([apply(x, w) for x, w in zip(stacks, windows, strict=True)])
        seen = (seen - self.mean) / self.std
        n = len(seen)
        # Convolutions of one image sum in another order than those of two or more.
        seen = seen.expand(max(n, 2), -1, -1, -1)
        if self.half:
            seen = seen.contiguous(memory_format=torch.channels_last)
        context = torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext()
        with context:
            features: Tensor = self.extractor(seen)
        return features[:n]

    def draw(
        self, stacks: Sequence[Tensor], generators: Sequence[torch.Generator]
    ) -> list[Windows]:
        """Draw one window per image."""
        rest = iter(generators)
        return [
            self.config.augment.sample((x.shape[2], x.shape[3]), list(islice(rest, len(x))))
            for x in stacks
        ]

    def loss(
        self, features: Tensor, reference: Tensor, u: Tensor, changes: Sequence[Tensor]
    ) -> Tensor:
        """Return L (N,) for changes in grey levels."""
        config = self.config
        moved = features - reference
        squares = torch.cat(
            [
                (x / self.std).square().sum((1, 2, 3))
                * (_PAPER_VALUES / x[0].numel() if config.scale_lambda else 1)
                for x in changes
            ]
        )
        length: Tensor = vector_norm(moved, dim=1)
        return config.lambda_feature * length - (moved * u).sum(1) + config.lambda_image * squares

    def minimise(self, stacks: list[Tensor], u: Tensor, names: list[int | str]) -> list[Tensor]:
        """Return the changes in grey levels, not yet rounded."""
        config = self.config
        changes = [torch.zeros_like(x, requires_grad=True) for x in stacks]
        generators = [image_generator(self.seed, name) for name in names]
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(changes, config.lr)
            schedule = None
        else:
            optimizer = torch.optim.Adam(changes, config.lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
        # r is constant in L's first term: only the length needs it.
        reference = torch.zeros((), device=self.device)
        needs_reference = config.lambda_feature > 0
        if needs_reference and config.reference == "center":
            with torch.no_grad():
                reference = self.features(stacks, self.plain(stacks))

        for step in range(config.iterations):
            windows = self.draw(stacks, generators)
            if needs_reference and config.reference == "same_aug":
                with torch.no_grad():
                    reference = self.features(stacks, windows)
            seen = changes
            if config.straight_through and 3 * step >= 2 * config.iterations:
                seen = [d + (d.round() - d).detach() for d in changes]
            shown = [x + d for x, d in zip(stacks, seen, strict=True)]
            loss = self.loss(self.features(shown, windows), reference, u, changes)
            # The paper's SGD takes its steps on normalised images.
            units = self.std.square() if config.optimizer == "sgd" else 1
            for d, gradient in zip(changes, torch.autograd.grad(loss.sum(), changes), strict=True):
                d.grad = gradient * units
            optimizer.step()
            if schedule is not None:
                schedule.step()
            with torch.no_grad():
                for x, d in zip(stacks, changes, strict=True):
                    d.copy_(self.project(x, d))
        return [d.detach() for d in changes]

    def project(self, images: Tensor, changes: Tensor) -> Tensor:
        """Return the changes within the radius, the range of grey levels and the PSNR."""
        changes = changes.clamp(-self.config.radius, self.config.radius)
        changes = (images + changes).clamp(0, 255) - images
        if self.config.target_psnr is None:
            return changes
        # In double precision, so that the order of summation cannot show.
        energy = _energy(changes)
        shrink = (_budget(changes, self.config.target_psnr) / energy.clamp(min=1e-12)).sqrt()
        return changes * shrink.clamp(max=1)[:, None, None, None].to(changes.dtype)

    def export(self, images: Tensor, changes: Tensor) -> Tensor:
        """Return whole grey levels within all bounds."""
        sizes = changes.abs()
        if self.config.target_psnr is None:
            steps = sizes.round()
        else:
            # Rounding to nearest can exceed the PSNR, or lose all of a small change. Instead the
            # largest fractions are rounded up, as many as keep the squared length.
            steps = sizes.floor()
            fractions, order = (sizes - steps).flatten(1).sort(dim=1, descending=True, stable=True)
            costs = (2 * steps.flatten(1).gather(1, order) + 1).double()
            room = (_energy(changes) - _energy(steps))[:, None]
            raised = (fractions > 0) & (costs.cumsum(1) <= room)
            steps += torch.zeros_like(costs).scatter(1, order, raised.double()).view_as(steps)
        steps = steps.clamp(max=math.floor(self.config.radius))
        return (images + steps * changes.sign()).clamp(0, 255)

    def plain(self, stacks: Sequence[Tensor]) -> list[Windows]:
        """Return the windows of the view that a model is tested on."""
        return [self.config.augment.plain((x.shape[2], x.shape[3]), len(x)) for x in stacks]

    def mark(
        self, originals: list[Tensor], u: Tensor, names: list[int | str]
    ) -> tuple[list[Tensor], Tensor]:
        """Mark one batch.

        Args:
            originals: Stacks (n_s, C, H_s, W_s) uint8 of N images in all.
            u: (N, d), the carriers of the images' classes.
            names: N ids.

        Returns:
            N marked images (C, H, W) uint8, and the figures of `Marked` (N, 7) float64.
        """
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            return self._mark(originals, u.to(self.device, self.dtype), names)

    def _mark(
        self, originals: list[Tensor], u: Tensor, names: list[int | str]
    ) -> tuple[list[Tensor], Tensor]:
        stacks = [x.to(self.device, self.dtype) for x in originals]
        fresh = [image_generator(self.seed, name, "fresh") for name in names]
        views = [self.plain(stacks)] + [self.draw(stacks, fresh) for _ in range(_FRESH_CROPS)]
        with torch.no_grad():
            before = torch.stack([self.features(stacks, view) for view in views])
        _refuse_broken(before, names)
        changes = self.minimise(stacks, u, names)
        marked = [self.export(x, d) for x, d in zip(stacks, changes, strict=True)]
        changes = [new - x for new, x in zip(marked, stacks, strict=True)]
        with torch.no_grad():
            after = torch.stack([self.features(marked, view) for view in views])
        _refuse_broken(after, names)

        moved = after - before
        dots = (moved * u).sum(2)
        references = before[:1] if self.config.reference == "center" else before[1:]
        unchanged = [torch.zeros_like(x) for x in stacks]
        losses = [
            torch.stack(
                [
                    self.loss(f, r, u, change)
                    for f, r in zip(
                        features[1:], references.expand(_FRESH_CROPS, -1, -1), strict=True
                    )
                ]
            ).mean(0)
            for features, change in ((before, unchanged), (after, changes))
        ]
        error = torch.cat([_energy(d) / d[0].numel() for d in changes])
        figures = [
            20 * math.log10(255) - 10 * error.log10(),
            torch.cat([d.abs().amax((1, 2, 3)) for d in changes]),
            dots[1:].mean(0),
            dots[0],
            vector_norm(moved[1:], dim=2).mean(0),
            *losses,
        ]
        scores = torch.stack([figure.double() for figure in figures], dim=1).cpu()
        return [image for stack in marked for image in stack.to(torch.uint8)], scores


def _energy(changes: Tensor) -> Tensor:
    """Return the squared length of each image's change (n,) in float64."""
    return changes.double().square().sum((1, 2, 3))


def _budget(images: Tensor, psnr: float) -> float:
    """Return the largest squared length of a change, in grey levels, at a PSNR."""
    return float(images[0].numel() * 255**2 * 10 ** (-psnr / 10))


def _refuse_broken(features: Tensor, names: list[int | str]) -> None:
    broken = ~features.isfinite().all(dim=2).all(dim=0)
    if broken.any():
        name = names[int(broken.int().argmax())]
        raise InputError(
            f"features of image {name!r} are not finite: check mean and std, or the network"
        )
