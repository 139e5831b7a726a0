"""Sizes of CPC that are known to work: the constructor's arguments, less the sample rate."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# `cpc2` is the network of arXiv 2007.00991, for 1.28 s windows; `small` learns minutes of speech on
# a processor, from 0.9 s windows.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "cpc2": MappingProxyType(
            {
                "hidden": 256,
                "context_layers": 2,
                "steps": 12,
                "predictor": "multihead",
                "heads": 8,
                "ffn": 2048,
                "window": 128,
            }
        ),
        "small": MappingProxyType(
            {
                "hidden": 48,
                "context_layers": 1,
                "steps": 8,
                "predictor": "multihead",
                "heads": 4,
                "ffn": 192,
                "window": 90,
            }
        ),
    }
)
