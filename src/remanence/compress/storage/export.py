"""Write a compressed network as ONNX that stays compressed.

The network is exported with its weights decoded; then each decoded weight in the file gives way to
codes, codebook and the few nodes that decode them. A runtime folds those constants when it loads
the file, so that it runs as fast as the float network. Putting the codes in afterwards keeps this
apart from how an exporter writes a gather, keeps the codes in one or two bytes, and asks for the
`onnx` package alone: torch's newer exporter needs two more.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from remanence.compress.modules.replace import PQMatrix, float_copy, quantised_layers
from remanence.compress.quantizer.float16 import round_to_float16
from remanence.errors import InputError

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from remanence.compress.quantised import Quantised

TOLERANCE = 1e-3
_SMALL = 16  # shorter constants stay as they are: some are options that a runtime reads at once


def export_onnx(model: nn.Module, path: str | Path, example: Tensor | tuple[Tensor, ...]) -> int:
    """Write a compressed network as an ONNX file, its first dimension (the batch) free.

    Codebooks are rounded to float16, which changes nothing in a network that was saved and loaded.
    Other weights are written in float16 where that is exact. Inputs are named `input` (`input_0`,
    `input_1`, ... where there are several), outputs likewise. The network is exported in evaluation
    mode, in float32.

    Args:
        model: Network with quantised layers; left as it is.
        path: Where to write; the folder must exist.
        example: Arguments of the network's forward, the batch first.

    Returns:
        Size of the file in bytes.

    Raises:
        InputError: The `onnx` package is missing, no layer is quantised, torch cannot export the
            network or, checked where `onnxruntime` is installed, exported another function.
    """
    if importlib.util.find_spec("onnx") is None:
        raise InputError("ONNX export needs the onnx package: pip install 'remanence[onnx]'")
    import onnx

    if not quantised_layers(model):
        raise InputError("no layer of the network is quantised: compress it first")
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder: make it first")
    arguments = example if isinstance(example, tuple) else (example,)
    arguments = tuple(value.detach().cpu() for value in arguments)
    rounded = copy.deepcopy(model).cpu().float().eval()
    with torch.no_grad():
        for layer in quantised_layers(rounded).values():
            layer.codebook.copy_(round_to_float16(layer.codebook)[0])
        plain = float_copy(rounded)
        expected = [leaf for leaf in tree_leaves(plain(*arguments)) if isinstance(leaf, Tensor)]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as folder:
        file = Path(folder) / "model.onnx"
        _export_float(plain, file, arguments, expected)
        written = onnx.load(file)
        _compress(written.graph, rounded)
        onnx.checker.check_model(written)
        onnx.save(written, file)
        _check(file, arguments, expected)
        file.replace(path)
    return path.stat().st_size


def _export_float(
    plain: nn.Module, file: Path, arguments: tuple[Tensor, ...], expected: list[Tensor]
) -> None:
    inputs, outputs = _names("input", len(arguments)), _names("output", len(expected))
    batch = arguments[0].shape[:1]
    free = {
        name: {0: "batch"}
        for name, value in zip(inputs + outputs, [*arguments, *expected], strict=True)
        if value.ndim and value.shape[:1] == batch
    }
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a kernel that no exporter knows
    try:
        with warnings.catch_warnings():
            # It warns that it is the older exporter, and of branches, which `_check` looks after.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                plain,
                arguments,
                file,
                dynamo=False,
                input_names=inputs,
                output_names=outputs,
                dynamic_axes=free,
                # Weights must come through under their names: neither folded nor fused with norms.
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,
            )
    except Exception as error:  # the exporter runs the network's code, and raises all kinds
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"torch cannot export the network to ONNX: {reason}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _names(kind: str, count: int) -> list[str]:
    return [kind] if count == 1 else [f"{kind}_{i}" for i in range(count)]


def _compress(graph: onnx.GraphProto, model: nn.Module) -> None:
    """Put decoding nodes in the place of weights, float16 in the place of float32."""
    from onnx import numpy_helper

    coded = {
        f"{name}_weight" if isinstance(layer, PQMatrix) else f"{name}.weight".lstrip("."): layer
        for name, layer in quantised_layers(model).items()
    }
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    for initializer in graph.initializer:
        name = initializer.name
        values = numpy_helper.to_array(initializer)
        if name in coded:
            _decode(name, coded[name].quantised(), constants, nodes)
        elif values.dtype == np.float32 and values.size >= _SMALL:
            _constant(name, values, constants, nodes)
        else:
            constants.append(initializer)
    computed = [*nodes, *graph.node]  # constants first: nodes must follow what they read
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(constants)
    graph.node.extend(computed)


def _decode(
    name: str,
    quantised: Quantised,
    constants: list[onnx.TensorProto],
    nodes: list[onnx.NodeProto],
) -> None:
    from onnx import TensorProto, helper, numpy_helper

    def reshape(source: str, shape: tuple[int, ...], target: str) -> None:
        constants.append(numpy_helper.from_array(np.array(shape, np.int64), f"{target}.shape"))
        nodes.append(helper.make_node("Reshape", [source, f"{target}.shape"], [target]))

    layout = quantised.layout
    small = np.uint8 if len(quantised.codebook) <= 256 else np.uint16
    constants.append(
        numpy_helper.from_array(quantised.codes.numpy().astype(small), f"{name}.codes")
    )
    _constant(f"{name}.codebook", quantised.codebook.numpy(), constants, nodes)
    nodes += [
        helper.make_node("Cast", [f"{name}.codes"], [f"{name}.index"], to=TensorProto.INT32),
        helper.make_node("Gather", [f"{name}.codebook", f"{name}.index"], [f"{name}.blocks"]),
    ]
    if layout.kind != "conv_transpose":
        reshape(f"{name}.blocks", layout.shape, name)
        return
    reshape(f"{name}.blocks", (layout.groups, -1, layout.row_length), f"{name}.rows")
    nodes.append(
        helper.make_node("Transpose", [f"{name}.rows"], [f"{name}.columns"], perm=[0, 2, 1])
    )
    reshape(f"{name}.columns", layout.shape, name)


def _constant(
    name: str,
    values: NDArray[np.float32],
    constants: list[onnx.TensorProto],
    nodes: list[onnx.NodeProto],
) -> None:
    """Write a constant in float16 if that holds it exactly."""
    from onnx import TensorProto, helper, numpy_helper

    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        constants.append(numpy_helper.from_array(values, name))
        return
    constants.append(numpy_helper.from_array(half, f"{name}.half"))
    nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))


def _check(file: Path, arguments: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    """Run the file where there is a runtime: a trace may have lost a branch."""
    if importlib.util.find_spec("onnxruntime") is None:
        return
    import onnxruntime  # type: ignore[import-untyped]  # ships no types

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {
        known.name: value.numpy()
        for known, value in zip(session.get_inputs(), arguments, strict=True)
    }
    for ours, theirs in zip(session.run(None, feed), expected, strict=True):
        difference = np.abs(ours - theirs.numpy()).max(initial=0)
        if not difference <= TOLERANCE * max(float(theirs.abs().max()), 1e-6):
            raise InputError(
                f"the ONNX file computes another function (outputs differ by {difference:.1e}): "
                "the network branches on its data, which an export cannot follow"
            )
