import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from remanence.compress.modules.replace import quantised_layers, replace_layers
from remanence.compress.network.calibration import mean_kl
from remanence.compress.network.explain import explain
from remanence.compress.network.layers import find_layers
from remanence.compress.planning.allocate import allocate, knapsack, parse_bytes
from remanence.compress.planning.budget import (
    measure_choices,
    plan_budget,
)
from remanence.compress.planning.plan import Kept, LayerPlan, Plan, plan
from remanence.compress.planning.size import size
from remanence.compress.quantizer.moments import Moments
from remanence.compress.quantizer.rows import quantize_rows
from remanence.compress.storage.file import inspect_file, save
from remanence.errors import InputError


def net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    model[10].weight.data *= 20
    return model.eval()


BATCHES = [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.fixture(scope="module")
def measured():
    return measure_choices(net(), BATCHES)


def weighted(choices):
    return [choice.error * choices.sensitivity for choice in choices.choices]


def harm(measured, planned):
    """Expected harm of a plan, from the measurements."""
    hows = {how.name: how for how in (*planned.layers, *planned.kept)}
    return sum(
        dict(zip([choice.how for choice in choices.choices], weighted(choices), strict=True))[
            hows[name]
        ]
        for name, choices in measured.items()
    )


def test_the_knapsack_is_the_best_of_all_combinations():
    rng = np.random.default_rng(0)
    for _ in range(60):
        groups = int(rng.integers(1, 5))
        costs = [rng.integers(1, 60, rng.integers(1, 6)) for _ in range(groups)]
        harms = [rng.random(len(cost)) for cost in costs]
        room = int(sum(cost.min() for cost in costs) + rng.integers(0, 100))
        picks = knapsack(costs, harms, room)
        best = min(
            sum(h[i] for h, i in zip(harms, combination, strict=True))
            for combination in itertools.product(*(range(len(cost)) for cost in costs))
            if sum(c[i] for c, i in zip(costs, combination, strict=True)) <= room
        )
        assert sum(c[i] for c, i in zip(costs, picks, strict=True)) <= room
        assert sum(h[i] for h, i in zip(harms, picks, strict=True)) == pytest.approx(best)


def test_a_knapsack_of_many_bytes_keeps_within_them_and_near_the_bound():
    rng = np.random.default_rng(1)
    costs = [rng.integers(1_000, 1_000_000, 12) for _ in range(60)]
    harms = [1e3 / cost ** rng.uniform(0.5, 1.5) for cost in costs]
    low, high = (sum(int(f(cost)) for cost in costs) for f in (np.min, np.max))
    room = (low + high) // 2
    picks = knapsack(costs, harms, room)
    spent = sum(int(c[i]) for c, i in zip(costs, picks, strict=True))
    assert room - 60 * (room - low) / 2**16 - 20_000 < spent <= room
    reached = sum(h[i] for h, i in zip(harms, picks, strict=True))
    # No choice can be below the Lagrangian's value, whatever the price of a byte.
    bounds = [
        sum((h + price * c).min() for h, c in zip(harms, costs, strict=True)) - price * room
        for price in np.geomspace(1e-12, 1e-2, 400)
    ]
    assert max(bounds) <= reached <= 1.01 * max(bounds)


def every_plan(measured, kept):
    """Exact size and harm of every combination of choices."""
    names = list(measured)
    for picks in itertools.product(*(range(len(measured[n].choices)) for n in names)):
        hows = [measured[n].choices[i].how for n, i in zip(names, picks, strict=True)]
        layers = tuple(how for how in hows if isinstance(how, LayerPlan))
        made = Plan(layers, (*kept, *(h for h in hows if isinstance(h, Kept))))
        cost = sum(weighted(measured[n])[i] for n, i in zip(names, picks, strict=True))
        yield picks, made, cost


def test_the_plan_is_the_best_of_all_plans_within_the_bytes(measured):
    model = net()
    kept = plan(model).kept
    few = {
        name: replace(choices, choices=(*choices.choices[:4], choices.choices[-1]))
        for name, choices in measured.items()
    }
    everything = [(size(model, made).total, cost) for _, made, cost in every_plan(few, kept)]
    low, high = min(total for total, _ in everything), max(total for total, _ in everything)
    for budget in np.linspace(low, high, 40).astype(int).tolist():
        found = allocate(model, few, budget, kept=kept, reserve=0)
        best = min(cost for total, cost in everything if total <= budget)
        assert size(model, found).total <= budget
        assert harm(few, found) == pytest.approx(best, rel=1e-9)
    with pytest.raises(InputError, match=rf"at least {low} bytes"):
        allocate(model, few, low - 1, kept=kept, reserve=0)
    assert size(model, allocate(model, few, low, kept=kept, reserve=0)).total == low


def test_more_bytes_never_harm(measured):
    model = net()
    kept = plan(model).kept
    harms = [
        harm(measured, allocate(model, measured, budget, kept=kept))
        for budget in range(8_000, 24_000, 1_000)
    ]
    assert harms == sorted(harms, reverse=True)
    assert harms[-1] == 0


@pytest.mark.parametrize("budget", [9_000, 11_000, 14_000])
def test_the_file_of_a_budgeted_network_keeps_the_budget(tmp_path, budget):
    model = net()
    architecture = {"name": "net"}
    planned = plan_budget(model, budget, BATCHES, architecture=architecture, reserve=0)
    quantised = {}
    for layer in planned.layers:
        rows = layer.layout.to_rows(find_layers(model)[layer.name].weight.detach())
        quantised[layer.name] = quantize_rows(
            rows,
            layer.block,
            layer.codewords,
            moments=None,
            metric="plain",
            layout=layer.layout,
        ).quantised
    counted = size(model, planned, architecture=architecture)
    replace_layers(model, quantised)
    save(model, tmp_path / "f", architecture=architecture)
    assert (tmp_path / "f").stat().st_size == counted.total <= budget
    assert len(inspect_file(tmp_path / "f").layers) == len(planned.layers)


def test_a_layer_that_matters_more_gets_more_bytes(measured):
    model = net()
    budget = size(model, plan(model)).total + 300
    for name in measured:
        spent = []
        for factor in (1e-3, 1e3):
            louder = replace(measured[name], sensitivity=measured[name].sensitivity * factor)
            found = allocate(model, {**measured, name: louder}, budget, kept=plan(model).kept)
            spent.append({row["layer"]: row["bytes"] for row in found.table()}[name])
        assert spent[1] > spent[0]


def test_errors_and_sensitivity_are_those_of_the_outputs(measured):
    """By hand: all patches, the layer's output on them, the network's output with that layer."""
    model = net()
    layer = find_layers(model)["3"]
    with torch.no_grad():
        x = torch.cat([model[:3](batch) for batch in BATCHES])
    patches = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 1, 144)
    moments = Moments(layer.layout)
    moments.add(patches)
    rows = layer.layout.to_rows(layer.weight.detach().clone())
    choices = measured["3"]
    for choice in choices.choices[:-1]:
        made = quantize_rows(
            rows,
            choice.how.block,
            choice.how.codewords,
            moments=moments,
            metric="shared",
            layout=layer.layout,
            iterations=10,
            seed=0,
        ).quantised
        off = (patches @ (rows - made.rows()).T).square().sum().item()
        assert choice.error == pytest.approx(
            off / (patches @ rows.T).square().sum().item(), rel=1e-3
        )
        if (choice.how.block, choice.how.codewords) == (9, 64):
            layer.write(made.weight())
            kl = mean_kl(net(), model, BATCHES[:1])
            layer.write(layer.layout.to_weight(rows))
            assert choices.sensitivity * choice.error == pytest.approx(kl, rel=1e-3)
    assert choices.choices[-1].error == 0


