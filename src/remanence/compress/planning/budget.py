"""A plan for a number of bytes: every layer gets the block and the codebook that pay most.

What a layer costs is known beforehand, and what it harms is measured: the relative error of its
output for each way to store it, times how much the network's output minds that error. Harms of
different layers are taken to add up.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from remanence.compress.network.calibration import (
    Batch,
    Forward,
    device_of,
    mean_kl,
    own_randomness,
)
from remanence.compress.network.gather import Calibration, gather_moments
from remanence.compress.network.layers import Layer, find_layers
from remanence.compress.network.trace import trace
from remanence.compress.planning.allocate import Choice, LayerChoices, allocate
from remanence.compress.planning.plan import Kept, LayerPlan, Plan, plan, plan_layer
from remanence.compress.quantizer.rows import Metric, quantize_rows
from remanence.compress.storage.format import DTYPES, Entries, dumps, layer_entries, record
from remanence.compress.storage.stored import folded_norms, stored_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn

    from remanence.compress.quantizer.moments import Moments

SPATIAL_CHANNELS = (1, 2, 4)  # input channels a block where a kernel has several positions
CHANNELS = (2, 4, 8, 16)  # and where it has one
CODEWORDS = (16, 64, 256, 1024)
FLOOR = 1e-6  # least sensitivity, as a share of the greatest


def plan_budget(
    model: nn.Module,
    budget: int | str,
    calibration: Iterable[Batch],
    *,
    recipe: str | Mapping[str, Any] = "small",
    keep: Sequence[str] = (),
    architecture: Mapping[str, Any] | None = None,
    reserve: int = 256,
    metric: Metric = "shared",
    positions: int = 2**14,
    iterations: int = 10,
    forward: Forward | None = None,
    seed: int = 0,
    on_layer: Callable[[str], None] | None = None,
) -> Plan:
    """Plan a network's compression into a number of bytes.

    Args:
        model: The float network; nothing of it changes.
        budget: Most bytes of the file that `save` will write, or text such as `2MiB`.
        calibration: Unlabelled batches, as for `compress`; a few hundred inputs do.
        recipe: Which layers stay in float whatever the budget, see `plan`.
        keep: Further layers that do.
        architecture: As will be given to `save`.
        reserve: Bytes left free for what else `save` will be given as `extra`.
        metric: How layers are quantised to measure their errors; `shared` is quick and orders the
            choices as the costlier metrics do.
        positions: Most positions of a layer's input that enter its moments.
        iterations: Most iterations of k-means.
        forward: See `calibration.run`.
        seed: Of everything random.
        on_layer: Gets the name of each layer that has been measured.

    Returns:
        The plan with the least expected harm among those within the budget.

    Raises:
        InputError: The budget is below the smallest possible size, which the message gives, or
            an argument is no good.
    """
    measured = measure_choices(
        model,
        calibration,
        recipe=recipe,
        keep=keep,
        metric=metric,
        positions=positions,
        iterations=iterations,
        forward=forward,
        seed=seed,
        on_layer=on_layer,
    )
    return allocate(
        model,
        measured,
        budget,
        kept=plan(model, recipe, keep=keep).kept,
        architecture=architecture,
        reserve=reserve,
    )


def measure_choices(
    model: nn.Module,
    calibration: Iterable[Batch],
    *,
    recipe: str | Mapping[str, Any] = "small",
    keep: Sequence[str] = (),
    metric: Metric = "shared",
    positions: int = 2**14,
    iterations: int = 10,
    forward: Forward | None = None,
    seed: int = 0,
    on_layer: Callable[[str], None] | None = None,
) -> dict[str, LayerChoices]:
    """Quantise each layer alone, in each way, and measure; arguments as for `plan_budget`.

    The KL is measured once a layer, at the recipe's own block and codebook: for small errors it is
    a quadratic form of the change of the layer's output, and so proportional to the relative error.
    Where the network's output holds no logits all layers count alike.

    Returns:
        Choices of each layer that the recipe quantises.
    """
    base = {layer.name: layer for layer in plan(model, recipe, keep=keep).layers}
    measured: dict[str, LayerChoices] = {}
    with own_randomness(device_of(model), seed), torch.no_grad():
        student, teacher = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
        layers = find_layers(student)
        data = Calibration.check(calibration, positions, seed, forward)
        first = next(iter(data.batches))
        traced = trace(student, layers, first, forward)
        traced.require(list(base))
        for name, planned in base.items():
            layer = layers[name]
            ways = _ways(planned)
            unit = math.lcm(*(way.block for way in ways))
            (moments,) = gather_moments(
                student, None, {name: (layer, layer)}, {name: unit}, traced, data
            ).values()
            before = layer.weight.detach().clone()
            rows = layer.layout.to_rows(before.float())
            choices = []
            sensitivity = 1.0
            for way in ways:
                quantised, error = _quantise(rows, way, moments, metric, iterations, seed)
                choices.append(Choice(way, _quantised_bytes(way), error))
                if way == ways[0]:
                    layer.write(quantised)
                    kl = mean_kl(teacher, student, [first], forward)
                    layer.write(before)
                    if kl is not None and error > 0:
                        sensitivity = max(kl, 0.0) / error
            choices.append(Choice(Kept(name, layer.layout, "budget"), _kept_bytes(model, layer), 0))
            measured[name] = LayerChoices(tuple(choices), sensitivity)
            if on_layer is not None:
                on_layer(name)
    # A layer that one batch shows no use for still gets what bytes are left.
    top = max(choices.sensitivity for choices in measured.values())
    floor = FLOOR * top if top > 0 else 1.0
    return {n: replace(c, sensitivity=max(c.sensitivity, floor)) for n, c in measured.items()}


def _ways(base: LayerPlan) -> list[LayerPlan]:
    """Return the recipe's own way to quantise a layer, then all others."""
    wanted = SPATIAL_CHANNELS if base.layout.taps > 1 else CHANNELS
    ways = [replace(base, note="")]
    for channels in wanted:
        for codewords in CODEWORDS:
            way = plan_layer(base.name, base.layout, channels, codewords)
            if isinstance(way, LayerPlan) and replace(way, note="") not in ways:
                ways.append(replace(way, note=""))
    return ways


