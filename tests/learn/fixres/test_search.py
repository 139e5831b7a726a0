import numpy as np
import pytest
import torch
from torch import nn

from remanence.errors import InputError
from remanence.learn.fixres import Candidate, Cost, choose, measure_cost, pareto


def candidate(right, gmacs, size=224, ms=1.0):
    correct = np.arange(100) < right
    return Candidate(0, 224, size, 0.875, "none", Cost(gmacs, ms, 1.0), correct)


def test_choose_takes_the_most_accurate_within_the_budget_and_the_cheaper_of_equals():
    several = [candidate(70, 1.0), candidate(80, 4.0), candidate(80, 2.0), candidate(75, 3.0)]
    assert choose(several) is several[2]
    assert choose(several, budget_gmacs=1.5) is several[0]
    slow = [candidate(70, 1.0, ms=1.0), candidate(90, 1.0, ms=9.0)]
    assert choose(slow, budget_ms=5.0) is slow[0]
    with pytest.raises(InputError, match="no candidate fits"):
        choose(several, budget_gmacs=0.5)


def test_pareto_by_brute_force():
    rng = np.random.default_rng(0)
    several = [candidate(int(rng.integers(100)), float(rng.integers(1, 20))) for _ in range(60)]
    front = pareto(several)
    for c in several:
        beaten = any(
            o.accuracy >= c.accuracy
            and o.cost.gmacs <= c.cost.gmacs
            and (o.accuracy > c.accuracy or o.cost.gmacs < c.cost.gmacs)
            for o in several
        )
        assert beaten == all((c.accuracy, c.cost) != (f.accuracy, f.cost) for f in front)


def test_cost_counts_every_multiply_add():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5, bias=False),
    ).eval()
    cost = measure_cost(model, 16)
    assert cost.gmacs * 1e9 == pytest.approx(16 * 16 * 8 * 3 * 9 + 8 * 5)
    # The feature map of 8 channels is the largest tensor; pooling adds 8 numbers beside it.
    assert cost.activation_mib * 2**20 == pytest.approx(4 * (8 * 16 * 16 + 8), abs=256)
    assert cost.latency_ms > 0


def test_cost_of_convolutions_grows_with_the_square_of_the_size():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)).eval()
    ratio = measure_cost(model, 64).gmacs / measure_cost(model, 32).gmacs
    assert ratio == pytest.approx(4.0)


def test_freed_memory_is_not_counted():
    deep = nn.Sequential(*[nn.Conv2d(4, 4, 1, bias=False) for _ in range(20)])
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), deep).eval()
    one = 4 * 4 * 32 * 32
    with torch.no_grad():
        peak = measure_cost(model, 32).activation_mib * 2**20
    assert one <= peak <= 3 * one
