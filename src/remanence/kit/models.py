"""Networks: one grammar for every command, read and written in timm's hub layout.

| written as | is |
|---|---|
| `resnet50`, `convnext_tiny`, ... | a timm architecture with fresh weights |
| `torchvision:NAME` | a torchvision architecture with fresh weights |
| a folder | `config.json` + `model.safetensors`, as timm and remanence write them |
| `hf-hub:OWNER/NAME` | the same, from the Hugging Face hub |
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
import torchvision
from timm.models import get_model_args
from torch import nn

from remanence.errors import InputError
from remanence.kit import architectures
from remanence.kit.checkpoints import (
    CONFIG,
    WEIGHTS,
    check_finite,
    load_weights,
    one_line,
    read_config,
    read_weights,
    write_folder,
)
from remanence.kit.preprocessing import Preprocessing, check_normalisation, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TORCHVISION = "torchvision:"
# The registry fills when the module is imported.
assert architectures.default_cfgs


@dataclass
class Network:
    """A classifier and what must travel with it.

    Attributes:
        model: The network; images (N, 3, K, K), normalised, to logits (N, classes).
        name: Architecture, with its `torchvision:` prefix if any; the class name of a user's own.
        train: Preprocessing that it was trained with.
        test: Preprocessing that it should be evaluated with.
        classes: Class names in label order, where known.
        arguments: Arguments that a torchvision architecture was built with; timm's know theirs.
        origin: Tag and licence of the checkpoint that the weights come from, if any.
    """

    model: nn.Module
    name: str
    train: Preprocessing
    test: Preprocessing
    classes: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)


def create_network(
    name: str,
    classes: Sequence[str],
    *,
    size: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Network:
    """Build an architecture with fresh weights.

    Args:
        name: timm architecture or `torchvision:NAME`.
        classes: Class names.
        size: Side of the input; the architecture's own where None.
        arguments: Arguments of the architecture beside its name, such as `output_stride`.
        seed: Seed of the weights.

    Returns:
        The network.

    Raises:
        InputError: The architecture is not known, or cannot take the size; or there is no choice
            between classes.
    """
    if len(classes) < 2:
        raise InputError(
            f"{', '.join(classes) or 'no class'}: a classifier needs at least two classes; "
            "is the image source the folder that holds the class folders?"
        )
    torch.manual_seed(seed)
    given = dict(arguments or {})
    model = _build(name, len(classes), given, size)
    config = getattr(model, "pretrained_cfg", None) or {"interpolation": "bilinear"}
    train = resolve(config, model, name, test=False)
    train = replace(train, size=train.size if size is None else size, crop_mode="center")
    _try_size(model, name, train.size)
    return Network(model, name, train, train, tuple(classes), given)


def open_network(source: str | nn.Module, *, size: int | None = None) -> Network:
    """Open a trained classifier.

    Args:
        source: A folder in timm's hub layout, `hf-hub:OWNER/NAME`, or any module.
        size: Side that a module without a timm configuration was trained at.

    Returns:
        The network in eval mode, with the preprocessing of its configuration.

    Raises:
        InputError: There is no such folder, its configuration or tensors are broken or do not fit,
            or its normalisation contradicts the checkpoint that it names.
    """
    if isinstance(source, nn.Module):
        return _wrap(source, size)
    if source.startswith("hf-hub:"):
        try:
            model = timm.create_model(source, pretrained=True)
        except Exception as error:  # of the network, the hub, the files there, or timm
            raise InputError(f"{source}: cannot be opened ({one_line(error)})") from error
        check_finite(model.state_dict(), source)
        return _wrap(model, size)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{source}: no such model folder; give a folder that holds {CONFIG} and {WEIGHTS}, "
            "or hf-hub:OWNER/NAME. `remanence learn classifier` trains one"
        )
    network = build_network(read_config(folder), str(folder / CONFIG))
    load_weights(network.model, read_weights(folder), str(folder))
    return network


def build_network(config: Mapping[str, Any], where: str) -> Network:
    """Build a classifier from its configuration, with fresh weights, in eval mode.

    Args:
        config: What `check_config` or `network_config` returned.
        where: Where it stands, for messages.

    Returns:
        The network.

    Raises:
        InputError: The architecture is not known or does not take its arguments, or the
            preprocessing is broken or contradicts the checkpoint that it names.
    """
    name, pretrained = config["architecture"], config["pretrained_cfg"]
    model = _build(name, config["num_classes"], config["model_args"], None)
    train = resolve(pretrained, model, where, test=False)
    test = resolve(pretrained, model, where, test=True)
    check_normalisation(train, name, str(pretrained.get("tag") or ""), where)
    labels = config.get("label_names") or pretrained.get("label_names") or ()
    classes = tuple(str(v) for v in (labels.values() if isinstance(labels, dict) else labels))
    return Network(
        model.eval(),
        name,
        train,
        test,
        classes if len(classes) == config["num_classes"] else (),
        config["model_args"],
        _origin(pretrained),
    )


def save_network(network: Network, folder: Path) -> None:
    """Write a network so that timm opens it: `timm.create_model("local-dir:FOLDER", ...)`.

    Args:
        network: What to write; `train` and `test` go to `input_size`, `test_input_size` and the
            two `crop_pct`.
        folder: Folder to create.

    Raises:
        InputError: The network was built with arguments that JSON cannot hold.
        OSError: The folder cannot be written.
    """
    write_folder(folder, network_config(network), network.model.state_dict())


def network_config(network: Network) -> dict[str, Any]:
    """Return what `config.json` says of a network: how to build it and how it sees images."""
    model, train, test = network.model, network.train, network.test
    old = dict(getattr(model, "pretrained_cfg", {}) or {})
    kept = ("first_conv", "classifier", "fixed_input_size")
    count = _num_classes(model, network)
    pretrained = {k: old[k] for k in kept if old.get(k) is not None} | network.origin
    pretrained |= {
        "input_size": [3, train.size, train.size],
        "test_input_size": [3, test.size, test.size],
        "crop_pct": train.crop_pct,
        "test_crop_pct": test.crop_pct,
        "crop_mode": test.crop_mode,
        "interpolation": test.interpolation,
        "mean": list(test.mean),
        "std": list(test.std),
        "num_classes": count,
        "pool_size": None,
    }
    name = network.name if network.name.startswith(TORCHVISION) else network.name.split(".")[0]
    config: dict[str, Any] = {"architecture": name, "num_classes": count}
    if getattr(model, "num_features", None):
        config["num_features"] = model.num_features
    # timm keeps account of its networks' arguments, input size and attention windows.
    timms = not name.startswith(TORCHVISION)
    config["model_args"] = get_model_args(model) if timms else network.arguments
    if network.classes:
        config["label_names"] = list(network.classes)
    config["pretrained_cfg"] = pretrained
    return config


def describe(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return preprocessing as plain values, for JSON."""
    return asdict(preprocessing)


