"""States of torch that hold for a block and are given back after it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network in eval mode and give each of its modules its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def exact_products() -> Iterator[None]:
    """Keep float32 products and convolutions in float32: no TF32, no bfloat16, no autocast."""
    # The older get_float32_matmul_precision fails where a caller has set a backend's own precision.
    cudnn: Any = torch.backends.cudnn  # these stubs lack `conv` and `matmul`
    onednn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, cudnn.conv, onednn.matmul, onednn.conv)
    precisions = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
