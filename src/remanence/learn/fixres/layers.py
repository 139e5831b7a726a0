"""Find the layers that FixRes adapts: the head, the norms before pooling, the total stride.

"Fixing the train-test resolution discrepancy" (arXiv 1906.06423, section 4) retrains the classifier
and the last batch norm. What these are called differs from network to network, so everything
here is read off one forward pass instead of off names.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import torch
from timm.layers.norm import RmsNorm
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from remanence.errors import InputError
from remanence.learn.fixres.norm_graph import (
    hooked,
    norm_graph,
)
from remanence.modes import evaluating

# What a network raises when an image is too small, too large or not a multiple of its patch.
REFUSALS = (RuntimeError, AssertionError, ValueError, IndexError)


def find_head(
    model: nn.Module, num_classes: int | None = None, example: Tensor | None = None
) -> tuple[str, nn.Module]:
    """Find the layer that turns pooled embeddings into logits.

    timm's `get_classifier()` is asked first. Otherwise the head is the last executed `Linear` or
    1x1 `Conv2d` with `num_classes` outputs, provided that it yields the logits themselves or is
    the only such layer.

    Args:
        model: any classifier.
        num_classes: number of classes; read off the model's output when left out.
        example: (1, 3, K, K) image; needed only for models without `get_classifier()`.

    Returns:
        The head's name in `model.named_modules()`, and the head.

    Raises:
        InputError: no head, several heads, or a head with another number of classes.
    """
    if hasattr(model, "get_classifier"):
        head = cast("Callable[[], Any]", model.get_classifier)()
        name = next((n for n, module in model.named_modules() if module is head), None)
        if name is None or not list(head.parameters()):
            names = [n for n, m in model.named_modules() if _outputs(m) is not None][-4:]
            raise InputError(
                "the model has no single classifier: build it with num_classes above 0 and "
                f"without a distillation head (its last linear layers: {', '.join(names)})"
            )
        found = _outputs(head)
        if num_classes is not None and found not in (None, num_classes):
            raise InputError(
                f"head {name!r} has {found} outputs but the data has {num_classes} classes: "
                "choose a model trained on these classes, or reset its classifier"
            )
        return name, cast("nn.Module", head)
    if example is None:
        raise InputError(
            "the model has no get_classifier(): pass an example image to find its head"
        )

    calls: list[tuple[str, nn.Module, Tensor]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda module, _args, output: calls.append((name, module, output))

    layers = {n: m for n, m in model.named_modules() if _outputs(m) is not None}
    with torch.no_grad(), hooked(layers, record), evaluating(model):
        logits = model(example[:1])
    classes = num_classes or logits.shape[1]
    candidates = [call for call in calls if _outputs(call[1]) == classes]
    listing = ", ".join(f"{n} ({_outputs(m)} outputs)" for n, m, _ in (candidates or calls)[-6:])
    if not candidates:
        raise InputError(
            f"no layer has {classes} outputs: give the model's class count ({listing})"
        )
    name, head, output = candidates[-1]
    is_logits = output.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    if not is_logits and len({n for n, _, _ in candidates}) > 1:
        raise InputError(f"several layers could be the head: keep only one of {listing}")
    return name, head


def forward_embedding(model: nn.Module, x: Tensor, head: nn.Module | None = None) -> Tensor:
    """Compute the pooled embedding that enters the head.

    Args:
        model: any classifier; its modes are left as they are.
        x: (N, 3, K, K) images.
        head: the head, if already known; else `find_head` looks for it.

    Returns:
        (N, C) embedding; gradients flow as in the model's own forward pass.

    Raises:
        InputError: the head sees an unpooled map, or is not reached.
    """
    head = find_head(model, example=x[:1])[1] if head is None else head
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        model(x)
    finally:
        handle.remove()
    if not inputs:
        raise InputError("the head is not used in the forward pass: pass the layer that is")
    z = inputs[-1]
    if z.ndim < 2 or z.shape[0] != len(x) or z.numel() != len(x) * z.shape[1]:
        raise InputError(
            f"the head's input has shape {tuple(z.shape)}, not one vector per image: "
            "choose a model that pools before its classifier"
        )
    return z.flatten(1)  # (N, C, 1, 1) of a 1x1 convolution becomes (N, C)


def find_last_norms(model: nn.Module, example: Tensor) -> list[str]:
    """Find the last batch norm(s) before global pooling.

    A BatchNorm is last when its output reaches the head without passing another one. Two
    refinements make this exact. Where paths are *summed* or multiplied, a norm that the other path
    has been through already is not last: else the identity shortcuts of a ResNet would list
    every block of its last stage. Where paths are *concatenated* (Inception, PNASNet) every path
    keeps its own. Norms after pooling, which see one value per channel, do not count.

    Args:
        model: any classifier.
        example: (1, 3, K, K) image.

    Returns:
        Names in execution order. Without a BatchNorm: the final LayerNorm, GroupNorm or RMSNorm
        with an affine part, else an empty list and a warning.
    """
    head = find_head(model, example=example)[1]
    batch_norms = modules_of(model, _BatchNorm)
    graph = norm_graph(model, batch_norms, example, head, spatial=True)
    if graph.lone:
        # One value per channel: either the norm follows the pooling or the image is small.
        larger = interpolate(example[:1].float(), scale_factor=2).to(example.dtype)
        with suppress(*REFUSALS):  # a network of fixed size has no larger map: the answer stands
            graph = norm_graph(model, batch_norms, larger, head, spatial=True)
    if graph.last:
        return graph.last
    others = modules_of(model, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RmsNorm))
    others = {n: m for n, m in others.items() if list(m.parameters(recurse=False))}
    last = norm_graph(model, others, example, head).last
    if not last:
        warnings.warn("no norm precedes the head: only the head can be adapted", stacklevel=2)
    return last


def total_stride(model: nn.Module, example: Tensor) -> int:
    """Measure by how much the network shrinks an image before it pools.

    Every step that makes the map smaller counts with its own stride, or with the rounded ratio of
    sides where it has none. That holds for unpadded networks too: Inception's stride is 32 though
    it makes 8 cells of 299 px.

    Args:
        model: any network.
        example: (1, 3, K, K) image that leaves at least a 2x2 map.

    Returns:
        Pixels per cell: 32 for a ResNet, the patch size for a ViT.
    """
    smallest, stride = example.shape[-1], 1

    def shrink(side: int, own: int | None = None) -> None:
        nonlocal smallest, stride
        if 1 < side < smallest:
            stride *= own or round(smallest / side)
            smallest = side

    def record(_name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            shrink(_side(args[0]))  # by a functional pooling, which no hook sees
            own = getattr(module, "stride", None)
            shrink(_side(output), own[0] if isinstance(own, tuple) else own)

        return hook

    kinds = (nn.Conv2d, nn.Linear, nn.LayerNorm, _BatchNorm, _MaxPoolNd, _AvgPoolNd)
    with torch.no_grad(), hooked(modules_of(model, kinds), record), evaluating(model):
        model(example[:1])
    return stride


def fixed_input_size(model: nn.Module, example: Tensor) -> bool:
    """Say whether the network takes images of the example's size only.

    Args:
        model: any network, such as a ViT without `dynamic_img_size` (fixed) or a ResNet (not).
        example: (1, 3, K, K) image that the network takes.
    """
    return _refusal(model, example.shape[-1] + total_stride(model, example)) is not None


def set_input_size_(model: nn.Module, size: int) -> None:
    """Make the network take images of another size, in place.

    A network that takes the size already is left alone. Otherwise timm's `set_input_size` resamples
    the position embeddings (ViT: bicubically) or windows (Swin).

    Args:
        model: any network.
        size: image side in pixels.

    Raises:
        InputError: the network cannot take this size; it may be half-changed, so build it anew.
    """
    refusal = _refusal(model, size)
    if refusal is not None and hasattr(model, "set_input_size"):
        try:
            cast("Callable[[int], None]", model.set_input_size)(size)
            refusal = _refusal(model, size)
        except REFUSALS as error:
            refusal = error
    if refusal is not None:
        reason = " ".join(str(refusal).split())[:120] or type(refusal).__name__
        raise InputError(
            f"the network cannot take {size} px images: choose a larger size or a multiple of its "
            f"stride ({reason})"
        ) from refusal


def modules_of(
    model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]
) -> dict[str, nn.Module]:
    """List the modules of a kind by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _refusal(model: nn.Module, size: int) -> Exception | None:
    """Try one blank image; give back what the network raised, if anything."""
    weight = next(model.parameters())
    try:
        with torch.no_grad(), evaluating(model):
            model(torch.zeros(1, 3, size, size, dtype=weight.dtype, device=weight.device))
    except REFUSALS as error:
        return error
    return None


def _outputs(module: nn.Module) -> int | None:
    """Number of outputs of a linear layer or 1x1 convolution; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
        return module.out_channels
    return None


def _side(x: Tensor) -> int:
    """Side of one square map, (1, C, H, W) or Swin's (1, H, W, C); 0 for anything else."""
    if x.ndim != 4 or x.shape[0] != 1:
        return 0
    _, a, b, c = x.shape
    return b if b in (a, c) else 0
