"""The network that is to be compressed, however it is given."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from remanence.compress.modules.quantised_layer import Mode
from remanence.compress.storage.file import inspect_file, load
from remanence.compress.storage.reader import FileInfo
from remanence.errors import InputError
from remanence.kit.checkpoints import (
    check_config,
    check_finite,
    load_weights,
    one_line,
    read_config,
    read_tensors,
    read_weights,
)
from remanence.kit.detectors import build_detector, is_detector
from remanence.kit.models import (
    Network,
    build_network,
    create_network,
    network_config,
    open_network,
)


@dataclass(frozen=True)
class Subject:
    """A float network and what is known of it.

    Attributes:
        model: The network, in eval mode.
        name: Its architecture, or class.
        architecture: How to build it again: a timm `config.json`, or `{"module": name}` where only
            the user's own code can.
        network: The same as a classifier of images; None where it is none.
        detector: Whether it detects: it takes a list of images of any sizes.
    """

    model: nn.Module
    name: str
    architecture: dict[str, Any]
    network: Network | None
    detector: bool = False


def open_subject(
    source: str | nn.Module,
    weights: Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    size: int | None = None,
) -> Subject:
    """Open a network.

    Args:
        source: A model folder, `hf-hub:OWNER/NAME`, an architecture (timm's name, or
            `torchvision:NAME`, detectors too) whose weights are in `weights`, `FILE.py:FUNCTION`
            that returns a module, or any module.
        weights: File of its tensors.
        arguments: Arguments of the architecture.
        size: Side of the input of a module that does not say.

    Raises:
        InputError: It cannot be opened, or its weights do not fit.
    """
    given = dict(arguments or {})
    if isinstance(source, nn.Module):
        return _module(source, type(source).__name__, size)
    path, colon, function = source.rpartition(":")
    if colon and path.endswith(".py"):
        model = _call(Path(path), function, given)
        if weights is not None:
            load_weights(model, read_tensors(weights), str(weights))
        return _module(model, function, size)
    folder = Path(source).expanduser()
    if folder.is_dir() and weights is None:
        config = read_config(folder)
        if is_detector(config["architecture"]):
            detector = _detector(config)
            load_weights(detector.model, read_weights(folder), str(folder))
            return detector
    if folder.is_dir() or source.startswith("hf-hub:"):
        if weights is not None or given or size is not None:
            raise InputError(
                f"{source}: brings its own weights, arguments and size; leave out --weights, "
                "--model-arg and --size"
            )
        return _classifier(open_network(source))
    if weights is None:
        raise InputError(
            f"{source}: no such model folder; if it is an architecture, give its trained weights "
            "with --weights FILE"
        )
    state = read_tensors(weights)
    count = given.pop("num_classes", None) or _class_count(source, state)
    if not isinstance(count, int) or count < 1:
        raise InputError(f"{weights}: tells no number of classes; give --model-arg num_classes=N")
    if is_detector(source):
        subject = _detector({"architecture": source, "num_classes": count, "model_args": given})
    else:
        network = create_network(source, [str(i) for i in range(count)], size=size, arguments=given)
        network.model.eval()
        config = network_config(network)
        # Numbers stood in for the names of the classes, which nobody told.
        config.pop("label_names", None)
        network.classes = ()
        subject = Subject(network.model, network.name, config, network)
    load_weights(subject.model, state, str(weights))
    return subject


def _class_count(source: str, state: Mapping[str, Tensor]) -> int | None:
    """Read the number of classes from the classifier's tensors, or else from the last tensor."""
    if is_detector(source):
        head = "roi_heads.box_predictor.cls_score"
    else:
        config = timm.models.get_pretrained_cfg(source) if timm.is_model(source) else None
        named = getattr(config, "classifier", None) or ""
        head = named if isinstance(named, str) else named[0]
        if not head:
            head = next(reversed(list(state)), "").rpartition(".")[0]
    tensor = state.get(f"{head}.weight")
    return None if tensor is None or not tensor.ndim else len(tensor)


@dataclass(frozen=True)
class Opened:
    """A compressed network, read back.

    Attributes:
        subject: The network with quantised layers.
        info: What the file says of itself.
        untrained: The float network that it was read into, with fresh weights.
    """

    subject: Subject
    info: FileInfo
    untrained: nn.Module

    def float_network(self, given: str) -> nn.Module:
        """Open the float network that it came from.

        Args:
            given: As `open_subject`, or a file of the weights of this architecture.

        Raises:
            InputError: It cannot be opened, or its weights do not fit.
        """
        path = Path(given).expanduser()
        if path.is_dir() or not path.is_file():
            return open_subject(given).model
        model = copy.deepcopy(self.untrained)
        load_weights(model, read_tensors(path), given)
        return model.eval()


def open_compressed(
    path: Path,
    model: str | nn.Module | None = None,
    size: int | None = None,
    mode: Mode = "dense",
) -> Opened:
    """Open a compressed network.

    Args:
        path: The file.
        model: The user's own code that builds the float network, where the file needs it:
            `FILE.py:FUNCTION`, or the module.
        size: Side of the input of a module that does not say.
        mode: How its layers run.

    Raises:
        InputError: The file is missing, damaged or of another network.
    """
    info = inspect_file(path)
    config = info.architecture
    if "module" in config:
        if model is None:
            raise InputError(
                f"{path}: was made from a module called {config['module']}, which only its code "
                "can build; give --model FILE.py:FUNCTION"
            )
        subject = open_subject(model, size=size)
    else:
        config = check_config(config, str(path))
        if is_detector(config["architecture"]):
            subject = _detector(config)
        else:
            network = build_network(config, str(path))
            subject = Subject(network.model, network.name, config, network)
    untrained = copy.deepcopy(subject.model)
    load(path, subject.model, mode=mode)
    return Opened(subject, info, untrained)


def _classifier(network: Network) -> Subject:
    return Subject(network.model, network.name, network_config(network), network)


def _detector(config: Mapping[str, Any]) -> Subject:
    name, count, arguments = config["architecture"], config["num_classes"], config["model_args"]
    model = build_detector(name, count, arguments)
    # The layout that `read_config` reads again, so that `expand` writes a folder like any other.
    kept = {"architecture": name, "num_classes": count, "model_args": dict(arguments)}
    return Subject(model, name, {**kept, "pretrained_cfg": {}}, None, detector=True)


def _module(model: nn.Module, name: str, size: int | None) -> Subject:
    check_finite(model.state_dict(), name)
    network = None
    if getattr(model, "pretrained_cfg", None) or size is not None:
        network = open_network(model, size=size)
    return Subject(model.eval(), name, {"module": name}, network)


def _call(path: Path, function: str, arguments: Mapping[str, Any]) -> nn.Module:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(code)
        model = getattr(code, function)(**arguments)
    except Exception as error:  # the user's own code
        raise InputError(
            f"{path}:{function}: failed ({type(error).__name__}: {one_line(error)})"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{path}:{function}: returned {type(model).__name__}, no torch module")
    return model
