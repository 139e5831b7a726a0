"""Race of head tuning: features computed once per view, or the whole network in every epoch.

Both tune the head of the same trained network at a larger size (FixRes, arXiv 1906.06423, with the
scope `classifier`), with the same loop, optimiser, batches and test-like views. The first pays once
for each view, computing the features included; the second pays in every epoch, as the authors' code
does.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import harness
from remanence.kit import architectures
from remanence.kit.batches import AugmentedImages, Batches, CachedViews, drawn_view
from remanence.kit.devices import launch
from remanence.kit.evaluate import Normalise, evaluate
from remanence.kit.fit import Recipe, fit
from remanence.kit.images import Images, open_images
from remanence.learn.fixres import Adaptation, EvalTransform, FinetuneTransform, forward_embedding

if TYPE_CHECKING:
    import argparse

    from lightning_fabric import Fabric

    from remanence.kit.batches import Batch

assert architectures.default_cfgs  # names of small networks, for timm
TRAIN_SIZE = 32
NORMALISE = Normalise((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@dataclass(frozen=True)
class Course:
    """What both contestants have in common."""

    fabric: Fabric
    network: nn.Module
    train: Images
    test: Images
    size: int
    recipe: Recipe
    batch_size: int
    workers: int

    @property
    def views(self) -> FinetuneTransform:
        """Test-like views; without jitter, so that a few fixed ones can stand for them."""
        return FinetuneTransform(self.size, jitter=0.0)

    def adaptation(self) -> Adaptation:
        """Return a fresh copy of the network of which only the head can train."""
        example = torch.zeros(1, 3, self.size, self.size, device=self.fabric.device)
        classes = len(self.train.classes)
        return Adaptation(copy.deepcopy(self.network), "classifier", example, classes)

    def evaluate(self, functions: Any, transforms: Any, images: Images) -> dict[Any, Tensor]:
        """Run remanence.kit.evaluate with the course's options."""
        return evaluate(
            self.fabric,
            functions,
            transforms,
            images,
            batch_size=self.batch_size,
            workers=self.workers,
        )

    def lap(self, seconds: float, model: nn.Module) -> harness.Lap:
        """Sum up: images by epochs, seconds, and accuracy on the test images."""
        model.eval()
        logits = self.evaluate(
            {0: lambda x: model(NORMALISE(x))}, {0: EvalTransform(self.size)}, self.test
        )[0]
        right = logits.argmax(1) == torch.from_numpy(self.test.labels)
        facts = {"seconds": seconds, "accuracy, %": 100 * float(right.double().mean())}
        return harness.Lap(len(self.train) * self.recipe.epochs, seconds, facts)


def cached(course: Course) -> harness.Lap:
    """Compute the features of every view once, then tune the head alone, as the job does."""
    adaptation = course.adaptation()
    head = adaptation.model.get_submodule(adaptation.head)
    began = time.perf_counter()
    adaptation.eval()
    views = course.views.variants(3)

    def embed(images: Tensor) -> Tensor:
        return forward_embedding(adaptation.model, NORMALISE(images), head)

    count, seed = len(course.train), course.recipe.seed
    shown = np.stack([drawn_view(seed, e, count, len(views)) for e in range(course.recipe.epochs)])
    features = torch.empty(0)
    for number, view in enumerate(views):
        rows = np.flatnonzero((shown == number).any(axis=0))
        part = course.evaluate({0: embed}, {0: view}, course.train.subset(rows))[0]
        if not len(features):
            features = torch.zeros(len(views), count, part.shape[1])
        features[number, rows] = part
    batches = CachedViews(
        features,
        torch.from_numpy(course.train.labels),
        course.batch_size,
        seed=course.recipe.seed,
    )

    def loss(tuned: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(tuned(batch.inputs), batch.labels)

    tuned = fit(course.fabric, copy.deepcopy(head), batches, course.recipe, loss)
    head.load_state_dict(tuned.state_dict())
    seconds = _since(began)
    return course.lap(seconds, adaptation.model)


def full(course: Course) -> harness.Lap:
    """Run the whole network in every epoch; only the head has gradients."""
    adaptation = course.adaptation()
    began = time.perf_counter()
    data = AugmentedImages(course.train, course.views, course.recipe.seed)
    batches = Batches(data, course.batch_size, seed=course.recipe.seed, workers=course.workers)

    def loss(tuned: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(tuned(NORMALISE(batch.inputs)).float(), batch.labels)

    fit(course.fabric, adaptation, batches, course.recipe, loss)
    seconds = _since(began)
    return course.lap(seconds, adaptation.model)


def _since(began: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _trained(options: argparse.Namespace, fabric: Fabric, train: Images, workers: int) -> nn.Module:
    """Train a network from scratch with random resized crops; the race starts from it."""
    torch.manual_seed(0)
    network = timm.create_model(options.model, num_classes=len(train.classes))
    transform = create_transform(
        TRAIN_SIZE,
        is_training=True,
        use_prefetcher=True,
        color_jitter=None,
        interpolation="bilinear",
    )
    batches = Batches(
        AugmentedImages(train, transform, 0), options.batch_size, seed=0, workers=workers
    )
    recipe = Recipe(options.train_epochs, 0.05, weight_decay=5e-4)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(network(NORMALISE(batch.inputs)), batch.labels)

    return fit(fabric, network, batches, recipe, loss)


def main() -> None:
    """Train a network, then run a race for each number of epochs."""
    options = harness.parser(__doc__)
    options.set_defaults(rounds=3)
    add = options.add_argument
    add("--data", default=str(harness.SHARED / "cifar10"), help="image source of 32-pixel images")
    add("--limit", type=int, default=1000, help="images of each split")
    add("--model", default="cifar_resnet20")
    add("--train-epochs", type=int, default=5, help="epochs of training before the race")
    add("--size", type=int, default=40, help="test size that the head is tuned at, pixels")
    add("--epochs", type=int, nargs="+", default=[3, 11, 31], help="epochs of tuning, a race each")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=0)
    asked = options.parse_args()
    facts = harness.environment(["torch", "torchvision", "timm", "lightning-fabric"], asked.threads)
    torch.set_num_threads(asked.threads)
    fabric = launch(1, accelerator=asked.accelerator)
    train = open_images(asked.data, split="train", limit=asked.limit)
    test = open_images(asked.data, split="test", limit=asked.limit)
    network = _trained(asked, fabric, train, asked.workers)
    races = []
    for epochs in asked.epochs:
        recipe = Recipe(epochs, 0.01, weight_decay=1e-4)
        course = Course(
            fabric, network, train, test, asked.size, recipe, asked.batch_size, asked.workers
        )
        title = f"{asked.model}, head at {asked.size} px, {len(train)} images, {epochs} epochs"
        contestants = {
            "features once": partial(cached, course),
            "forward each epoch": partial(full, course),
        }
        races.append(harness.race(title, contestants, asked, unit="images x epochs/s"))
    harness.finish(races, facts, asked)


if __name__ == "__main__":
    main()
