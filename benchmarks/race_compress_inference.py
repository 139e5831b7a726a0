"""Race of inference from codebooks: every mode against float networks and int8 peers.

Each contender is a process of its own, so that its memory is its own; laps are run in turns all the
same. Memory is the peak of the resident set from the moment the network is built to the end of the
laps, less what the process held before it had a network. Weights are random codes: speed and
memory do not depend on what they say. All contenders hold one and the same network.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
import torchvision
from onnxruntime import quantization
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import harness
from remanence.compress.layout import codeword_count, layout_of
from remanence.compress.modules.execution import choose_modes, set_mode
from remanence.compress.modules.replace import float_copy, replace_layers
from remanence.compress.quantised import Quantised

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from multiprocessing.connection import Connection

OURS = ("auto", "dense", "lazy", "lookup")
PEERS = (
    "float",
    "torchao int8 weights",
    "onnxruntime float",
    "onnxruntime int8 dynamic",
    "onnxruntime int8 static",
)
LAP_SECONDS = 0.5


@dataclass(frozen=True)
class Course:
    """A network and a batch.

    Attributes:
        network: `resnet18`, or `feed-forward` for that of a ViT-B.
        batch: Images, or tokens.
        folder: Where the peers' files are.
        threads: Threads of each contender.
    """

    network: str
    batch: int
    folder: Path
    threads: int

    def inputs(self) -> Tensor:
        """Draw a batch."""
        generator = torch.Generator().manual_seed(1)
        shape = (3, 224, 224) if self.network == "resnet18" else (768,)
        return torch.randn(self.batch, *shape, generator=generator)

    def compressed(self) -> nn.Module:
        """Build the network with random codes: small blocks for ResNet-18, d = 8 else."""
        torch.manual_seed(0)
        if self.network == "resnet18":
            model: nn.Module = torchvision.models.resnet18(weights=None)
            kept = {"conv1"}
        else:
            model, kept = (
                nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)),
                set(),
            )
        layers = {}
        for name, module in model.named_modules():
            layout = layout_of(module)
            if layout is None or name in kept:
                continue
            size = layout.taps if layout.taps > 1 else 4 if self.network == "resnet18" else 8
            blocks = layout.row_length // size
            count = codeword_count(2048 if name == "fc" else 256, layout.rows * blocks)
            book = torch.randn(count, size) * (2 / layout.row_length) ** 0.5
            codes = torch.randint(count, (layout.rows, blocks))
            layers[name] = Quantised(layout, codes, book)
        return replace_layers(model, layers).eval().requires_grad_(requires_grad=False)

    def file(self, name: str) -> str:
        """Return the path of a peer's file."""
        return str(self.folder / f"{self.network}-{name.removeprefix('onnxruntime ')}.onnx")


def forward_of(name: str, course: Course, x: Tensor) -> Callable[[], Tensor]:
    """Build a contender; return one forward of it."""
    if name.startswith("onnxruntime"):
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = course.threads
        session = onnxruntime.InferenceSession(course.file(name), session_options)
        feed = {session.get_inputs()[0].name: x.numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])
    model = course.compressed()
    if name == "auto":
        choose_modes(model, x)
    elif name in OURS:
        set_mode(model, name)  # type: ignore[arg-type]  # one of the modes
    else:
        model = float_copy(model)
    if name.startswith("torchao"):
        quantize_(model, Int8WeightOnlyConfig())
    return partial(model, x)


def resident(key: str) -> float:
    """Read `VmRSS`, or `VmHWM` (the peak), in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def give_back() -> None:
    """Return free memory to the system and forget the peak until now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def contender(name: str, course: Course, pipe: Connection) -> None:
    """Run a lap whenever the pipe asks for one."""
    torch.set_num_threads(course.threads)
    with torch.inference_mode():
        x = course.inputs()
        give_back()
        before = resident("VmRSS")
        forward = forward_of(name, course, x)
        give_back()
        forward()
        while pipe.recv():
            began, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - began < LAP_SECONDS:
                out = forward()
                calls += 1
            seconds = time.perf_counter() - began
            pipe.send((calls, seconds, resident("VmHWM") - before, out.numpy()))


class Contender:
    """The other end of the pipe: a lap of one process."""

    def __init__(self, name: str, course: Course, expected: Tensor) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._batch, self._expected = course.batch, expected
        self._process = context.Process(target=contender, args=(name, course, theirs), daemon=True)
        self._process.start()

    def __call__(self) -> harness.Lap:
        """Run a lap."""
        self._pipe.send(True)  # a message, not an option
        calls, seconds, memory, out = self._pipe.recv()
        error = (torch.from_numpy(out) - self._expected).norm() / self._expected.norm()
        facts = {
            "latency, ms": 1e3 * seconds / calls,
            "peak, MiB": memory,
            "error": float(error),
        }
        return harness.Lap(calls * self._batch, seconds, facts)

    def end(self) -> None:
        """Let the process end."""
        self._pipe.send(False)  # a message, not an option
        self._process.join()


class Batches(quantization.CalibrationDataReader):  # type: ignore[misc]  # untyped
    """Random batches to calibrate on."""

    def __init__(self, name: str, x: Tensor) -> None:
        self._left = iter([{name: (x + 0.1 * i).numpy().astype(np.float32)} for i in range(4)])

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, or None at the end."""
        return next(self._left, None)


def write_peers(course: Course) -> Tensor:
    """Write onnxruntime's files, batch axis free; return what the float network outputs."""
    with torch.no_grad():
        model, x = float_copy(course.compressed()), course.inputs()
        expected = model(x)
        if Path(course.file("int8 static")).exists():
            return expected
        example = x[:1].repeat(2, *(1 for _ in x.shape[1:]))
        dynamic = {0: torch.export.Dim("batch")}
        path = course.file("float")
        torch.onnx.export(
            copy.deepcopy(model),
            (example,),
            path,
            dynamo=True,
            dynamic_shapes=(dynamic,),
            external_data=False,
            verbose=False,
        )
    prepared = course.file("prepared")
    quantization.quant_pre_process(path, prepared)
    quantization.quantize_dynamic(prepared, course.file("int8 dynamic"))
    name = onnxruntime.InferenceSession(path).get_inputs()[0].name
    quantization.quantize_static(
        prepared,
        course.file("int8 static"),
        Batches(name, example),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
    )
    return expected


def main() -> None:
    """Race on each network and batch."""
    options = _options()
    packages = ["torch", "torchvision", "onnxruntime", "torchao"]
    facts = harness.environment(packages, options.threads)
    torch.set_num_threads(options.threads)
    races = []
    with tempfile.TemporaryDirectory() as folder:
        for network in options.networks:
            for batch in options.batches:
                course = Course(network, batch, Path(folder), options.threads)
                expected = write_peers(course)
                contestants = {
                    (f"remanence, {name}" if name in OURS else name): Contender(
                        name, course, expected
                    )
                    for name in (*OURS, *PEERS)
                }
                unit = "images/s" if network == "resnet18" else "tokens/s"
                title = f"{network}, batch {batch}, {options.threads} thread(s), CPU"
                races.append(harness.race(title, contestants, options, unit=unit))
                for each in contestants.values():
                    each.end()
    harness.finish(races, facts, options)


def _options() -> argparse.Namespace:
    options = harness.parser(__doc__)
    add = options.add_argument
    add("--networks", nargs="+", default=["resnet18", "feed-forward"])
    add("--batches", nargs="+", type=int, default=[1, 32])
    return options.parse_args()


if __name__ == "__main__":
    main()
