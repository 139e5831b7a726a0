"""The moments of a layer's inputs over all calibration batches, with the teacher's beside them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from remanence.compress.network.calibration import (
    check_batches,
    items_in,
    rank_and_ranks,
    sum_over_ranks,
)
from remanence.compress.network.recorder import listen
from remanence.compress.quantizer.moments import Moments
from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from remanence.compress.network.calibration import Batch, Forward
    from remanence.compress.network.layers import Layer
    from remanence.compress.network.recorder import Product
    from remanence.compress.network.trace import Trace

CHUNK_VALUES = 2**24  # unfolded numbers at a time: 64 MiB in float32


@dataclass(frozen=True)
class Calibration:
    """Calibration inputs and how they are used.

    Attributes:
        batches: This process's batches, which can be read again and again.
        count: Number of this process's batches.
        total: Items over all processes.
        positions: Most positions of a layer that enter its moments.
        seed: For the draw of those positions.
        forward: See `calibration.run`.
    """

    batches: Iterable[Batch]
    count: int
    total: int
    positions: int
    seed: int
    forward: Forward | None

    @classmethod
    def check(
        cls, batches: Iterable[Batch], positions: int, seed: int, forward: Forward | None
    ) -> Calibration:
        """Look at all batches once.

        Raises:
            InputError: See `calibration.check_batches`.
        """
        again, counts = check_batches(batches)
        total = int(sum_over_ranks(torch.tensor(float(sum(counts)))))
        return cls(again, len(counts), total, positions, seed, forward)


def gather_moments(
    student: nn.Module,
    teacher: nn.Module | None,
    layers: Mapping[str, tuple[Layer, Layer]],
    blocks: Mapping[str, int],
    trace: Trace,
    calibration: Calibration,
) -> dict[str, Moments]:
    """Run student and teacher up to some layers and accumulate what these multiply.

    Args:
        student: The network whose layers are being quantised.
        teacher: The float network, for moments between its inputs and the student's.
        layers: The student's and the teacher's layer of each name; they multiply the same inputs.
        blocks: Block size of each layer.
        trace: One traced forward.
        calibration: The batches. Rank r of n has the batches r, r + n, ... of all.

    Returns:
        Moments of each layer over all ranks; the same sums where layers see equal rows. Layers that
        multiply nothing (embeddings) get those of white rows.

    Raises:
        InputError: Teacher and student reach a layer with inputs of different sizes, or a value is
            not finite.
    """
    moments, leaders = _start(layers, blocks, trace)
    if leaders:
        rank, ranks = rank_and_ranks()
        for index, batch in enumerate(calibration.batches):
            _add_batch(
                student,
                teacher,
                {name: layers[name] for name in dict.fromkeys(leaders.values())},
                moments,
                trace,
                calibration,
                batch,
                index * ranks + rank,
            )
    for name in dict.fromkeys(leaders.values()):
        moments[name].all_reduce()
    for name, leader in leaders.items():
        if leader != name:
            moments[name] = copy.copy(moments[leader])
            moments[name].layout = layers[name][0].layout  # as many rows as it has itself
    return moments


def _start(
    layers: Mapping[str, tuple[Layer, Layer]], blocks: Mapping[str, int], trace: Trace
) -> tuple[dict[str, Moments], dict[str, str]]:
    """Return empty moments, and the layer in whose place each layer's inputs are taken."""
    moments: dict[str, Moments] = {}
    leader_of: dict[object, str] = {}
    leaders: dict[str, str] = {}
    for name, (layer, _) in layers.items():
        geometries = trace.geometries[name]
        if not any(geometries):
            moments[name] = Moments.identity(layer.layout)
            continue
        size = (layer.layout.groups, layer.layout.row_length, blocks[name])
        rows_alike = tuple(
            g and (g.layout.kind, g.layout.shape[2:], g.stride, g.padding, g.dilation)
            for g in geometries
        )
        leaders[name] = leader_of.setdefault((size, rows_alike), name)
        if leaders[name] == name:
            moments[name] = Moments(layer.layout, blocks[name])
    return moments, leaders


def _add_batch(
    student: nn.Module,
    teacher: nn.Module | None,
    layers: Mapping[str, tuple[Layer, Layer]],
    moments: Mapping[str, Moments],
    trace: Trace,
    calibration: Calibration,
    batch: Batch,
    number: int,
) -> None:
    theirs: dict[tuple[str, int], Product] = {}

    def keep(product: Product, call: int) -> None:
        theirs[product.name, call] = product.copied()

    def add(product: Product, call: int) -> None:
        if product.geometry is None:
            return
        name = product.name
        beside = theirs.get((name, call))
        if teacher is not None and (beside is None or beside.input.shape != product.input.shape):
            raise InputError(
                f"{name}: teacher and student reach it with inputs of different sizes; "
                'give target="weights"'
            )
        share = calibration.positions * items_in(batch) / calibration.total / trace.calls[name]
        seed = hash((calibration.seed, number, call))
        try:
            for rows, teacher_rows in _paired_rows(product, beside, math.ceil(share), seed):
                moments[name].add(rows, teacher_rows)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    for model, place, hear in ((teacher, 1, keep), (student, 0, add)):
        if model is not None:
            listen(
                model,
                {name: pair[place] for name, pair in layers.items()},
                batch,
                hear,
                calls=trace.calls,
                forward=calibration.forward,
                seed=calibration.seed + number,
            )


def _paired_rows(
    product: Product, beside: Product | None, quota: int, seed: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield rows of both at the same positions, a bounded number at a time."""
    items = len(product.input)
    if not items:
        return
    per_item = product.rows_per_item()
    rate = min(1.0, quota / (items * per_item))
    geometry = product.geometry
    assert geometry is not None
    values = geometry.layout.groups * geometry.layout.row_length * per_item * rate
    step = max(1, int(CHUNK_VALUES / values))
    for start in range(0, items, step):
        part = slice(start, min(start + step, items))
        draw = None if rate == 1 else math.ceil(rate * per_item * (part.stop - part.start))
        rows, teacher_rows = (
            None
            if one is None
            else one.rows(part, draw, torch.Generator().manual_seed(seed % 2**63 + start))
            for one in (product, beside)
        )
        assert rows is not None
        yield rows, teacher_rows