def _build(name: str, count: int, arguments: dict[str, Any], size: int | None) -> nn.Module:
    # `arguments` takes up what a torchvision network needs to be built again.
    if size is not None and size < 1:
        raise InputError(f"--size {size}: must be at least 1")
    try:
        if name.startswith(TORCHVISION):
            return _build_torchvision(name.removeprefix(TORCHVISION), count, arguments, size)
        return _build_timm(name, count, arguments, size)
    except InputError:
        raise
    except Exception as error:  # a network's constructor checks its arguments as it likes
        given = f" with {arguments}" if arguments else ""
        raise InputError(f"{name}: cannot be built{given} ({one_line(error)})") from error


def _build_torchvision(
    name: str, count: int, arguments: dict[str, Any], size: int | None
) -> nn.Module:
    # Its other networks detect, segment or see video, and would fetch a backbone.
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise InputError(_unknown(TORCHVISION + name, [TORCHVISION + k for k in known]))
    if name in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": False, "init_weights": False}
    if size is not None and name.startswith("vit_"):
        arguments["image_size"] = size
    if size is not None and name.startswith("maxvit_"):
        arguments["input_size"] = [size, size]
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=count, **arguments
    )
    return model


def _build_timm(name: str, count: int, arguments: dict[str, Any], size: int | None) -> nn.Module:
    if not timm.is_model(name):
        if "/" in name or Path(name).exists():
            raise InputError(f"{name}: not an architecture; give a timm name such as resnet18")
        raise InputError(_unknown(name, timm.list_models()))
    if size is not None and timm.models.get_pretrained_cfg(name).fixed_input_size:
        arguments = {**arguments, "img_size": size}
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=count, **arguments)
    return model


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
    return f"{name}: unknown architecture; {hint}"


def _try_size(model: nn.Module, name: str, size: int) -> None:
    # torchvision does not say its strides; all but the ViTs' are 32.
    unsaid = 32 if name.startswith(TORCHVISION) and "vit_" not in name else 1
    steps = [info for info in getattr(model, "feature_info", ()) if isinstance(info, dict)]
    stride = max((int(info["reduction"]) for info in steps), default=unsaid)
    if size < stride:
        raise InputError(
            f"--size {size}: below the stride of {name}, {stride} pixels; choose at least {stride}"
        )
    was_training = model.training
    try:
        with torch.no_grad():
            out = model.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:  # whatever the layer at fault raises
        raise InputError(
            f"--size {size}: {name} cannot take such images ({one_line(error)}); choose another"
        ) from error
    finally:
        model.train(was_training)
    if not bool(torch.isfinite(out).all()):
        raise InputError(f"--size {size}: leaves {name} no feature map; choose a larger size")


def _wrap(model: nn.Module, size: int | None) -> Network:
    config = getattr(model, "pretrained_cfg", None)
    name = str((config or {}).get("architecture") or type(model).__name__)
    if config:
        train = resolve(config, model, name, test=False)
        test = resolve(config, model, name, test=True)
        if size is not None:
            train = replace(train, size=size)
    elif size is None:
        raise InputError(f"{name}: has no timm configuration; give the size it was trained at")
    else:
        train = test = Preprocessing(size)
    labels = (config or {}).get("label_names") or ()
    return Network(
        model.eval(),
        name,
        train,
        test,
        tuple(labels) if len(labels) == getattr(model, "num_classes", 0) else (),
        origin=_origin(config or {}),
    )


def _origin(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: config[k] for k in ("tag", "license") if config.get(k)}


def _num_classes(model: nn.Module, network: Network) -> int:
    count = getattr(model, "num_classes", None)
    return int(count) if count is not None else len(network.classes)
