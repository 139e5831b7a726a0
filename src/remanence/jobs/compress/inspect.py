"""`remanence compress inspect`: what a compressed file holds, and how well its network does."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Column, Table

from remanence.compress.modules.execution import Choice, choose_modes
from remanence.compress.modules.quantised_layer import Mode
from remanence.compress.network.calibration import move
from remanence.compress.network.explain import explain
from remanence.compress.storage.file import inspect_file
from remanence.compress.storage.reader import FileInfo
from remanence.errors import InputError
from remanence.jobs.compress.inputs import open_inputs
from remanence.jobs.compress.measured import Measured, answers, compare
from remanence.jobs.compress.subject import Opened, open_compressed
from remanence.jobs.options import check_options
from remanence.kit.devices import launch
from remanence.kit.report import Report
from remanence.kit.run import run_folder


@dataclass(frozen=True)
class Inspected:
    """What `inspect` found.

    Attributes:
        info: What the file says of itself.
        measured: The float network, where it was given, and the compressed one on the data.
        shares: KL to the float network with one layer in float, by layer.
        modes: How fast each layer is in each mode, where it was measured.
    """

    info: FileInfo
    measured: tuple[Measured, ...]
    shares: tuple[tuple[str, float], ...]
    modes: dict[str, Choice]


def inspect(
    file: Path,
    *,
    out: Path | None = None,
    data: str | None = None,
    teacher: str | None = None,
    model: str | None = None,
    size: int | None = None,
    modes: bool = False,
    batch_size: int = 32,
    limit: int | None = None,
    skip_broken: bool = False,
    seed: int = 0,
) -> Inspected:
    """Show what a compressed file holds, layer by layer, and optionally how well it does.

    Args:
        file: The compressed file.
        out: Run folder to create, with a report; if not given, the table is only printed.
        data: Images, or .npy inputs, to run the network on; its accuracy where they have labels.
        teacher: The float network that it came from, or the file of its weights: shows how far
            the two disagree, and which layer costs how much.
        model: FILE.py:FUNCTION, for a network that only its own code can build.
        size: Side of the images, for a module that does not say.
        modes: Measure every layer decoded once, decoded at each call and looked up, on this
            machine.
        batch_size: Images a step.
        limit: Use only so many images of each split.
        skip_broken: Leave unreadable images out and count them.
        seed: Seed.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k != "out"}
    check_options(options)
    if data is None and (teacher is not None or modes):
        raise InputError("--teacher and --modes need inputs; give --data")
    info = inspect_file(file)
    with ExitStack() as stack:
        run = None
        if out is not None:
            run = stack.enter_context(run_folder(out, "compress inspect", options, seed=seed))
        found = Inspected(info, (), (), {})
        if data is not None:
            found = _measure(info, open_compressed(file, model, size), data, teacher, options)
        _print(found)
        if run is not None:
            run.write_results(
                {
                    "size": asdict(info.size) | {"total": info.size.total},
                    "layers": [_row(info, index) for index in range(len(info.layers))],
                    "accuracy": [each.accuracy for each in found.measured],
                    "agreement": [each.agreement for each in found.measured],
                    "kl": [each.kl for each in found.measured],
                    "sensitivity": dict(found.shares),
                    "modes": {name: asdict(each) for name, each in found.modes.items()},
                }
            )
            report = _report(file, found)
            report.section("Run")
            report.facts(run.summary())
            report.write(run.path("report.html"))
    return found


def _measure(
    info: FileInfo, opened: Opened, data: str, teacher: str | None, options: dict[str, Any]
) -> Inspected:
    fabric = launch(1, "32-true")
    subject = opened.subject
    inputs = open_inputs(
        data,
        subject,
        fabric,
        calibration=options["batch_size"],
        batch_size=options["batch_size"],
        scale=(1.0, 1.0),
        flip=0.0,
        skip_broken=options["skip_broken"],
        limit=options["limit"],
        workers=None,
        seed=options["seed"],
    )
    said = answers(subject.model, subject, inputs, fabric, "test, compressed")
    if teacher is None:
        alone = compare("compressed", info.size.total, said, said)
        measured = [replace(alone, difference=None, kl=None, agreement=None)]
        shares = []
    else:
        original = opened.float_network(teacher)
        reference = answers(original, subject, inputs, fabric, "test, float")
        measured = [
            compare("float", info.size.uncompressed, reference, reference),
            compare("compressed", info.size.total, said, reference),
        ]
        # The output of a detector holds no logits.
        shares = [] if subject.detector else explain(subject.model, original, inputs.holdout)
    modes = {}
    if options["modes"]:
        modes = choose_modes(subject.model, move(inputs.example, fabric.device))
    return Inspected(info, tuple(measured), tuple(shares), modes)


