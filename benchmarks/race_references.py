"""Race of training reference models: together, one by one, and in a plain PyTorch loop, on digits.

Sixteen models train on random halves of scikit-learn's handwritten digits, all by the same recipe.
`remanence` is what `train_references` does when left to choose; the two rows below it are its two
ways, one of which it takes. A rate counts the images that all models together were trained on a
second. Accuracies on the images that a model saw and on those that it did not show that all did the
same work; initial weights and order are the plain loop's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import harness
from remanence.audit.membership import ReferencePool, balanced_design, train_references

if TYPE_CHECKING:
    import argparse

    from numpy.typing import NDArray

LR, MOMENTUM = 0.05, 0.9


def perceptron() -> nn.Module:
    """Return a 64-128-10 perceptron."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def convolutions() -> nn.Module:
    """Return two convolutions of 16 and 32 channels with BatchNorm, and a linear head."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveMaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


NETWORKS = {"perceptron": perceptron, "cnn": convolutions}


@dataclass(frozen=True)
class Course:
    """What all contestants have in common.

    Attributes:
        network: Name in `NETWORKS`.
        images: (N, 1, H, W) float32, on the device.
        labels: (N,) int64, on the device.
        design: (K, N) bool.
        epochs: Number of passes over half of the images.
        batch_size: Images a step and model.
    """

    network: str
    images: Tensor
    labels: Tensor
    design: NDArray[np.bool_]
    epochs: int
    batch_size: int

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(int(self.design.sum()) / len(self.design) / self.batch_size)

    def lap(self, amount: int, watch: harness.Stopwatch, pool: ReferencePool) -> harness.Lap:
        """Return how many images all models saw together, the time, and how good they are."""
        right = (pool.logits(self.images).argmax(2) == self.labels.cpu()).numpy()
        facts = {
            "accuracy, seen": 100 * float(right[self.design].mean()),
            "unseen": 100 * float(right[~self.design].mean()),
        }
        return harness.Lap(amount, watch.seconds, facts)


def ours(course: Course, vectorize: Literal["auto"] | bool) -> harness.Lap:
    """Run `train_references`."""
    watch = harness.Stopwatch(0, 1, course.images.device)
    pool = train_references(
        NETWORKS[course.network],
        course.images,
        course.labels,
        course.design,
        epochs=course.epochs,
        batch_size=course.batch_size,
        lr=LR,
        momentum=MOMENTUM,
        vectorize=vectorize,
    )
    watch.tick()
    batches = len(course.design) * course.steps * course.epochs  # all of them full
    return course.lap(batches * course.batch_size, watch, pool)


def plain(course: Course) -> harness.Lap:
    """Train one model after the other, as anyone would write it, on tensors in memory."""
    watch = harness.Stopwatch(0, 1, course.images.device)
    models, amount = [], 0
    for k, chosen in enumerate(course.design):
        torch.manual_seed(k)
        model = NETWORKS[course.network]().to(course.images.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
        total = course.epochs * course.steps
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        member = torch.from_numpy(np.flatnonzero(chosen)).to(course.images.device)
        model.train()
        for _ in range(course.epochs):
            order = torch.randperm(len(member)).to(member.device)
            for rows in torch.split(member[order], course.batch_size):
                amount += len(rows)
                loss = cross_entropy(model(course.images[rows]), course.labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation
                optimizer.step()
                schedule.step()
        models.append(model.eval())
    watch.tick()
    return course.lap(amount, watch, ReferencePool.from_models(models, course.design))


def main() -> None:
    """Run a race for each network, image size and batch size."""
    options = _options()
    facts = harness.environment(["torch"], options.threads)
    on_gpu = options.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    pixels, classes = load_digits(return_X_y=True)
    count = 1780  # half of it is just under a whole number of batches, of 8 as of 64
    images = torch.tensor(pixels[:count] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.from_numpy(classes[:count]).to(device)
    design = balanced_design(options.models, count, seed=0, labels=classes[:count])
    races = []
    for name, size, batch_size in (
        ("perceptron", 8, 8),
        ("perceptron", 8, 64),
        ("cnn", 8, 8),
        ("cnn", 16, 64),
    ):
        seen = interpolate(images, size, mode="bilinear").to(device)
        course = Course(name, seen, labels, design, options.epochs, batch_size)
        contestants = {
            "remanence": partial(ours, course, "auto"),
            "together (vmap)": partial(ours, course, vectorize=True),
            "one by one": partial(ours, course, vectorize=False),
            "plain PyTorch": partial(plain, course),
        }
        title = f"{options.models} x {name}, {size} px, batch {batch_size}, {device.type}"
        races.append(harness.race(title, contestants, options, unit="images/s"))
    harness.finish(races, facts, options)


def _options() -> argparse.Namespace:
    options = harness.parser(__doc__)
    add = options.add_argument
    add("--models", type=int, default=16, help="an even number")
    add("--epochs", type=int, default=4)
    return options.parse_args()


if __name__ == "__main__":
    main()
