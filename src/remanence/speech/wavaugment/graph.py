"""What differs inside a graph of `torch.compile`: no value is looked at, no other device touched.

A look at a value breaks the graph, and on a GPU waits for all that runs there; what lies on the CPU
keeps CUDA graphs from being captured. So parameters, lengths and waves are trusted in a graph, as
`trust` trusts the waves inside a chain, and read where the waves are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

Bounds = tuple[float, float]


def home(device: torch.device) -> torch.device:
    """Where parameters and lengths are read: on the CPU; inside a graph on the waves' `device`."""
    return device if torch.compiler.is_compiling() else torch.device("cpu")


def found(wrong: Tensor) -> bool:
    """Whether a check of values holds anywhere; never inside a graph, where none is made."""
    return not torch.compiler.is_compiling() and bool(wrong.any())


def declared(bounds: Bounds) -> Bounds | None:
    """What a random effect may draw, inside a graph, whose sizes cannot come from the values."""
    return bounds if torch.compiler.is_compiling() else None


def numbers(
    value: float | Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """A number or tensor as a tensor: where it lies, a number at `home`."""
    if torch.compiler.is_compiling() and not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    return torch.as_tensor(value, dtype=dtype)


def constant(table: Callable[[], Tensor], device: torch.device) -> Tensor:
    """A table of numbers on `device`: part of a graph, where it would be copied there each time."""
    return table().to(device)


# What torch.compiler.assume_constant_result does, which takes seconds to import.
constant._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001 (see above)
