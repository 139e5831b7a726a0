"""`remanence compress inspect`: what a compressed file holds, and how well its network does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from remanence.compress.execution import choose_modes
from remanence.compress.explain import explain
from remanence.compress.file import inspect_file
from remanence.compress.reader import FileInfo
from remanence.errors import InputError
from remanence.jobs.compress.inputs import open_inputs
from remanence.jobs.compress.measured import Measured, answers, compare
from remanence.jobs.compress.subject import open_compressed, open_subject
from remanence.jobs.options import check_options
from remanence.kit.devices import launch
from remanence.kit.progress import console
from remanence.kit.report import Report
from remanence.kit.run import run_folder

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Inspected:
    """What `inspect` found.

    Attributes:
        info: What the file says of itself.
        measured: The float network, where it was given, and the compressed one on the data.
        shares: KL to the float network with one layer in float, by layer.
    """

    info: FileInfo
    measured: tuple[Measured, ...]
    shares: tuple[tuple[str, float], ...]


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
        teacher: The float network that it came from: shows how far the two disagree, and which
            layer costs how much.
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
    measured: list[Measured] = []
    shares: list[tuple[str, float]] = []
    timings: dict[str, Any] = {}
    if data is not None:
        opened = open_compressed(file, model)
        fabric = launch(1, "32-true")
        inputs = open_inputs(
            data,
            opened.subject,
            fabric,
            calibration=4 * batch_size,
            batch_size=batch_size,
            scale=(1.0, 1.0),
            flip=0.0,
            skip_broken=skip_broken,
            limit=limit,
            workers=None,
            seed=seed,
        )
        found = answers(opened.subject.model, opened.subject, inputs, fabric, "test, compressed")
        reference = found
        if teacher is not None:
            original = open_subject(teacher, size=size)
            reference = answers(original.model, original, inputs, fabric, "test, float")
            measured.append(compare("float", info.size.uncompressed, reference, reference))
            shares = explain(opened.subject.model, original.model, inputs.holdout)
        measured.append(compare("compressed", info.size.total, found, reference))
        if modes:
            chosen = choose_modes(opened.subject.model, inputs.example)
            timings = {name: asdict(each) for name, each in chosen.items()}
    _print(info, measured)
    if out is not None:
        with run_folder(out, "compress inspect", options, seed=seed) as run:
            run.write_results(
                {
                    "size": asdict(info.size) | {"total": info.size.total},
                    "layers": [_row(info, index) for index in range(len(info.layers))],
                    "accuracy": [each.accuracy for each in measured],
                    "agreement": [each.agreement for each in measured],
                    "kl": [each.kl for each in measured],
                    "sensitivity": dict(shares),
                    "modes": timings,
                }
            )
            report = _report(file, info, measured, shares, timings)
            report.section("Run")
            report.facts(run.summary())
            report.write(run.path("report.html"))
    return Inspected(info, tuple(measured), tuple(shares))


HEADER = ["layer", "weight", "block", "codewords", "bytes", "bits a weight"]


def _row(info: FileInfo, index: int) -> list[Any]:
    layer = info.layers[index]
    stored = layer.code_bytes + layer.codebook_bytes
    weights = layer.blocks * layer.block
    shape = "x".join(map(str, layer.layout.shape))
    return [layer.name, shape, layer.block, layer.codewords, stored, 8 * stored / weights]


def _print(info: FileInfo, measured: Sequence[Measured]) -> None:
    table = Table(*HEADER)
    for index in range(len(info.layers)):
        *row, bits = _row(info, index)
        table.add_row(*(f"{x:,}" if isinstance(x, int) else str(x) for x in row), f"{bits:.2f}")
    console.print(table)
    size = info.size
    console.print(
        f"{size.total:,} bytes: codes {size.codes:,}, codebooks {size.codebooks:,}, the rest "
        f"{size.other:,}, header {size.header:,}; {size.ratio:.1f} times fewer than in float32"
    )
    for each in measured:
        said = [f"KL {each.kl:.4f}" if each.kl is not None else ""]
        said += [f"accuracy {each.accuracy[0]:.1%}"] if each.accuracy else []
        said += [f"same answer {each.agreement:.1%}"] if each.agreement is not None else []
        console.print(f"{each.name}: {', '.join(word for word in said if word)}")


def _report(
    file: Path,
    info: FileInfo,
    measured: Sequence[Measured],
    shares: Sequence[tuple[str, float]],
    timings: dict[str, Any],
) -> Report:
    size = info.size
    report = Report(file.name, f"{size.total:,} bytes, {size.ratio:.1f} times fewer than float32")
    if measured:
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
                for each in measured
            ],
            "On the test samples; intervals of 95 %.",
        )
    report.section("Layers")
    rows = [_row(info, index) for index in range(len(info.layers))]
    report.table(HEADER, rows, "What each layer takes in the file.")
    if shares:
        report.table(
            ["layer", "KL if it were float"],
            [list(pair) for pair in shares],
            "Which layers cost the most: KL to the float network that is left, in nats, with one "
            "layer's float weights put back.",
        )
    if timings:
        words = list(next(iter(timings.values())))
        report.table(
            ["layer", *words],
            [[name, *(str(each[word]) for word in words)] for name, each in timings.items()],
            "Each layer in each way to run it, on this machine.",
        )
    return report
