"""What `remanence speech cpc` sets up before it trains: recordings, network, batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from remanence.errors import InputError
from remanence.jobs.speech.augment_noise import Chains, chain_text
from remanence.jobs.speech.cpc_audio import (
    GIB,
    Speech,
    open_speech,
    prepared,
    split,
    usual_rate,
)
from remanence.jobs.speech.cpc_recipe import Preset, Recipe
from remanence.jobs.speech.cpc_validation import Validation, chosen_by, fixed_batches, open_items
from remanence.jobs.speech.cpc_waves import Waves
from remanence.kit.devices import seed_all
from remanence.kit.words import counted
from remanence.speech.abx.cells import Speaker
from remanence.speech.abx.items import Items
from remanence.speech.cpc.loss import Candidates, CPCLoss, Scope
from remanence.speech.cpc.model import CPC, Predictor
from remanence.speech.cpc.presets import PRESETS
from remanence.speech.cpc.sampler import Mode, WindowSampler
from remanence.speech.wavaugment.chain import Chain, TwoView
from remanence.speech.wavaugment.random import RandomChunkSwap

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Augment = Literal["none", "past", "future", "both", "same"]


@dataclass(frozen=True)
class Corpus:
    """Recordings, of which only headers were read.

    Attributes:
        learn: What is learned from.
        held: What is measured on; may be empty.
        sample_rate: To bring them to.
        items: What ABX errors are to tell apart, by kind.
        missing: Why other kinds are missing.
    """

    learn: Speech
    held: Speech
    sample_rate: int
    items: Mapping[Speaker, Items]
    missing: Mapping[str, str]


def open_corpus(
    audio: str,
    names: str | None,
    *,
    valid: str | None,
    valid_fraction: float | None,
    sampling: Mode,
    sample_rate: int | None,
    window: float,
    items: Path | None,
    abx_items: int,
    seed: int,
) -> Corpus:
    """Find recordings, who speaks, what is held out and what is to be told apart there."""
    speech = open_speech(audio, names, speakers=sampling == "speaker")
    learn, held = split(speech, valid, valid_fraction, names, seed, window=window)
    found, missing = open_items(items, names, held, abx_items, seed)
    return Corpus(learn, held, sample_rate or usual_rate(speech.recordings), found, missing)


@dataclass(frozen=True)
class Task:
    """A network and what it is to do.

    Attributes:
        model: The network, untrained.
        loss: Its loss.
        frames: Of a window.
        view: Makes the two copies of a window; None where one serves as both.
        said: What is to be known of the noise, in words.
    """

    model: CPC
    loss: CPCLoss
    frames: int
    view: TwoView | None
    said: tuple[str, ...]

    @property
    def samples(self) -> int:
        """Samples of a window."""
        return self.frames * self.model.encoder.stride

    @property
    def negatives(self) -> int | None:
        """Negatives of each frame; None for all frames of the batch."""
        return self.loss.negatives if self.loss.candidates == "sampled" else None

    def chance(self, batch: int) -> float:
        """Return the loss of guessing, for batches of so many windows."""
        others = self.negatives or batch * self.frames - self.loss.steps
        return math.log(1 + others)


def build_task(
    preset: Preset,
    recipe: Recipe,
    *,
    sample_rate: int,
    predictor: Predictor,
    steps_ahead: int | None,
    candidates: Candidates,
    exclude_positive: bool,
    scope: Scope,
    augment: Augment,
    chain: str | None,
    noise: str | None,
    device: torch.device,
    seed: int,
    show: bool,
) -> Task:
    """Build the network, its loss and its augmentation."""
    frames = round(recipe.window * 100)
    sizes = dict(PRESETS[preset]) | {
        "predictor": predictor,
        "sample_rate": sample_rate,
        "window": frames,
    }
    if steps_ahead:
        sizes["steps"] = steps_ahead
    seed_all(seed)
    model = CPC(**sizes)
    loss = CPCLoss(
        model.config["steps"],
        recipe.negatives,
        candidates=candidates,
        exclude_positive=exclude_positive,
        scope=scope,
    )
    chains, view = Chains(noise, device), None
    if augment != "none" and chain is not None:
        built = chains.build(chain, sample_rate, show=show).chain
        _check_aligned(built, chain)
        view = TwoView(built, augment)
    return Task(model, loss, frames, view, tuple(chains.said))


def written_chain(augment: Augment, chain: str | None, noise: str | None) -> str | None:
    """Return the effects as text; None for no augmentation."""
    if augment == "none":
        return None
    usual = "cpc2" if noise else "pitch,reverb"
    return chain_text(usual if chain is None else chain, noise)


def _check_aligned(chain: Chain, written: str) -> None:
    moving = [m for m in chain.modules() if isinstance(m, RandomChunkSwap)]
    if chain.changes_ends or moving:
        raise InputError(
            f"--chain {written}: past and future must stay aligned; leave out effects that move "
            "speech in time (speed, tempo, splice, swap)"
        )


@dataclass(frozen=True)
class Material:
    """Samples, and which of them make batches.

    Attributes:
        waves: To learn from.
        sampler: Says which of them make a batch.
        validation: Measures on held-out recordings.
        preparation: What was resampled, averaged, joined and left out, in words.
    """

    waves: Waves
    sampler: WindowSampler
    validation: Validation
    preparation: tuple[str, ...]


def load_material(
    fabric: Fabric,
    corpus: Corpus,
    task: Task,
    *,
    batch: int,
    sampling: Mode,
    straddle: bool,
    memory: float,
    seed: int,
) -> Material:
    """Read recordings and plan batches; what is held out is read by the first process alone."""
    learn, held, rate = corpus.learn, corpus.held, corpus.sample_rate
    first = fabric.global_rank == 0
    room = memory * GIB
    waves = Waves(learn.recordings, rate, in_memory=room, show=first)
    sampler = WindowSampler(
        waves.lengths,
        learn.speakers,
        window=task.samples,
        batch=batch,
        mode=sampling,
        straddle=straddle,
        seed=seed,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    held_waves = None
    if first:
        held_waves = Waves(held.recordings, rate, in_memory=room - waves.bytes, show=False)
    batches = fixed_batches(
        held,
        held_waves.lengths if held_waves else [],
        window=task.samples,
        batch=batch,
        mode=sampling,
        straddle=straddle,
    )
    # The first process measures alone: what others hold is no part of it.
    loss = CPCLoss(
        task.loss.steps,
        task.loss.negatives,
        candidates=task.loss.candidates,
        exclude_positive=task.loss.exclude_positive,
    )
    by = fabric.broadcast(chosen_by(corpus.items, batches))
    validation = Validation(held, held_waves, batches, loss, corpus.items, seed, by=by)
    preparation = [*prepared(learn, held, waves, held_waves, sampler), *task.said]
    if first and held.recordings and not batches:
        preparation.append(
            f"{counted(len(held.recordings), 'held-out recording')}, of no speaker a whole window: "
            "loss and accuracy are not measured on them"
        )
    return Material(waves, sampler, validation, tuple(preparation))
