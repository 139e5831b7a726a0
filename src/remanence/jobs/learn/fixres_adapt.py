"""Adapting one network to one test size, in one scope."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from remanence.kit.batches import AugmentedImages, Batches, CachedViews, drawn_view
from remanence.kit.devices import sum_over_processes
from remanence.kit.evaluate import Normalise, evaluate
from remanence.kit.fit import fit
from remanence.learn.fixres import (
    Adaptation,
    EvalTransform,
    FinetuneTransform,
    check_batch,
    find_head,
    fit_equalizer,
    fold_into_head_,
    forward_embedding,
    hash_state,
    recalibrate_bn_,
    set_input_size_,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_fabric import Fabric

    from remanence.kit.batches import Batch
    from remanence.kit.fit import EpochSource, Recipe
    from remanence.kit.images import Images
    from remanence.kit.models import Network
    from remanence.kit.run import RunFolder


@dataclass(frozen=True)
class Setting:
    """A way to serve one of the networks.

    Attributes:
        network: Which of the networks given.
        scope: What is adapted.
        size: Test size, pixels.
        crop_pct: Side of the test crop over the side that images are resized to.
    """

    network: int
    scope: str
    size: int
    crop_pct: float

    def transform(self, network: Network) -> EvalTransform:
        """Return the test transform of this setting."""
        pre = network.test
        return EvalTransform(self.size, self.crop_pct, pre.crop_mode, pre.interpolation)


@dataclass(frozen=True)
class Tuning:
    """How networks are adapted.

    Attributes:
        recipe: Training recipe.
        batch_size: Images a step, over all devices.
        smoothing: Label smoothing.
        flip: Probability of a horizontal flip.
        shift: Whether crops are shifted.
        jitter: Strength of colour jitter.
        statistics_images: Training images for scopes that only take statistics.
        workers: Image loading processes for evaluation.
    """

    recipe: Recipe
    batch_size: int
    smoothing: float
    flip: float
    shift: bool
    jitter: float
    statistics_images: int
    workers: int

    def transform(self, network: Network, setting: Setting, *, jitter: float) -> FinetuneTransform:
        """Return the test-like augmentation of a setting."""
        pre = network.test
        return FinetuneTransform(
            setting.size,
            setting.crop_pct,
            pre.crop_mode,
            pre.interpolation,
            shift=self.shift,
            hflip=self.flip,
            jitter=jitter,
        )

    def loss(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy with smoothed labels, in float32."""
        logits = model(inputs).float().flatten(1)
        return nn.functional.cross_entropy(logits, labels, label_smoothing=self.smoothing)


