"""Checks of options that several commands share."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from remanence.errors import InputError

ANY = math.inf
# Smallest and largest value of each option, both allowed.
RANGES: dict[str, tuple[float, float]] = {
    "abx_every": (1, ANY),
    "abx_items": (10, ANY),
    "batch_seconds": (1, ANY),
    "batch_size": (1, ANY),
    "bootstrap": (0, 1_000_000),
    "beam_width": (1, ANY),
    "budget_gmacs": (0, ANY),
    "budget_ms": (0, ANY),
    "calibrate": (20, ANY),
    "calibration": (8, ANY),
    "checkpoint_steps": (1, ANY),
    "clip": (1e-12, ANY),
    "compare_frame_rate": (0.1, 100_000),
    "copies": (1, ANY),
    "cutmix": (0, ANY),
    "decoy_images": (1, ANY),
    "decoys": (1, ANY),
    "draws": (1, 1000),
    "ema": (0, 1),
    "epochs": (1, ANY),
    "equivalence": (1e-6, 1 - 1e-6),
    "erase": (0, 1),
    "finetune_epochs": (0, ANY),
    "finetune_lr": (1e-12, 1e6),
    "finetune_steps": (0, ANY),
    "flip": (0, 1),
    "halve_lr_every": (1, ANY),
    "hidden": (1, 65_536),
    "iterations": (1, ANY),
    "jitter": (0, 1),
    "k": (1, ANY),
    "label_rate": (1, ANY),
    "labels_per_class": (1, ANY),
    "layer_steps": (0, ANY),
    "level": (1e-9, 0.49),
    "limit": (1, ANY),
    "lr": (1e-12, 1e6),
    "max_group": (2, ANY),
    "max_steps": (1, ANY),
    "max_x_speakers": (1, ANY),
    "memory": (0, ANY),
    "mixup": (0, ANY),
    "negative": (1, ANY),
    "negatives": (1, 65_536),
    "nlist": (0, 2**31 - 1),
    "nprobe": (1, ANY),
    "null_check": (1, ANY),
    "patience": (1, ANY),
    "permutations": (99, ANY),
    "piece_seconds": (0.1, ANY),
    "pool": (0, ANY),
    "positions": (1024, ANY),
    "positives": (1, ANY),
    "prior": (1e-9, 1 - 1e-9),
    "psnr": (1, 100),
    "radius": (1, 255),
    "ramp": (0, ANY),
    "rank": (0, ANY),
    "reference_batch_size": (2, ANY),
    "reference_epochs": (1, ANY),
    "reference_lr": (1e-12, 1e6),
    "reference_together": (1, ANY),
    "reference_weight_decay": (0, 1e6),
    "references": (6, ANY),
    "restarts": (1, ANY),
    "ridge": (0, ANY),
    "sample_rate": (1000, 768_000),
    "seed": (0, 2**63 - 1),
    "shift": (0, ANY),
    "smoothing": (0, 1),
    "statistics_images": (2, ANY),
    "steps": (1, ANY),
    "steps_ahead": (1, 1000),
    "stream": (1, ANY),
    "subsample": (4, ANY),
    "threads": (1, 1024),
    "train_size": (1, ANY),
    "valid_fraction": (0, 0.9),
    "validation": (1e-6, 0.9),
    "warmup_epochs": (0, ANY),
    "weight_decay": (0, 1e6),
    "window": (0.05, 60),
    "workers": (0, 1024),
    "world_size": (1, ANY),
}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options out of their range, before anything is opened.

    Args:
        options: Values by name; None means not given.

    Raises:
        InputError: Names the option, its value and its range.
    """
    for name, (low, high) in RANGES.items():
        value = options.get(name)
        # A list or a word under the same name is another job's own affair; NaN is in no range.
        if isinstance(value, int | float) and not low <= value <= high:
            most = "" if high == ANY else f" and at most {high:g}"
            raise InputError(f"{_flag(name)} {value:g}: must be at least {low:g}{most}")
    for name in ("scale", "train_scale"):
        low, high = options.get(name) or (1, 1)
        if not 0 < low <= high <= 1:
            raise InputError(
                f"{_flag(name)} {low:g} {high:g}: give two fractions, 0 < MIN <= MAX <= 1"
            )
    optimizer = options.get("optimizer")
    if optimizer is not None:
        _check_optimizer(str(optimizer))


def _check_optimizer(name: str) -> None:
    from timm.optim import list_optimizers  # takes a second or two, which speech need not wait

    known = list_optimizers()
    if name not in known:
        near = difflib.get_close_matches(name, known, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "for example sgd or adamw"
        raise InputError(f"--optimizer {name}: unknown to timm; {hint}")


def model_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Read an architecture's arguments, NAME=VALUE, values in JSON or plain words.

    Raises:
        InputError: A word is no NAME=VALUE.
    """
    arguments: dict[str, Any] = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not (name.isidentifier() and equals):
            raise InputError(f"--model-arg {word}: give NAME=VALUE, for example output_stride=16")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
