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
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import timm
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from torch import nn

from remanence.errors import InputError
from remanence.kit import architectures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CropMode = Literal["center", "squash", "border", "fixres_height"]
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# The registry fills when the module is imported.
assert architectures.default_cfgs


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs.

    Attributes:
        size: Side of the input, pixels.
        crop_pct: Side of the input over the side that images are resized to.
        crop_mode: `center`, `squash`, `border` (timm's), or `fixres_height`.
        interpolation: `bilinear` or `bicubic`.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel.
    """

    size: int
    crop_pct: float = 0.875
    crop_mode: CropMode = "center"
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass
class Network:
    """A classifier and what must travel with it.

    Attributes:
        model: The network; images (N, 3, K, K), normalised, to logits (N, classes).
        name: Architecture, with its `torchvision:` prefix if any; the class name of a user's own.
        train: Preprocessing that it was trained with.
        test: Preprocessing that it should be evaluated with.
        classes: Class names in label order, where known.
        arguments: Arguments that its architecture was built with.
    """

    model: nn.Module
    name: str
    train: Preprocessing
    test: Preprocessing
    classes: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)


def create_network(
    name: str, classes: Sequence[str], *, size: int | None = None, seed: int = 0
) -> Network:
    """Build an architecture with fresh weights.

    Args:
        name: timm architecture or `torchvision:NAME`.
        classes: Class names.
        size: Side of the input; the architecture's own where None.
        seed: Seed of the weights.

    Returns:
        The network.

    Raises:
        InputError: The architecture is not known, or cannot take the size.
    """
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {}
    model = _build(name, len(classes), arguments, size)
    config = getattr(model, "pretrained_cfg", None) or {"interpolation": "bilinear"}
    train = _preprocessing(config, model, test=False)
    train = replace(train, size=size or train.size, crop_mode="center")
    _try_size(model, name, train.size)
    return Network(model, name, train, train, tuple(classes), arguments)


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
        model = timm.create_model(source, pretrained=True).eval()
        return replace(_wrap(model, size), name=model.pretrained_cfg["architecture"])
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{source}: no such model folder; give a folder that holds {CONFIG} and {WEIGHTS}, "
            "or hf-hub:OWNER/NAME. `remanence learn classifier` trains one"
        )
    config = _read_config(folder)
    name = str(config["architecture"])
    pretrained = config.get("pretrained_cfg") or {}
    count = int(config.get("num_classes") or pretrained.get("num_classes") or 0)
    arguments = dict(config.get("model_args") or {})
    model = _build(name, count, arguments, None)
    load_weights(model, _read_weights(folder), str(folder))
    _check_normalisation(folder, config["architecture"], pretrained)
    classes = tuple(config.get("label_names") or pretrained.get("label_names") or ())
    if len(classes) != count:
        classes = ()
    train = _preprocessing(pretrained, model, test=False)
    test = _preprocessing(pretrained, model, test=True)
    return Network(model.eval(), name, train, test, classes, arguments)


def save_network(network: Network, folder: Path) -> None:
    """Write a network so that timm opens it: `timm.create_model("local-dir:FOLDER", ...)`.

    Args:
        network: What to write; `train` and `test` go to `input_size`, `test_input_size` and the
            two `crop_pct`.
        folder: Folder to create.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = network.model
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    train, test = network.train, network.test
    old = dict(getattr(model, "pretrained_cfg", {}) or {})
    kept = ("first_conv", "classifier", "fixed_input_size", "license", "tag")
    count = _num_classes(model, network)
    pretrained = {k: old[k] for k in kept if old.get(k) is not None} | {
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
    config: dict[str, Any] = {"architecture": network.name, "num_classes": count}
    if getattr(model, "num_features", None):
        config["num_features"] = model.num_features
    config["pretrained_cfg"] = pretrained
    if network.arguments:
        config["model_args"] = network.arguments
    if network.classes:
        config["label_names"] = list(network.classes)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{source}: tensor {name} holds NaN or infinity; the training that wrote it "
                "diverged, take an earlier checkpoint"
            )
    model.load_state_dict(dict(state))


def describe(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return preprocessing as plain values, for JSON."""
    return asdict(preprocessing)


def _build(name: str, count: int, arguments: dict[str, Any], size: int | None) -> nn.Module:
    # `arguments` also takes up what fixes the size, so that it can be written beside the weights.
    if name.startswith("torchvision:"):
        known = torchvision.models.list_models()
        short = name.removeprefix("torchvision:")
        if short not in known:
            raise InputError(_unknown(name, [f"torchvision:{k}" for k in known]))
        if size is not None and short.startswith("vit_"):
            arguments["image_size"] = size
        model: nn.Module = torchvision.models.get_model(
            short, weights=None, num_classes=count, **arguments
        )
        return model
    if not timm.is_model(name):
        if "/" in name or Path(name).exists():
            raise InputError(f"{name}: not an architecture; give a timm name such as resnet18")
        raise InputError(_unknown(name, timm.list_models()))
    try:
        model = timm.create_model(name, pretrained=False, num_classes=count, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"{name}: cannot be built with {arguments} ({error})") from error
    if size is not None and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(size, size))
        arguments["img_size"] = size
    return model


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
    return f"{name}: unknown architecture; {hint}"


def _try_size(model: nn.Module, name: str, size: int) -> None:
    was_training = model.training
    try:
        with torch.no_grad():
            out = model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:
        raise InputError(
            f"{name}: cannot take images of {size} pixels ({str(error).splitlines()[0]}); "
            "choose another --size"
        ) from error
    finally:
        model.train(was_training)
    if not bool(torch.isfinite(out).all()):
        raise InputError(f"{name}: {size} pixels leave no feature map; choose a larger --size")


def _preprocessing(config: Mapping[str, Any], model: nn.Module, *, test: bool) -> Preprocessing:
    resolved = resolve_data_config(
        {}, pretrained_cfg=dict(config), model=model, use_test_size=test
    )
    return Preprocessing(
        size=int(resolved["input_size"][-1]),
        crop_pct=float(resolved["crop_pct"]),
        crop_mode=_crop_mode(str(resolved["crop_mode"])),
        interpolation=str(resolved["interpolation"]),
        mean=tuple(float(v) for v in resolved["mean"]),
        std=tuple(float(v) for v in resolved["std"]),
    )


def _crop_mode(name: str) -> CropMode:
    for mode in get_args(CropMode):
        if mode == name:
            return cast("CropMode", mode)
    raise InputError(f"crop_mode {name!r}: unknown; use one of {', '.join(get_args(CropMode))}")


def _wrap(model: nn.Module, size: int | None) -> Network:
    config = getattr(model, "pretrained_cfg", None)
    name = str((config or {}).get("architecture") or type(model).__name__)
    if config:
        train = _preprocessing(config, model, test=False)
        test = _preprocessing(config, model, test=True)
        if size is not None:
            train = replace(train, size=size)
    elif size is None:
        raise InputError(f"{name}: has no timm configuration; give the size it was trained at")
    else:
        train = test = Preprocessing(size)
    return Network(model.eval(), name, train, test)


def _num_classes(model: nn.Module, network: Network) -> int:
    count = getattr(model, "num_classes", None)
    return int(count) if count is not None else len(network.classes)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder}: holds no readable {CONFIG}; is it a model folder?") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise InputError(f"{path}: has no 'architecture'; write the folder in timm's hub layout")
    return config


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    safe, old = folder / WEIGHTS, folder / "pytorch_model.bin"
    try:
        if safe.exists():
            tensors: dict[str, torch.Tensor] = load_file(safe)
            return tensors
        if old.exists():
            state = torch.load(old, map_location="cpu", weights_only=True)
            return dict(state)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: damaged weights ({reason}); fetch them again") from error
    raise InputError(f"{folder}: holds no {WEIGHTS}")


def _check_normalisation(folder: Path, name: str, config: Mapping[str, Any]) -> None:
    # AdvProp checkpoints (tf_efficientnet_*.ap_in1k) want mean 0.5: the released FixEfficientNet
    # code got this wrong, and nothing but the accuracy shows it.
    tag = config.get("tag")
    if not tag or name.startswith("torchvision:"):
        return
    try:
        known = timm.models.get_pretrained_cfg(f"{name}.{tag}", allow_unregistered=True)
    except RuntimeError:  # a tag that timm does not know
        return
    if known is None:
        return
    for key in ("mean", "std"):
        given, right = config.get(key), getattr(known, key)
        if given and any(abs(a - b) > 1e-3 for a, b in zip(given, right, strict=True)):
            raise InputError(
                f"{folder / CONFIG}: {key} {tuple(given)} contradicts {name}.{tag}, which was "
                f"trained with {tuple(right)}; correct the configuration"
            )
