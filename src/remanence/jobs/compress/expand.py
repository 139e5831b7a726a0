"""`remanence compress expand`: a compressed file as a plain checkpoint again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remanence.compress.modules.replace import float_copy
from remanence.compress.storage.export import export_onnx
from remanence.errors import InputError
from remanence.jobs.compress.subject import open_compressed
from remanence.jobs.options import check_options
from remanence.kit.checkpoints import WEIGHTS, write_folder, write_tensors
from remanence.kit.run import run_folder


@dataclass(frozen=True)
class Expanded:
    """What `expand` leaves behind.

    Attributes:
        out: Run folder; the plain network lies in `out / "model"`.
        model: The plain network, in eval mode.
    """

    out: Path
    model: nn.Module


def expand(
    file: Path,
    *,
    out: Path,
    model: str | None = None,
    onnx: bool = False,
    size: int | None = None,
) -> Expanded:
    """Write a compressed network as a plain one, that needs nothing of remanence to run.

    The folder OUT holds `model/`, which timm opens (`local-dir:OUT/model`) and every other command
    here; of a network of the user's own, its tensors alone. The weights are those that the
    compressed network computes with, in float32.

    Args:
        file: The compressed file.
        out: Run folder to create.
        model: FILE.py:FUNCTION, for a network that only its own code can build.
        onnx: Write `compressed.onnx` instead, about as small as the file.
        size: Side of the images to export with; the network's own if not given.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k != "out"}
    check_options(options)
    with run_folder(out, "compress expand", options) as run:
        opened = open_compressed(file, model)
        network = opened.subject.network
        if onnx:
            side = size or (None if network is None else network.test.size)
            if side is None:
                raise InputError(f"{file}: what the network takes is not known; give --size")
            example = torch.zeros(2, 3, side, side)
            export_onnx(opened.subject.model, run.path("compressed.onnx"), example)
            return Expanded(out, opened.subject.model)
        plain = float_copy(opened.subject.model).eval()
        config, folder = opened.info.architecture, run.path("model")
        if "architecture" in config:
            write_folder(folder, config, plain.state_dict())
        else:
            folder.mkdir()
            write_tensors(folder / WEIGHTS, plain.state_dict())
    return Expanded(out, plain)
