"""Pooled features of every depth of a network, from one forward pass a batch."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from remanence.errors import InputError

Pool = Literal["avgmax", "grid2"]
Preprocess = Callable[[Tensor], Tensor]

PIXELS = "input"  # depth 0
MAX_SIDE = 32  # of the pixels at depth 0


class DepthReader:
    """Reads the features of chosen layers; the network is left as it was, bit by bit.

    Attributes:
        names: of the depths: "input", then the layers.

    Args:
        backbone: in eval mode; (B, ...) to anything.
        layers: names of modules that run once a forward pass, or "auto": each block with weights
            together with the normalisations and activations behind it.
        pool: of maps (B, C, H, W): "avgmax", mean and maximum (2C), or "grid2", means over two by
            two cells (4C). Tokens (B, T, C) give the class token and the mean of the patches (2C),
            or mean and maximum where the network has no class token.
        example: (1 or more, ...) images as `extract` gets them, for a first look at the layers.
        preprocess: applied to each batch of images on the network's device; uint8 images become
            floats in [0, 1] where there is none.

    Raises:
        InputError: the network is in train mode, a layer is unknown, does not run exactly once or
            does not return a tensor with one row an image.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: Literal["auto"] | Sequence[str],
        pool: Pool,
        example: Tensor,
        preprocess: Preprocess | None = None,
    ) -> None:
        if isinstance(backbone, DataParallel | DistributedDataParallel):
            backbone = backbone.module
        if any(module.training for module in backbone.modules()):
            raise InputError(
                "the backbone is in train mode, where a forward pass changes it: call .eval() first"
            )
        if pool not in get_args(Pool):
            raise InputError(f"pool {pool!r} is unknown: give one of {get_args(Pool)}")
        self.backbone, self.pool, self.preprocess = backbone, pool, preprocess
        first = next((x for own in (backbone.parameters(), backbone.buffers()) for x in own), None)
        self.device = torch.device("cpu") if first is None else first.device
        modules = dict(backbone.named_modules())
        if layers == "auto":
            layers = self._auto(example)
        for name in layers:
            if name not in modules or not name:
                near = difflib.get_close_matches(name, [key for key in modules if key], 3)
                hint = f": give one of {near}" if near else ": list(backbone.named_modules())"
                raise InputError(f"layer {name!r} is not in the backbone{hint}")
        self.layers = tuple(layers)
        self.names = (PIXELS, *layers)
        self._read(example[:2])  # raises what is wrong with the layers before the long pass

    def extract(
        self,
        images: Tensor,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        scratch: Path | None = None,
    ) -> list[Tensor]:
        """Features of all depths.

        Args:
            images: (N, ...) on any device.
            batch_size: images a forward pass.
            dtype: float32, or float16 for half the memory.
            scratch: folder for memory-mapped matrices; None keeps them in memory.

        Returns:
            One (N, D) tensor a depth, on the CPU.

        Raises:
            InputError: features are not finite in `dtype`.
        """
        matrices: list[Tensor] = []
        for start in range(0, len(images), batch_size):
            features = self._read(images[start : start + batch_size])
            if not matrices:
                matrices = [
                    _matrix((len(images), f.shape[1]), dtype, scratch, f"{depth}.bin")
                    for depth, f in enumerate(features)
                ]
            for name, matrix, feature in zip(self.names, matrices, features, strict=True):
                rows = feature.to("cpu", dtype)
                if not bool(rows.isfinite().all()):
                    raise InputError(
                        f"features of layer {name!r} are not finite in {dtype}: check the model, "
                        "or keep them in float32"
                    )
                matrix[start : start + batch_size] = rows
        return matrices

    def _read(self, images: Tensor) -> list[Tensor]:
        x = self._input(images)
        found: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        with self._watch(self.layers, lambda name, out: found[name].append(self._pooled(out))):
            self.backbone(x)
        for name, outputs in found.items():
            if len(outputs) != 1:
                raise InputError(
                    f"layer {name!r} ran {len(outputs)} times in a forward pass: name a module "
                    "that runs once"
                )
            if outputs[0].shape[0] != len(images):
                raise InputError(
                    f"layer {name!r} returns {outputs[0].shape[0]} rows for {len(images)} images: "
                    "name a module with one row an image"
                )
        return [_pixels(x), *(outputs[0] for outputs in found.values())]

    def _input(self, images: Tensor) -> Tensor:
        x = images.to(self.device)
        if self.preprocess is not None:
            return self.preprocess(x)
        return x if x.is_floating_point() else x.float() / 255

    @contextmanager
    def _watch(self, names: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Call `see` with each output of the named modules; nothing stays behind."""
        modules = dict(self.backbone.named_modules())

        def hook(name: str) -> Callable[[nn.Module, object, object], None]:
            def read(_module: nn.Module, _inputs: object, output: object) -> None:
                if isinstance(output, tuple | list) and output:
                    output = output[0]
                if not isinstance(output, Tensor) or output.ndim < 2:
                    raise InputError(
                        f"layer {name!r} returns no tensor with one row an image: name another"
                    )
                # Read at once: a later in-place activation writes over this tensor.
                see(name, output)

            return read

        handles = [modules[name].register_forward_hook(hook(name)) for name in names]
        try:
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _auto(self, example: Tensor) -> list[str]:
        total = sum(parameter.numel() for parameter in self.backbone.parameters())
        units = dict(_units(self.backbone, "", total))
        ran: list[tuple[str, tuple[int, ...]]] = []
        names = [name for name, unit in units.items() if not isinstance(unit, nn.ModuleList)]
        with self._watch(names, lambda name, out: ran.append((name, tuple(out.shape)))):
            self.backbone(self._input(example[:2]))
        once = [name for name, _ in ran]
        chosen: list[str] = []
        shape: tuple[int, ...] = ()
        for name, now in ran:
            if once.count(name) > 1 or now[0] != len(example[:2]):
                continue
            if any(parameter.ndim > 1 for parameter in units[name].parameters()):
                chosen.append(name)
                shape = now
            elif chosen and now == shape and chosen[-1].startswith(_parent(name)):
                chosen[-1] = name
        if not chosen:
            raise InputError("no layer with weights was found in the backbone: name the layers")
        return chosen

    def _pooled(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, D) float32."""
        x = x.detach().float()
        if x.ndim == 2:
            return x.clone()
        if x.ndim == 3:
            prefix = _class_tokens(self.backbone)
            if prefix:
                return torch.cat((x[:, 0], x[:, prefix:].mean(1)), 1)
            return torch.cat((x.mean(1), x.amax(1)), 1)
        if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":  # timm's word for Swin's maps
            x = x.movedim(-1, 1)
        if x[0, 0].numel() == 1:
            return x.flatten(1).clone()
        if self.pool == "grid2" and x.ndim == 4:
            return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        x = x.flatten(2)
        return torch.cat((x.mean(2), x.amax(2)), 1)


def _units(module: nn.Module, prefix: str, total: int) -> Iterator[tuple[str, nn.Module]]:
    """Blocks of a network: containers, and what holds over half of all weights, are opened."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        size = sum(parameter.numel() for parameter in child.parameters())
        wraps = 2 * size > total and any(True for _ in child.children())
        if wraps or isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _units(child, f"{path}.", total)
        elif not isinstance(child, nn.Identity | nn.Dropout):
            yield path, child


def _parent(name: str) -> str:
    return name[: name.rfind(".") + 1]


def _class_tokens(backbone: nn.Module) -> int:
    """Tokens before the first patch: timm's count, or one where there is a class token."""
    count = getattr(backbone, "num_prefix_tokens", None)
    if isinstance(count, int):
        return count
    tokens = (getattr(backbone, name, None) for name in ("class_token", "cls_token"))
    return int(any(isinstance(token, Tensor) for token in tokens))


def _pixels(x: Tensor) -> Tensor:
    """The input itself, (B, D); images beyond 32 x 32 as means over cells."""
    if x.ndim == 4 and max(x.shape[2:]) > MAX_SIDE:
        x = nn.functional.adaptive_avg_pool2d(
            x, (min(x.shape[2], MAX_SIDE), min(x.shape[3], MAX_SIDE))
        )
    return x.flatten(1).float()


def _matrix(shape: tuple[int, int], dtype: torch.dtype, scratch: Path | None, name: str) -> Tensor:
    if scratch is None:
        return torch.empty(shape, dtype=dtype)
    scratch.mkdir(parents=True, exist_ok=True)
    kind = np.float16 if dtype == torch.float16 else np.float32
    return torch.from_numpy(np.memmap(scratch / name, kind, "w+", shape=shape))