HEADER = ["layer", "weight", "block", "codewords", "bytes", "bits a weight"]


def _row(info: FileInfo, index: int) -> list[Any]:
    layer = info.layers[index]
    stored = layer.code_bytes + layer.codebook_bytes
    weights = layer.blocks * layer.block
    shape = "x".join(map(str, layer.layout.shape))
    return [layer.name, shape, layer.block, layer.codewords, stored, 8 * stored / weights]


def _print(found: Inspected) -> None:
    info = found.info
    # A log or a pipe has no width to fit in.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    table = Table(HEADER[0], *(Column(word, justify="right") for word in HEADER[1:]))
    for index in range(len(info.layers)):
        *row, bits = _row(info, index)
        table.add_row(*(f"{x:,}" if isinstance(x, int) else str(x) for x in row), f"{bits:.2f}")
    console.print(table)
    kept = [name for name, shape in info.kept.items() if len(shape) > 1]
    console.print(f"in float: {', '.join(kept) or 'norms and biases'}", markup=False)
    size, made = info.size, info.extra
    console.print(
        f"{size.total:,} bytes: codes {size.codes:,}, codebooks {size.codebooks:,}, the rest "
        f"{size.other:,}, header {size.header:,}; {size.ratio:.1f} times fewer than in float32"
    )
    if "metric" in made and "calibration" in made:
        console.print(
            f"made with the metric {made['metric']!r} on {made['calibration']} samples, seed "
            f"{made.get('seed')}",
            markup=False,
        )
    for each in found.measured:
        said = [f"accuracy {each.accuracy[0]:.1%}"] if each.accuracy else []
        said += [f"KL {each.kl:.4f} nats"] if each.kl is not None else []
        said += [f"same answer {each.agreement:.1%}"] if each.agreement is not None else []
        if said:
            console.print(f"{each.name}: {', '.join(said)}")
    for name, choice in found.modes.items():
        times = ", ".join(f"{m} {1000 * c.seconds:.2f} ms" for m, c in choice.costs.items())
        console.print(f"{name}: {choice.mode} ({times})", markup=False)


def _report(file: Path, found: Inspected) -> Report:
    info, size = found.info, found.info.size
    report = Report(file.name, f"{size.total:,} bytes, {size.ratio:.1f} times fewer than float32")
    if found.measured:
        report.table(
            ["network", "bytes", "accuracy, %", "low", "high", "KL, nats", "same answer, %"],
            [
                [
                    each.name,
                    each.bytes,
                    *([None] * 3 if each.accuracy is None else [100 * x for x in each.accuracy]),
                    each.kl,
                    None if each.agreement is None else 100 * each.agreement,
                ]
                for each in found.measured
            ],
            "On the test samples; intervals of 95 %.",
        )
    report.section("Layers")
    rows = [_row(info, index) for index in range(len(info.layers))]
    report.table(HEADER, rows, "What each layer takes in the file.")
    if found.shares:
        report.table(
            ["layer", "KL if it were float"],
            [list(pair) for pair in found.shares],
            "Which layers cost the most: KL to the float network that is left, in nats, with one "
            "layer's float weights put back.",
        )
    if found.modes:
        report.table(
            ["layer", "dense, ms", "lazy, ms", "lookup, ms", "best"],
            [
                [name, *(_milliseconds(choice, mode) for mode in get_args(Mode)), choice.mode]
                for name, choice in found.modes.items()
            ],
            "Each layer on this machine: decoded once and kept, decoded at each call, or looked up "
            "from products with the codewords. The best keeps the least memory of those that are "
            "about as fast as the fastest.",
        )
    return report


def _milliseconds(choice: Choice, mode: Mode) -> float | None:
    cost = choice.costs.get(mode)
    return None if cost is None else 1000 * cost.seconds