def test_bytes_are_spent_even_on_a_layer_that_changes_nothing():
    model = net()
    model[4].weight.data.zero_()  # the norm behind layer 3 lets nothing of it through
    planned = plan_budget(model, 60_000, BATCHES, reserve=0)
    assert not planned.layers


def test_nothing_of_the_network_changes():
    model = net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    plan_budget(model, 12_000, BATCHES)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_same_seed_gives_the_same_plan():
    plans = [plan_budget(net(), 10_000, BATCHES, seed=3) for _ in range(2)]
    assert plans[0] == plans[1]


def test_kept_layers_stay_kept_and_progress_is_told():
    seen = []
    planned = plan_budget(net(), 12_000, BATCHES, keep=["10"], on_layer=seen.append)
    assert {"0", "10"} <= {kept.name for kept in planned.kept}
    assert seen == ["3", "6"]


@pytest.mark.parametrize(
    ("text", "count"),
    [(5, 5), ("2097152", 2**21), ("2MiB", 2**21), ("1.5 MB", 1_500_000), ("8kB", 8000), ("9B", 9)],
)
def test_bytes_are_read_as_written(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["two", "2iB", "-3", "0", "2MBB", ""])
def test_other_bytes_are_refused(text):
    with pytest.raises(InputError, match=r"bytes?"):
        parse_bytes(text)


def test_a_budget_below_the_smallest_names_it():
    with pytest.raises(InputError, match=r"needs at least \d+ bytes") as error:
        plan_budget(net(), "1kB", BATCHES)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert plan_budget(net(), least, BATCHES).layers
    with pytest.raises(InputError, match=r"needs at least \d+ bytes"):
        plan_budget(net(), least - 1, BATCHES)


def test_explain_names_the_layer_that_was_ruined():
    teacher = net()
    model = net()
    layers = find_layers(model)
    quantised = {}
    for name in ("3", "6", "10"):
        rows = layers[name].layout.to_rows(layers[name].weight.detach())
        block, codewords = (9, 64) if name == "3" else (4, 64)
        quantised[name] = quantize_rows(
            rows,
            block,
            2 if name == "6" else codewords,
            moments=None,
            metric="plain",
            layout=layers[name].layout,
        ).quantised
    replace_layers(model, quantised)
    told = explain(model, teacher, BATCHES)
    assert {name for name, _ in told} == {"3", "6", "10"}
    assert told[0][0] == "6"
    assert told[0][1] < mean_kl(teacher, model, BATCHES)
    assert len(quantised_layers(model)) == 3
    # Independent: the same network without that layer's quantisation.
    fresh = replace_layers(net(), {name: quantised[name] for name in ("3", "10")})
    assert told[0][1] == pytest.approx(mean_kl(teacher, fresh, BATCHES), rel=1e-4)
    with pytest.raises(InputError, match="no quantised layer"):
        explain(teacher, teacher, BATCHES)
    with pytest.raises(InputError, match="the teacher has no such layer"):
        explain(model, nn.Sequential(nn.Linear(3, 3)), BATCHES)
