"""A network's folder in timm's hub layout: `config.json` beside `model.safetensors`.

What is read here may come from anyone: nothing in it is run, and every entry is checked.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# What timm.create_model takes beside an architecture's own arguments: what to fetch, and whence.
RESERVED = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a folder.

    Args:
        folder: The folder.

    Returns:
        The configuration, with `architecture`, `num_classes`, `model_args` and `pretrained_cfg` of
        the types they should have.

    Raises:
        InputError: It is missing or broken.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder}: holds no readable {CONFIG}; is it a model folder?") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({one_line(error)})") from error
    return check_config(config, str(path))


def check_config(given: object, where: str) -> dict[str, Any]:
    """Check a configuration and fill in what it leaves out.

    Args:
        given: What JSON held.
        where: Where it stands, for messages.

    Returns:
        The configuration, as `read_config`.

    Raises:
        InputError: It is broken.
    """
    if not isinstance(given, dict) or not isinstance(given.get("architecture"), str):
        raise InputError(f"{where}: has no 'architecture'; write the folder in timm's hub layout")
    config = dict(given)
    # timm's first layout had all entries on one level.
    for key, default in (("pretrained_cfg", dict(config)), ("model_args", {})):
        config[key] = config.get(key) or default
        if not isinstance(config[key], dict):
            raise InputError(f"{where}: {key!r} must be an object, not {config[key]!r:.40}")
    arguments = config["model_args"]
    for key in RESERVED:
        if key in arguments:
            raise InputError(f"{where}: model_args must not hold {key!r}; remove it")
    inside = (config, config["pretrained_cfg"], arguments)
    count = next((c["num_classes"] for c in inside if c.get("num_classes") is not None), None)
    if not isinstance(count, int) or count < 1:
        raise InputError(f"{where}: num_classes is {count!r}; give the number of classes")
    arguments.pop("num_classes", None)
    config["num_classes"] = count
    return config


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a folder, from safetensors or else from a pickle of nothing but tensors.

    Args:
        folder: The folder.

    Returns:
        Tensors by name.

    Raises:
        InputError: There are none, or they are damaged, or the pickle holds more than tensors.
    """
    safe, pickled = folder / WEIGHTS, folder / "pytorch_model.bin"
    if not safe.exists() and not pickled.exists():
        raise InputError(f"{folder}: holds no {WEIGHTS}")
    return read_tensors(safe if safe.exists() else pickled)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of tensors: safetensors, or a pickle of nothing but tensors.

    Args:
        path: The file.

    Returns:
        Tensors by name.

    Raises:
        InputError: It is missing or damaged, or the pickle holds more than tensors.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .safetensors or .pth file of weights")
    try:
        if path.suffix == ".safetensors":
            state: dict[str, Any] = load_file(path)
        else:
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: damaged or unsafe weights (more than tensors); save the plain state_dict"
        ) from error
    except Exception as error:  # torch.load raises whatever the broken bytes lead to
        raise InputError(
            f"{path}: damaged or unsafe weights ({one_line(error)}); fetch the file again"
        ) from error
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path}: {name} is not a tensor; save the plain state_dict")
    return state


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load tensors that must fit to the last one.

    Args:
        model: Network to fill.
        state: Tensors by name.
        source: Where they come from, for messages.

    Raises:
        InputError: A tensor is missing, left over, of another shape, or not finite.
    """
    own = model.state_dict()
    for what, names in (
        ("missing", own.keys() - state.keys()),
        ("unexpected", state.keys() - own.keys()),
    ):
        if names:
            raise InputError(
                f"{source}: the checkpoint does not fit the network: {len(names)} tensors {what}, "
                f"first {min(names)}; was it written by another architecture?"
            )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise InputError(
                f"{source}: tensor {name} has shape {tuple(tensor.shape)}, the network expects "
                f"{tuple(own[name].shape)}; check the architecture and num_classes in {CONFIG}"
            )
    check_finite(state, source)
    model.load_state_dict(dict(state))


def check_finite(state: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise InputError where a tensor holds NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{source}: tensor {name} holds NaN or infinity; the training that wrote it "
                "diverged, take an earlier checkpoint"
            )


def write_folder(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> None:
    """Write configuration and tensors.

    Args:
        folder: Folder to create.
        config: The configuration.
        state: Tensors by name.

    Raises:
        InputError: JSON cannot hold the configuration.
        OSError: The folder cannot be written.
    """
    try:
        text = json.dumps(config, indent=2) + "\n"
    except TypeError as error:
        raise InputError(
            f"{config['architecture']}: {CONFIG} cannot hold its arguments ({error})"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, state)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def write_tensors(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, those that share memory one by one.

    Args:
        path: File to write.
        state: Tensors by name.

    Raises:
        OSError: The file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:
        known = re.search(r"os error (\d+)", str(error))
        code = int(known[1]) if known else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split())[:160] if lines else type(error).__name__
