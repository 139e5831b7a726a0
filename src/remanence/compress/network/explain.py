"""Which layers of a quantised network cost the accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from remanence.compress.modules.replace import float_copy, quantised_layers
from remanence.compress.network.calibration import Batch, Forward, check_batches, mean_kl
from remanence.compress.network.layers import find_layers
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn


@torch.no_grad()
def explain(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Forward | None = None,
) -> list[tuple[str, float]]:
    """Measure KL(teacher || model) with one layer's float weight restored at a time.

    Only the weight is restored; biases and norms, which were fitted to the quantised weights, stay.

    Args:
        model: The quantised network; it is left as it is.
        teacher: The float network that it came from.
        batches: Unlabelled batches, as for `compress`.
        forward: See `calibration.run`.

    Returns:
        Names of the quantised layers and the KL in nats that is left without their quantisation;
        the costliest layer, which leaves least, first.

    Raises:
        InputError: Nothing is quantised, the teacher is another network, or its output holds no
            logits.
    """
    again, _ = check_batches(batches)
    student = float_copy(model)
    layers, originals = find_layers(student), find_layers(teacher)
    left = []
    for name in quantised_layers(model):
        if name not in layers:
            continue  # it shares the weight of a layer before
        if name not in originals or originals[name].layout != layers[name].layout:
            raise InputError(f"{name}: the teacher has no such layer; give the network before")
        quantised = layers[name].weight.detach().clone()
        layers[name].write(originals[name].weight)
        kl = mean_kl(teacher, student, again, forward)
        layers[name].write(quantised)
        if kl is None:
            raise InputError("the network's output holds no logits: give a `forward` that does")
        left.append((name, kl))
    if not left:
        raise InputError("the network has no quantised layer: give the one that was compressed")
    return sorted(left, key=lambda entry: entry[1])
