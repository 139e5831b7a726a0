"""Products of float32 matrices in float32, whatever the caller has allowed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def exact_products() -> Iterator[None]:
    """Keep float32 products in float32: no TF32, no bfloat16, no autocast."""
    onednn: Any = torch.backends.mkldnn  # its stubs lack `matmul`
    backends = (torch.backends.cuda.matmul, onednn.matmul)
    precisions = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