def _quantise(
    rows: torch.Tensor,
    way: LayerPlan,
    moments: Moments,
    metric: Metric,
    iterations: int,
    seed: int,
) -> tuple[torch.Tensor, float]:
    made = quantize_rows(
        rows,
        way.block,
        way.codewords,
        moments=moments,
        metric=metric,
        layout=way.layout,
        iterations=iterations,
        seed=seed,
    )
    return made.quantised.weight(), made.output_error


def _quantised_bytes(way: LayerPlan) -> int:
    entries = layer_entries(way.name, way.layout, way.block, way.codewords)
    described = {way.name: record(way.layout, way.block, way.codewords)}
    # The metadata are JSON within JSON: their quotes are escaped.
    text = len(json.dumps(dumps(described)).encode()) - 3
    return way.code_bytes + way.codebook_bytes + text + _entry_bytes(entries)


def _kept_bytes(model: nn.Module, layer: Layer) -> int:
    dtype = stored_dtype(layer.name, layer.weight, folded_norms(model), keep_dtype=False)
    leaf = layer.parameter if layer.name.endswith(".in_proj") else "weight"
    name = f"{layer.name.removesuffix('in_proj')}{leaf}"
    return dtype.itemsize * layer.weight.numel() + _entry_bytes(
        {name: (dtype, tuple(layer.weight.shape))}
    )


def _entry_bytes(entries: Entries) -> int:
    """Bytes that tensors take in the header, and eight more for each one's digest."""
    table = {
        name: {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [10**6, 10**6]}
        for name, (dtype, shape) in entries.items()
    }
    return len(dumps(table).encode()) - 1 + 8 * len(entries)
