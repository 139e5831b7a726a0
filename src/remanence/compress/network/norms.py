"""BatchNorm after quantisation: statistics learnt anew, and folded for storage."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from remanence.compress.network.calibration import (
    Batch,
    Forward,
    device_of,
    mean_kl,
    own_randomness,
    run,
    sum_over_ranks,
)
from remanence.errors import InputError
from remanence.modes import evaluating

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def running_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorms of a network that normalise by running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> tuple[str, ...]:
    """Fold running statistics into scale and shift, in place.

    scale = gamma / sqrt(var + eps) and shift = beta - mean * scale; the statistics become those
    that normalise nothing, so that scale and shift are all there is to store.

    Args:
        model: A network; the BatchNorms that have both a scale and running statistics change, and
            compute the same in eval mode.

    Returns:
        Names of the norms that were folded.

    Raises:
        InputError: A scale or shift is not finite or would leave the range of its type.
    """
    folded = []
    for name, norm in running_norms(model).items():
        if not norm.affine or norm.weight is None:
            continue
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        for value, parameter in ((scale, norm.weight), (shift, norm.bias)):
            if not bool(value.to(parameter.dtype).isfinite().all()):
                raise InputError(
                    f"{name}: its folded scale or shift leaves {parameter.dtype}; "
                    "check its running statistics"
                )
            parameter.copy_(value)
        normalise_nothing(norm)
        folded.append(name)
    return tuple(folded)


@torch.no_grad()
def normalise_nothing(norm: _BatchNorm) -> None:
    """Give a BatchNorm mean 0 and variance 1 - eps: with its own eps, a divisor of 1."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorms use and learn each batch's statistics while all else is in eval mode.

    Args:
        model: The network; each module's mode is restored afterwards.
    """
    with evaluating(model):
        for norm in running_norms(model).values():
            norm.training = True
        yield


@torch.no_grad()
def reestimate_norms(
    model: nn.Module, batches: Iterable[Batch], forward: Forward | None = None
) -> None:
    """Replace running statistics by their mean over batches, in place.

    Args:
        model: The network.
        batches: This rank's batches; at least one over all ranks, each of at least two items.
        forward: See `calibration.run`.

    Raises:
        InputError: A batch cannot be run, for example because it holds one item only.
    """
    norms = running_norms(model)
    momenta = {name: norm.momentum for name, norm in norms.items()}
    seen = 0
    try:
        with batch_statistics(model), own_randomness(device_of(model), 0):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # the mean over batches
            for batch in batches:
                run(model, batch, forward)
                seen += 1
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
    total = sum_over_ranks(torch.tensor(float(seen)))
    if not total:
        raise InputError("no batch is left to estimate norms with; give more calibration batches")
    for norm in norms.values():
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            statistic.copy_(sum_over_ranks(statistic * seen) / total.to(statistic.device))


def improve_norms(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    holdout: Iterable[Batch],
    forward: Forward | None = None,
) -> bool:
    """Re-estimate running statistics, and keep them only if held-out KL to the teacher falls.

    It repairs a badly damaged network and harms a good one, so it must earn its place.

    Args:
        model: The quantised network; changed in place where it helps.
        teacher: The float network.
        batches: Batches to estimate with.
        holdout: Other batches, which decide; can be read twice.
        forward: See `calibration.run`.

    Returns:
        Whether the new statistics were kept.
    """
    norms = running_norms(model)
    before = mean_kl(teacher, model, holdout, forward)
    if not norms or before is None:
        return False
    kept = {name: _state(norm) for name, norm in norms.items()}
    reestimate_norms(model, batches, forward)
    after = mean_kl(teacher, model, holdout, forward)
    if after is not None and after < before:
        return True
    for name, norm in norms.items():
        norm.load_state_dict(kept[name])
    return False


def _state(norm: _BatchNorm) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in norm.state_dict().items()}
