"""A whole network, layer after layer, each on the inputs that the layers before it leave."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from remanence.compress.modules.replace import quantised_layers, replace_layers
from remanence.compress.network.calibration import (
    Batch,
    Forward,
    device_of,
    held_out,
    mean_kl,
    own_randomness,
    pick,
    sum_over_ranks,
)
from remanence.compress.network.finetune import finetune
from remanence.compress.network.gather import Calibration, gather_moments
from remanence.compress.network.layers import Layer, find_layers
from remanence.compress.network.norms import improve_norms
from remanence.compress.network.trace import Trace, trace
from remanence.compress.quantizer.float16 import round_to_float16
from remanence.compress.quantizer.rows import Metric, output_error, quantize_rows
from remanence.compress.quantizer.target import bias_correction, mean_diagonal, teacher_target
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from remanence.compress.planning.plan import LayerPlan, Plan
    from remanence.compress.quantised import Quantised
    from remanence.compress.quantizer.moments import Moments

Target = Literal["teacher", "weights"]
Norms = Literal["auto", "keep"]


@dataclass(frozen=True)
class LayerReport:
    """How one layer was quantised.

    Attributes:
        name: The layer.
        block: Weights in a block.
        codewords: Codewords.
        output_error: Squared error of the layer's output on the student's inputs, relative to the
            output that was aimed at; both about their means where a bias or norm can take the mean
            error, whether it did or not.
        raw_error: The same with the means included.
        weight_error: Squared error of the weights, relative to the float network's.
        positions: Rows that entered the moments; 0 for a layer that multiplies nothing.
        pieces: Pieces of its input's second moment; more than 1 only for very long rows.
        no_signal: No input ever reached the layer: its weights were quantised by themselves.
        bias: What took the bias correction: `bias`, `norm` or `none`.
        seconds: Wall time.
    """

    name: str
    block: int
    codewords: int
    output_error: float
    raw_error: float
    weight_error: float
    positions: int
    pieces: int
    no_signal: bool
    bias: Literal["bias", "norm", "none"]
    seconds: float


@dataclass(frozen=True)
class FinishedLayer:
    """All that one layer's turn changed, so that an interrupted run can go on from it.

    Attributes:
        quantised: Codes and codebook.
        shift: Added to the layer's bias, or taken from the running mean of the norm behind it
            (output channels,); None where neither is there.
        report: How it went.
    """

    quantised: Quantised
    shift: Tensor | None
    report: LayerReport


@dataclass(frozen=True)
class Compressed:
    """A compressed network.

    Attributes:
        model: The network with quantised layers, in eval mode.
        quantised: Codes and codebook of each layer.
        report: One entry a layer, in the order in which they were quantised.
        norms_reestimated: Whether BatchNorm statistics were learnt anew.
        teacher_kl: KL(float network || model) on the held-out batches, in nats; on all of them
            where there is only one. None where the output holds no logits.
    """

    model: nn.Module
    quantised: dict[str, Quantised]
    report: list[LayerReport]
    norms_reestimated: bool
    teacher_kl: float | None


def compress(
    model: nn.Module,
    plan: Plan,
    calibration: Iterable[Batch],
    *,
    metric: Metric = "full",
    target: Target = "teacher",
    bias: bool = True,
    norms: Norms = "auto",
    forward: Forward | None = None,
    positions: int = 2**17,
    layer_steps: int = 0,
    seed: int = 0,
    on_layer: Callable[[FinishedLayer], None] | None = None,
    done: Mapping[str, FinishedLayer] | None = None,
) -> Compressed:
    """Quantise a network's layers one by one in order of execution (section 3.3).

    Layers that multiply the very same tensor share a pass over the batches. Each pass runs the
    float network and the partly quantised one no further than these layers. Under
    `torch.distributed` each of n ranks passes the batches r, r + n, r + 2 n, ... of the calibration
    set, and every rank returns the same network.

    Args:
        model: A float network; it is copied, and nothing of it changes.
        plan: Which layers, in what blocks, with how many codewords.
        calibration: Unlabelled batches, each a tensor, a tuple of arguments or a mapping of
            keyword arguments. They are read once for each layer; an iterator that can be read only
            once is kept as a list.
        metric: What the search holds dear, see `quantizer`.
        target: `teacher` aims at the float network's outputs from the damaged inputs; `weights` at
            the float weights, as the paper does. In a detector, whose later inputs depend on its
            own proposals, use `weights`.
        bias: Correct each layer's mean output, at no cost in bytes, and let the search mind only
            what that leaves.
        norms: `auto` re-estimates BatchNorm statistics on four fifths of the batches and keeps
            them where the KL to the float network falls on the rest; `keep` leaves them.
        forward: Runs a network on a batch; `model(batch)`, `model(*batch)` or `model(**batch)`
            without it.
        positions: At most about this many positions of a layer's input enter its moments.
        layer_steps: Steps of codebook finetuning after each layer, on that layer alone; the paper
            takes 2,500.
        seed: Seed of everything random.
        on_layer: Gets each layer as it is finished.
        done: Layers that an interrupted run with the same arguments has finished.

    Returns:
        The compressed network and how it went.

    Raises:
        InputError: The plan or a batch does not fit the network, a batch is empty or not finite,
            or a planned layer is never run, or in a way that cannot be followed.
    """
    _check_options(metric=metric, target=target, norms=norms, positions=positions)
    wanted = {layer.name: layer for layer in plan.layers}
    finished = dict(done or {})
    with own_randomness(device_of(model), seed):
        student, teacher = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
        layers, teacher_layers = find_layers(student), find_layers(teacher)
        _check_plan(wanted, layers)
        data = Calibration.check(calibration, positions, seed, forward)
        traced = trace(student, layers, next(iter(data.batches)), forward)
        traced.require(list(wanted))

        results: dict[str, FinishedLayer] = {}
        for group in _groups(traced, wanted):
            left = [name for name in group if name not in finished]
            started = time.perf_counter()
            gathered = gather_moments(
                student,
                teacher if target == "teacher" else None,
                {name: (layers[name], teacher_layers[name]) for name in left},
                {name: wanted[name].block for name in left},
                traced,
                data,
            )
            for name in group:
                if name in finished:
                    result = finished[name]
                else:
                    result = _quantise(
                        layers[name],
                        wanted[name],
                        gathered.pop(name),
                        traced,
                        metric=metric,
                        bias=bias,
                        seed=seed + len(results),
                    )
                _write(layers[name], traced, result)
                if layer_steps and name not in finished:
                    result = _tune(student, teacher, name, result, data, layer_steps)
                    layers[name].write(result.quantised.weight())
                if name not in finished:
                    seconds = time.perf_counter() - started
                    report = dataclasses.replace(result.report, seconds=seconds)
                    result = dataclasses.replace(result, report=report)
                    started = time.perf_counter()
                    if on_layer is not None:
                        on_layer(result)
                results[name] = result

        quantised = {name: result.quantised for name, result in results.items()}
        replace_layers(student, quantised)
        student.eval()
        train, held = _split(data)
        holdout = list(pick(data.batches, held))
        improved = (
            norms == "auto"
            and train != held
            and improve_norms(student, teacher, pick(data.batches, train), holdout, forward)
        )
        kl = mean_kl(teacher, student, holdout, forward)
    return Compressed(
        student, quantised, [result.report for result in results.values()], improved, kl
    )


def _quantise(
    layer: Layer,
    plan: LayerPlan,
    moments: Moments,
    traced: Trace,
    *,
    metric: Metric,
    bias: bool,
    seed: int,
) -> FinishedLayer:
    rows = layer.layout.to_rows(layer.weight.detach()).float()
    multiplies = any(traced.geometries[layer.name])
    whole = layer.name not in traced.partial
    could = _bias_taker(layer, traced) if multiplies and whole else "none"
    about_mean = moments if could == "none" else _about_mean(moments)
    taker, seen = (could, about_mean) if bias else ("none", moments)
    aim = teacher_target(rows, seen) if moments.teacher_mean is not None and whole else rows
    found = quantize_rows(
        aim,
        plan.block,
        plan.codewords,
        moments=seen,
        metric=metric if multiplies else "plain",
        layout=layer.layout,
        seed=seed,
    )
    decoded = found.quantised.rows()
    off = (rows - decoded).square().sum() / rows.square().sum().clamp_min(1e-30)
    report = LayerReport(
        name=layer.name,
        block=plan.block,
        codewords=plan.codewords,
        output_error=output_error(aim, decoded, about_mean),
        raw_error=output_error(aim, decoded, moments),
        weight_error=off.item(),
        positions=moments.count if multiplies else 0,
        pieces=len(moments.pieces),
        no_signal=found.no_signal,
        bias=taker,
        seconds=0.0,
    )
    shift = None
    if taker != "none":
        shift = _by_channel(layer, bias_correction(rows, decoded, moments))
    return FinishedLayer(found.quantised, shift, report)


def _about_mean(moments: Moments) -> Moments:
    """An error of the mean output costs nothing where the bias will take it."""
    centred = moments.centred()
    # Below, what is left is the rounding of products in single precision.
    varies = mean_diagonal(list(centred.seconds)) > 1e-5 * mean_diagonal(list(moments.seconds))
    return centred if varies else moments


def _bias_taker(layer: Layer, traced: Trace) -> Literal["bias", "norm", "none"]:
    if layer.bias is not None:
        return "bias"
    return "norm" if layer.name in traced.norms else "none"


def _by_channel(layer: Layer, shift: Tensor) -> Tensor:
    """A number for each row as one for each output channel."""
    if layer.layout.kind != "conv_transpose":
        return shift
    # Each of a kernel's positions reaches one output pixel in prod(stride), away from the border.
    stride = layer.module.stride
    assert isinstance(stride, tuple)
    channels = layer.layout.groups * layer.layout.shape[1]
    return shift.reshape(channels, -1).sum(1) / math.prod(stride)


@torch.no_grad()
def _write(layer: Layer, traced: Trace, result: FinishedLayer) -> None:
    layer.write(result.quantised.weight())
    if result.shift is None:
        return
    if layer.bias is not None:
        layer.bias.add_(result.shift.to(layer.bias))
    else:
        mean = traced.norms[layer.name].running_mean
        assert mean is not None
        mean.sub_(result.shift.to(mean))


def _tune(
    student: nn.Module,
    teacher: nn.Module,
    name: str,
    result: FinishedLayer,
    data: Calibration,
    steps: int,
) -> FinishedLayer:
    """Train one layer's codebook; the student itself keeps its plain layers."""
    trial = replace_layers(copy.deepcopy(student), {name: result.quantised})
    train, holdout = _split(data)
    finetune(
        trial,
        teacher,
        list(pick(data.batches, train)),
        holdout=list(pick(data.batches, holdout)),
        steps=steps,
        schedule="constant",
        layers=[name],
        norms_train=False,
        forward=data.forward,
    )
    codebook, exponent = round_to_float16(quantised_layers(trial)[name].quantised().codebook)
    tuned = dataclasses.replace(result.quantised, codebook=codebook, exponent=exponent)
    return dataclasses.replace(result, quantised=tuned)


