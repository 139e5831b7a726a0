"""The features that carriers live in: what the last linear layer of a classifier reads.

"Radioactive data: tracing through training" (arXiv 2002.00937, Section 3.1) writes phi for the
network up to, and without, its last linear layer.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from remanence.errors import InputError

# What a network raises when an image is too small, too large or has the wrong channels.
_REFUSALS = (RuntimeError, AssertionError, ValueError, IndexError)


class FeatureExtractor(nn.Module):
    """A frozen network that gives the features its last linear layer reads.

    The last linear layer is read off one forward pass: it is the `nn.Linear` whose output is the
    model's output, so that VGG and DenseNet give what their last layer reads, not their logits.
    The model itself is put into evaluation mode and its parameters stop asking for gradients;
    gradients still flow to the images.

    Args:
        model: Any classifier that takes images (N, C, h, w) and returns logits (N, K).
        layer: "penultimate", or the name in `model.named_modules()` of a module whose output is
            taken as features: (N, d) as it is, maps (N, d, h, w) averaged over h and w.
        input_size: (C, h, w) of images that the model takes, for the one pass that finds `dim`.

    Attributes:
        model: The network.
        dim: Length d of a feature.

    Raises:
        InputError: The model refuses `input_size`, ends in no linear layer, or has no such module.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str = "penultimate",
        *,
        input_size: tuple[int, int, int] = (3, 224, 224),
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(requires_grad=False)
        modules = dict(model.named_modules())
        if layer != "penultimate" and layer not in modules:
            raise InputError(f"layer {layer!r} is no module of the model: {_suggestion(model)}")
        self._reads_head = layer == "penultimate"
        parameter = next(model.parameters(), torch.zeros(0))
        example = torch.zeros(2, *input_size, dtype=parameter.dtype, device=parameter.device)
        try:
            with torch.no_grad():
                self._layer = _last_linear(model, example) if self._reads_head else layer
                self.dim: int = self(example).shape[1]
        except _REFUSALS as error:
            if isinstance(error, InputError):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"the model refuses images of {input_size} ({reason}): give input_size=(C, h, w)"
            ) from error

    @property
    def head(self) -> nn.Linear | None:
        """The last linear layer; None where `layer` names a module."""
        module = self.model.get_submodule(self._layer)
        return module if self._reads_head and isinstance(module, nn.Linear) else None

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever is asked."""
        del mode
        return super().train(mode=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features.

        Args:
            images: (N, C, h, w), normalised as the model was trained.

        Returns:
            (N, d) float32; float64 where the model computes in it.

        Raises:
            InputError: The layer's output is no feature vector or map.
        """
        return self.features_and_logits(images)[0]

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Any]:
        """Return the features and what the model returns, from one forward pass.

        Args:
            images: (N, C, h, w), normalised as the model was trained.

        Returns:
            Features (N, d) and the model's own output, logits (N, K) for a classifier.

        Raises:
            InputError: The layer's output is no feature vector or map.
        """
        seen: list[Any] = []
        module = self.model.get_submodule(self._layer)
        # The model is the caller's: someone may have put it back into training mode.
        self.model.eval()
        if self._reads_head:
            handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        else:
            # Cloned because a rectifier that follows may work in place.
            handle = module.register_forward_hook(
                lambda _, __, output: seen.append(
                    output.clone() if isinstance(output, Tensor) else output
                )
            )
        with handle:
            logits = self.model(images)
        features = seen[-1] if seen else None
        if isinstance(features, Tensor) and features.ndim == 4:
            features = features.mean(dim=(2, 3))
        if not isinstance(features, Tensor) or features.ndim != 2:
            what = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            mend = _suggestion(self.model)
            raise InputError(f"layer {self._layer!r} gives {what}, not features (N, d): {mend}")
        return features if features.dtype == torch.float64 else features.float(), logits


def _last_linear(model: nn.Module, example: Tensor) -> str:
    """Name the `nn.Linear` whose output, flattened at most, is the model's output."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:  # torch's own hook type is a union of four
        return lambda _, __, output: outputs.update({name: output})

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                hooks.enter_context(module.register_forward_hook(keep(name)))
        logits = model(example)
    if not isinstance(logits, Tensor):
        raise InputError(
            f"the model returns {type(logits).__name__}, not logits: wrap it to return a tensor"
        )
    same = [
        name
        for name, output in outputs.items()
        if output.numel() == logits.numel() and output.data_ptr() == logits.data_ptr()
    ]
    name = same[-1] if same else None
    if name is not None and isinstance(model.get_submodule(name), nn.Conv2d):
        raise InputError(
            f"the model's head {name!r} is a 1x1 convolution, not nn.Linear: give layer= the "
            "module that pools before it"
        )
    if name is None or logits.ndim != 2:
        raise InputError(f"the model does not end in nn.Linear: {_suggestion(model)}")
    return name


def _suggestion(model: nn.Module) -> str:
    last = [name for name, module in model.named_modules() if name and not [*module.children()]]
    return f"give layer= the name of a module that outputs features (last: {', '.join(last[-4:])})"
