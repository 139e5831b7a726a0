"""What `remanence speech cpc` measures on held-out recordings, always on the same windows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.speech.cpc_audio import Speech
from remanence.jobs.speech.cpc_waves import Waves
from remanence.kit.audio import mfcc
from remanence.modes import evaluating
from remanence.speech.abx.cells import Speaker, check_cells, fixed_subsample
from remanence.speech.abx.items import Items
from remanence.speech.abx.score import run as abx_error
from remanence.speech.cpc.loss import CPCLoss
from remanence.speech.cpc.model import CPC
from remanence.speech.cpc.sampler import Mode, WindowBatch, WindowSampler
from remanence.speech.cpc.training import cpc_losses

FRAME_RATE = 100  # of the encoder, frames a second
KINDS: tuple[Speaker, ...] = ("within", "across")
ABX, ACCURACY = "ABX error", "validation accuracy"


class Validation:
    """Loss and accuracy on fixed windows with fixed negatives, and ABX errors on fixed items.

    Args:
        speech: Held-out recordings; may be none.
        waves: Their samples; None on processes that do not measure.
        batches: Windows of them.
        loss: The loss of training, with negatives of this process alone.
        items: What to tell apart in them, by kind of ABX error; empty for no ABX.
        seed: Of negatives.
        by: Name of what the best network is chosen by; empty where nothing is measured.
    """

    def __init__(
        self,
        speech: Speech,
        waves: Waves | None,
        batches: Sequence[WindowBatch],
        loss: CPCLoss,
        items: Mapping[Speaker, Items],
        seed: int,
        *,
        by: str,
    ) -> None:
        self.by = by
        self.waves, self.batches, self.loss = waves, batches, loss
        self.items, self.seed = items, seed
        self.places = {recording.name: i for i, recording in enumerate(speech.recordings)}

    def merit(self, row: dict[str, float]) -> float | None:
        """Return what the best measurement has most of; None where it was not measured."""
        if self.by == ABX:
            errors = [row[f"abx_{kind}"] for kind in KINDS if f"abx_{kind}" in row]
            return -float(np.mean(errors)) if errors else None
        return row.get("valid_accuracy")

    @torch.no_grad()
    def measure(self, model: CPC, *, abx: bool) -> dict[str, float]:
        """Measure a network; ABX errors only if asked for."""
        with evaluating(model):
            row = self._losses(model)
            if abx and self.items:
                device = next(model.parameters()).device
                row |= self._abx(lambda wave: model.features(wave.to(device)))
        return row

    def baseline(self) -> dict[str, float]:
        """Return the ABX errors of MFCC on the same items, which a network should beat."""
        if not self.items or self.waves is None:
            return {}
        rate = self.waves.sample_rate
        return self._abx(lambda wave: mfcc(wave, rate))

    def _losses(self, model: CPC) -> dict[str, float]:
        if not self.batches or self.waves is None:
            return {}
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(self.seed)
        parts = []
        for batch, samples in self.waves.batches(iter(self.batches)):
            wave = samples.to(device)
            found = cpc_losses(model, self.loss, wave, wave, generator)
            parts.append(torch.stack(found).double() * len(batch.windows))
        windows = sum(len(batch.windows) for batch in self.batches)
        return by_step("valid_", *(torch.stack(parts).sum(0) / windows).tolist())

    def _abx(self, features_of: Callable[[Tensor], Tensor]) -> dict[str, float]:
        assert self.waves is not None
        features = {
            name: features_of(self.waves.whole(self.places[name]))
            for name in sorted({name for items in self.items.values() for name in items.file})
        }
        row = {}
        for kind, items in self.items.items():
            found = abx_error(
                features,
                items,
                frame_rate=FRAME_RATE,
                speaker=kind,
                drop_empty=True,
                device=next(iter(features.values())).device,
            )
            row[f"abx_{kind}"] = found.error
            row[f"abx_{kind}_dropped"] = found.dropped
            if math.isfinite(found.stderr):
                row[f"abx_{kind}_stderr"] = found.stderr
        return row


def by_step(prefix: str, losses: Sequence[float], accuracies: Sequence[float]) -> dict[str, float]:
    """Return the means over steps ahead, and the values of each step, by name."""
    row = {f"{prefix}loss": float(np.mean(losses)), f"{prefix}accuracy": float(np.mean(accuracies))}
    row |= {f"{prefix}loss_{k}": value for k, value in enumerate(losses, 1)}
    return row | {f"{prefix}accuracy_{k}": value for k, value in enumerate(accuracies, 1)}


def fixed_batches(
    speech: Speech,
    lengths: Sequence[int],
    *,
    window: int,
    batch: int,
    mode: Mode,
    straddle: bool,
) -> list[WindowBatch]:
    """Return the windows of held-out recordings, the same whenever asked.

    They are batched as in training: negatives from elsewhere would be easier or harder.
    None where no speaker has a whole window.
    """
    if not speech.recordings:
        return []
    try:
        sampler = WindowSampler(
            lengths,
            speech.speakers,
            window=window,
            batch=batch,
            mode=mode,
            straddle=straddle,
        )
    except InputError:
        return []
    return list(sampler)


def chosen_by(items: Mapping[Speaker, Items], batches: Sequence[WindowBatch]) -> str:
    """Return the name of what the best network is chosen by; empty where nothing is measured."""
    return ABX if items else ACCURACY if batches else ""


def open_items(
    path: Path | None, names: str | None, speech: Speech, most: int, seed: int
) -> tuple[dict[Speaker, Items], dict[str, str]]:
    """Return the items that stay the same, by kind of ABX error, and why other kinds are missing.

    They are those of a file, or whole recordings whose names tell a phone; else there are none.

    Raises:
        InputError: The file cannot be read, no item lies in the held-out recordings, or those that
            do hold nothing to compare.
    """
    if path is not None:
        every = _items_in(Items.read(path), speech)
    elif names is not None and "(?P<phone>" in names and speech.recordings:
        every = Items.from_file_names([r.name for r in speech.recordings], names)
    else:
        return {}, {}
    found: dict[Speaker, Items] = {}
    missing: dict[str, str] = {}
    for kind in KINDS:
        try:
            check_cells(every, kind, "within")
        except InputError as error:
            missing[kind] = str(error)
        else:
            found[kind] = fixed_subsample(every, most, speaker=kind, seed=seed)
    if not found and path is not None:
        raise InputError(f"{path}: {missing['within']}; or hold out more, with --valid")
    return found, missing


def _items_in(items: Items, speech: Speech) -> Items:
    """Return the items of held-out recordings, under these recordings' names.

    An item's file is a recording's name, or the last part of it where that is one recording's.

    Raises:
        InputError: No item lies in them.
    """
    names = [recording.name for recording in speech.recordings]
    if not names:
        raise InputError(
            f"{len(items):,} items and no held-out recording; give --valid, or leave --items out"
        )
    last = [name.rpartition("/")[2] for name in names]
    times = Counter(last)
    known = {short: name for short, name in zip(last, names, strict=True) if times[short] == 1}
    known |= {name: name for name in names}
    inside = np.array([file in known for file in items.file])
    if not inside.any():
        raise InputError(
            f"none of {len(items):,} items lies in the {len(names):,} held-out recordings, as "
            f"{items.file[0]!r} and {names[0]!r} show: name recordings in the items, or give those "
            "that have items with --valid"
        )
    kept = items[inside]
    kept.file[:] = [known[file] for file in kept.file]
    return kept
