"""The desk experiment of FixRes on CIFAR-10, with its margins, over three seeds. Slow."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from remanence.jobs.learn.classifier import classifier
from remanence.jobs.learn.fixres import fixres

CIFAR10 = Path(__file__).parents[1] / "../shared/data/cifar10"
SIZES = [12, 16, 20, 24, 28, 32, 36, 40]
TUNED = [20, 24, 28, 32]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CIFAR10.exists(), reason="needs ../shared/data/cifar10"),
]


@pytest.fixture(scope="module", params=["cifar_convnet5", "cifar_mobilenet"])
def measured(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    network = {
        "cifar_convnet5": ("classifier+last_bn", 0.0),
        "cifar_mobilenet": ("head_block", 0.1),
    }
    scope, smoothing = network[request.param]
    rows, unsmoothed = [], []
    for seed in range(3):
        base = folder / f"base{seed}"
        common = {"limit": 10_000, "seed": seed, "smoothing": smoothing}
        classifier(
            str(CIFAR10), out=base, model=request.param, size=20, epochs=8, lr=0.05, **common
        )
        fix = {"model": [str(base / "model")], "tune_sizes": TUNED, "scope": [scope], "epochs": 2}
        fixed = fixres(str(CIFAR10), out=folder / f"fixed{seed}", sizes=SIZES, **fix, **common)
        rows.append(fixed.results)
        if smoothing:
            out = folder / f"unsmoothed{seed}"
            plainly = common | {"smoothing": 0.0}
            unsmoothed.append(fixres(str(CIFAR10), out=out, sizes=TUNED, **fix, **plainly).results)

    def mean(name, rows=rows):
        found = [r for results in rows for r in results["candidates"] if r["scope"] == name]
        sizes = sorted({r["size"] for r in found})
        return {s: 100 * np.mean([r["accuracy"] for r in found if r["size"] == s]) for s in sizes}

    activations = [results["activations"] for results in rows]
    return mean("none"), mean(scope), activations, unsmoothed and mean(scope, unsmoothed)


def test_the_best_test_size_is_larger_than_the_train_size(measured):
    plain, _, _, _ = measured
    assert max(plain, key=plain.get) >= 1.1 * 20


def test_tuning_at_a_larger_size_beats_the_network_as_trained(measured):
    plain, tuned, _, _ = measured
    assert max(tuned.values()) - plain[20] >= 1.0


def test_tuning_does_not_lose_at_any_size(measured):
    plain, tuned, _, _ = measured
    assert all(tuned[size] >= plain[size] - 0.5 for size in TUNED)


def test_activations_get_fewer_zeros_and_less_spread_with_size(measured):
    _, _, activations, _ = measured
    for rows in activations:
        assert all(a["std"] > b["std"] for a, b in itertools.pairwise(rows))
        zeros = [row["zero_fraction"] for row in rows]
        assert all(a >= b for a, b in itertools.pairwise(zeros))


def test_smoothing_the_tuning_hardly_moves_its_accuracy(measured):
    _, tuned, _, unsmoothed = measured
    if not unsmoothed:
        pytest.skip("this network is tuned without smoothing")
    assert all(abs(tuned[size] - unsmoothed[size]) <= 0.5 for size in TUNED)