def _groups(traced: Trace, wanted: Mapping[str, LayerPlan]) -> Iterator[list[str]]:
    """Yield layers in order of execution, those with the same input together."""
    groups: dict[object, list[str]] = {}
    for name in traced.order:
        if name in wanted:
            groups.setdefault(traced.inputs[name], []).append(name)
    return iter(groups.values())


def _split(data: Calibration) -> tuple[set[int], set[int]]:
    """This rank's batches to estimate with and those held out; the same where there is only one."""
    everything = set(range(data.count))
    held = held_out(data.count)
    if not sum_over_ranks(torch.tensor(float(len(held)))):
        return everything, everything
    return everything - held, held


def _check_options(**options: object) -> None:
    legal = {"metric": get_args(Metric), "target": get_args(Target), "norms": get_args(Norms)}
    for name, values in legal.items():
        if options[name] not in values:
            raise InputError(f"{name} {options[name]!r} is unknown: give one of {values}")
    if not isinstance(options["positions"], int) or options["positions"] < 1:
        raise InputError(f"positions {options['positions']}: give a whole number from 1")


def _check_plan(wanted: Mapping[str, LayerPlan], layers: Mapping[str, Layer]) -> None:
    if not wanted:
        raise InputError("the plan quantises no layer; let it keep fewer")
    for name, planned in wanted.items():
        layer = layers.get(name)
        if layer is None or layer.layout != planned.layout:
            raise InputError(f"the plan's layer {name} is not in the model; plan this model")
        planned.layout.check_block(planned.block, name)
        if not bool(layer.weight.isfinite().all()):
            raise InputError(f"{name}: its weight holds NaN or infinity; give a sound model")
