"""The whole method on the 8 x 8 digits at 16 x 16: a network that trains in seconds."""

import copy
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

from remanence.compress.network.calibration import mean_kl
from remanence.compress.network.finetune import finetune
from remanence.compress.network.layers import find_layers
from remanence.compress.network.pipeline import Compressed, Target, compress
from remanence.compress.planning.plan import LayerPlan, Plan
from remanence.compress.quantizer.rows import Metric


def network() -> nn.Sequential:
    parts: list[nn.Module] = []
    shapes = [(1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    for i, o, stride in shapes:
        parts += [
            nn.Conv2d(i, o, 3, stride, 1, bias=False),
            nn.BatchNorm2d(o),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


@dataclass
class Desk:
    model: nn.Module
    calibration: list[Tensor]
    holdout: list[Tensor]
    test: Tensor
    labels: Tensor

    def accuracy(self, model: nn.Module) -> float:
        with torch.no_grad():
            return (model.eval()(self.test).argmax(1) == self.labels).float().mean().item()


@cache
def desk(epochs: int = 5) -> Desk:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=16, mode="bilinear")
    labels = torch.tensor(digits.target)
    rest, test = train_test_split(
        range(len(labels)), test_size=600, stratify=labels, random_state=0
    )
    x, y = images[rest], labels[rest]
    model = network()
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    order = torch.randperm(len(x))
    batches = list(x[order[:512]].split(64))
    return Desk(
        model.eval(), batches, list(x[order[512:768]].split(128)), images[test], labels[test]
    )


def small_plan(model: nn.Module) -> Plan:
    """The spec's: K = 16, d = 9, and d = 4 for the classifier; the first convolution is kept."""
    layers = list(find_layers(model).values())[1:]
    return Plan(
        tuple(LayerPlan(x.name, x.layout, 4 if x.layout.taps == 1 else 9, 16) for x in layers)
    )


@cache
def compressed(metric: Metric, target: Target = "weights") -> Compressed:
    d = desk()
    plan = small_plan(d.model)
    return compress(d.model, plan, d.calibration, metric=metric, target=target, norms="keep")


def mean_error(metric: Metric) -> float:
    errors = [layer.output_error for layer in compressed(metric).report]
    return sum(errors) / len(errors)


def test_the_layers_outputs_suffer_in_the_papers_order():
    plain, shared, full = (mean_error(metric) for metric in ("plain", "shared", "full"))
    assert shared <= 0.85 * plain
    assert full <= 0.5 * shared


def test_the_full_metric_alone_keeps_the_network():
    d = desk()
    assert d.accuracy(d.model) >= 0.98
    assert d.accuracy(compressed("plain").model) < 0.4
    assert d.accuracy(compressed("full").model) >= 0.9  # aims at the weights, as the paper does
    assert d.accuracy(compressed("full", "teacher").model) >= 0.95
    # On inputs that no layer saw, and in the order of what each search knows.
    kl = [
        mean_kl(d.model, compressed(*way).model, d.holdout)
        for way in (("plain",), ("full",), ("full", "teacher"))
    ]
    assert kl[0] > 5 * kl[1] > 10 * kl[2] > 0


@pytest.mark.slow
def test_training_the_codebooks_repairs_plain_k_means():
    d = desk()
    model = copy.deepcopy(compressed("plain").model)
    assert d.accuracy(model) < 0.4
    curve = finetune(model, d.model, d.calibration, holdout=d.holdout, steps=120)
    assert curve[0].holdout_kl > 10 * min(point.holdout_kl for point in curve)
    assert d.accuracy(model) >= 0.97
    best = copy.deepcopy(compressed("full", "teacher").model)
    finetune(best, d.model, d.calibration, holdout=d.holdout, steps=120)
    assert d.accuracy(best) >= d.accuracy(d.model) - 0.015