@dataclass(frozen=True)
class Adapter:
    """Adapts networks with one tuning on one set of training images."""

    fabric: Fabric
    run: RunFolder
    tuning: Tuning
    images: Images

    def __call__(self, network: Network, setting: Setting) -> nn.Module:
        """Return a copy of a network, adapted; only the tensors of its scope have changed.

        Args:
            network: The network as trained.
            setting: Scope, test size and crop.

        Returns:
            The adapted network in eval mode.

        Raises:
            InputError: The network cannot take the size, or the batch is too small for the scope.
        """
        model = copy.deepcopy(network.model)
        set_input_size_(model, setting.size)
        example = torch.zeros(1, 3, setting.size, setting.size, device=self.fabric.device)
        before = hash_state(model)
        adaptation = Adaptation(model, setting.scope, example, len(self.images.classes))
        stage = f"{setting.scope}@{setting.size}"
        if setting.network:
            stage += f"#{setting.network}"
        if setting.scope == "bn_stats":
            self._take_statistics(network, setting, model)
        elif setting.scope == "equalize":
            self._equalize(network, setting, adaptation, stage)
        elif setting.scope == "classifier":
            self._tune_head(network, setting, adaptation, stage)
        elif setting.scope != "none":
            adaptation = self._tune(network, setting, adaptation, stage)
        adaptation.check(before)
        return adaptation.model.eval()

    def _tune(
        self, network: Network, setting: Setting, adaptation: Adaptation, stage: str
    ) -> Adaptation:
        tuning = self.tuning
        if adaptation.cells is not None:
            check_batch(tuning.batch_size // self.fabric.world_size, adaptation.cells)
        transform = tuning.transform(network, setting, jitter=tuning.jitter)
        data = AugmentedImages(self.images, transform, tuning.recipe.seed)
        batches = Batches(
            data,
            tuning.batch_size,
            seed=tuning.recipe.seed,
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
        )
        normalise = Normalise(network.test.mean, network.test.std)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return tuning.loss(model, normalise(batch.inputs), batch.labels)

        tuned = fit(
            self.fabric, adaptation, batches, tuning.recipe, loss, run=self.run, stage=stage
        )
        assert isinstance(tuned, Adaptation)
        return tuned

    def _tune_head(
        self, network: Network, setting: Setting, adaptation: Adaptation, stage: str
    ) -> None:
        """Train the head on features that are computed once, for nothing before it moves."""
        head = adaptation.model.get_submodule(adaptation.head)
        pointwise = isinstance(head, nn.Conv2d)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            z = batch.inputs[:, :, None, None] if pointwise else batch.inputs
            return self.tuning.loss(model, z, batch.labels)

        tuned = fit(
            self.fabric,
            copy.deepcopy(head),
            self._cached(network, setting, adaptation, head, stage),
            self.tuning.recipe,
            loss,
            run=self.run,
            stage=stage,
        )
        head.load_state_dict(tuned.state_dict())

    def _cached(
        self,
        network: Network,
        setting: Setting,
        adaptation: Adaptation,
        head: nn.Module,
        stage: str,
    ) -> EpochSource:
        views = self.tuning.transform(network, setting, jitter=0.0).variants(3)
        normalise = Normalise(network.test.mean, network.test.std)
        adaptation.eval()

        def embed(x: Tensor) -> Tensor:
            return forward_embedding(adaptation.model, normalise(x), head)

        recipe, count = self.tuning.recipe, len(self.images)
        shown = np.stack(
            [drawn_view(recipe.seed, e, count, len(views)) for e in range(recipe.epochs)]
        )
        features = torch.empty(0)
        for number, view in enumerate(views):
            # Only what some epoch will show: never more than a pass an epoch.
            rows = np.flatnonzero((shown == number).any(axis=0))
            found = evaluate(
                self.fabric,
                {0: embed},
                {0: view},
                self.images.subset(rows),
                batch_size=self.tuning.batch_size,
                workers=self.tuning.workers,
                what=f"features {stage} {number + 1}/{len(views)}",
            )
            if len(rows):
                if not len(features):
                    features = torch.zeros(len(views), count, found[0].shape[1])
                features[number, rows] = found[0]
        return CachedViews(
            features,
            torch.from_numpy(self.images.labels),
            self.tuning.batch_size,
            seed=self.tuning.recipe.seed,
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
        )

    def _equalize(
        self, network: Network, setting: Setting, adaptation: Adaptation, stage: str
    ) -> None:
        """Give embeddings at the test size the law that they have at the train size."""
        normalise = Normalise(network.test.mean, network.test.std)
        head = adaptation.model.get_submodule(adaptation.head)
        example = torch.zeros(1, 3, network.train.size, network.train.size)
        trained_head = find_head(network.model, None, example.to(self.fabric.device))[1]
        z = evaluate(
            self.fabric,
            {
                "train": lambda x: forward_embedding(network.model, normalise(x), trained_head),
                "test": lambda x: forward_embedding(adaptation.model, normalise(x), head),
            },
            {
                "train": replace(setting, size=network.train.size).transform(network),
                "test": setting.transform(network),
            },
            self._some_images(),
            what=stage,
        )
        fold_into_head_(head, fit_equalizer(z["train"], z["test"]))

    def _take_statistics(self, network: Network, setting: Setting, model: nn.Module) -> None:
        rank, world = self.fabric.global_rank, self.fabric.world_size
        images = self._some_images()
        mine = images.subset(np.arange(rank, len(images), world))
        normalise = Normalise(network.test.mean, network.test.std)
        views = _Views(mine, setting.transform(network), normalise, self.fabric, self.tuning)

        recalibrate_bn_(model, views, reduce=partial(sum_over_processes, self.fabric))

    def _some_images(self) -> Images:
        """Pick the images to take statistics from, at random (seed 0)."""
        count = self.tuning.statistics_images
        if len(self.images) <= count:
            return self.images
        order = np.random.default_rng(0).permutation(len(self.images))
        return self.images.subset(np.sort(order[:count]))


@dataclass(frozen=True)
class _Views:
    """Normalised test views of some images, batch by batch, as often as they are asked for."""

    images: Images
    transform: EvalTransform
    normalise: Normalise
    fabric: Fabric
    tuning: Tuning

    def __iter__(self) -> Iterator[Tensor]:
        size = self.tuning.batch_size
        for start in range(0, len(self.images), size):
            rows = range(start, min(start + size, len(self.images)))
            views = torch.stack([self.transform(self.images.image(row)) for row in rows])
            yield self.normalise(views.to(self.fabric.device))
