"""The layers of a network whose weights can be quantised, found by their parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from remanence.compress.layout import Layout, layout_of
from remanence.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One weight of a network.

    Attributes:
        name: Dotted path of the module; the packed input projection of a `MultiheadAttention` at
            path `P` is `P.in_proj`.
        module: The module that holds the weight.
        parameter: The weight's name in its module.
        layout: How the weight is cut into rows.
        tied: Other layer names that hold the very same parameter.
    """

    name: str
    module: nn.Module
    parameter: str
    layout: Layout
    tied: tuple[str, ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        """The weight as the module holds it."""
        weight = self.module.get_parameter(self.parameter)
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias that is added to the layer's output; None where there is none."""
        bias = getattr(self.module, self.parameter.replace("weight", "bias"), None)
        return bias if isinstance(bias, nn.Parameter) else None

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Overwrite the weight in place, so that ties stay tied.

        Args:
            weight: Weight of the module's shape; it takes the module's dtype and device.
        """
        self.weight.copy_(weight)


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Find every weight of a network that can be quantised.

    These are convolutions of one to three dimensions, their transposes, linear layers, embeddings
    and the packed input projection of `nn.MultiheadAttention`. An attention with key or value
    sizes of their own holds three small projections, which stay in float.

    Args:
        model: The network; nothing in it changes.

    Returns:
        Layers by name, in the order in which modules were registered. A parameter that several
        modules share is one layer, under its first name.

    Raises:
        InputError: A weight is not there yet (lazy), is computed from other parameters, is not
            floating point, or is quantised already.
    """
    found: dict[str, Layer] = {}
    first_name: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        candidate = _candidate(path, module)
        if candidate is None:
            continue
        known = first_name.setdefault(id(candidate.weight), candidate.name)
        if known == candidate.name:
            found[known] = candidate
        else:
            found[known] = replace(found[known], tied=(*found[known].tied, candidate.name))
    return found


def _candidate(path: str, module: nn.Module) -> Layer | None:
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            return None
        name = f"{path}.in_proj" if path else "in_proj"
        _check_parameter(name, module, "in_proj_weight")
        shape = tuple(module.in_proj_weight.shape)
        return Layer(name, module, "in_proj_weight", Layout("linear", shape))
    if "quantized" in type(module).__module__.split(".") and hasattr(module, "weight"):
        raise InputError(f"{path}: the layer is quantised by torch.ao; give the float model")
    if not isinstance(
        module,
        nn.Linear
        | nn.Embedding
        | nn.Conv1d
        | nn.Conv2d
        | nn.Conv3d
        | nn.ConvTranspose1d
        | nn.ConvTranspose2d
        | nn.ConvTranspose3d,
    ):
        return None
    _check_parameter(path, module, "weight")
    layout = layout_of(module)
    assert layout is not None
    return Layer(path, module, "weight", layout)


def _check_parameter(name: str, module: nn.Module, parameter: str) -> None:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise InputError(f"{name}: the layer has no weight yet; run one batch through the model")
    if "codebook" in dict(module.named_parameters()):
        raise InputError(f"{name}: the layer is quantised already; expand the model first")
    weight = dict(module.named_parameters(recurse=False)).get(parameter)
    if weight is None:
        raise InputError(
            f"{name}: its weight is computed from other parameters; "
            "make it a plain parameter first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    if not weight.is_floating_point():
        raise InputError(f"{name}: its weight is {weight.dtype}; give the float model")
