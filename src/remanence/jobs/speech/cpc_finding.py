"""What a run of `remanence speech cpc` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remanence.jobs.speech.cpc_audio import by_speaker
from remanence.jobs.speech.cpc_setup import Corpus, Material, Task
from remanence.jobs.speech.cpc_training import Plan, Progress
from remanence.jobs.speech.cpc_validation import KINDS
from remanence.speech.abx.cells import Speaker
from remanence.speech.cpc.loss import Scope


@dataclass(frozen=True)
class Finding:
    """What a run found, for its report.

    Attributes:
        source: The recordings, as given.
        hours: Of speech to learn from.
        held_out_hours: Of speech to measure on.
        speakers: For each speaker: name, recordings, hours, windows an epoch, recordings held out.
        sample_rate: Of the network.
        window: Seconds of a window.
        steps_ahead: K.
        chance: Loss of guessing.
        negatives: Negatives of each frame; 0 for all frames of the batch.
        sampling: Where a batch comes from.
        scope: Whether negatives come from the batch of one process or of all.
        views: What was augmented, and how, in words.
        preparation: What was resampled, averaged, joined and skipped, in words.
        parameters: Of the network.
        rows: Of metrics.jsonl, the untrained network first.
        best: The row whose weights were kept.
        known_speakers: Held-out speakers who were learned from too.
        by: What it was chosen by; empty where nothing was measured.
        items: Number of items, by kind of ABX error; empty for none.
        mfcc: ABX errors of MFCC on the same items.
        without: Kinds of ABX errors that could not be computed, and why.
        stopped: Whether training ended early.
        ms_per_step: Time of a step, augmentation included.
        recipe: All that was settled of training, by option or by preset.
    """

    source: str
    hours: float
    held_out_hours: float
    speakers: tuple[tuple[str, int, float, int, int], ...]
    sample_rate: int
    window: float
    steps_ahead: int
    chance: float
    negatives: int
    sampling: str
    scope: Scope
    views: str
    preparation: tuple[str, ...]
    parameters: int
    rows: tuple[dict[str, Any], ...]
    best: dict[str, Any]
    known_speakers: int
    by: str
    items: Mapping[Speaker, int]
    mfcc: Mapping[str, float]
    without: Mapping[str, str]
    stopped: bool
    ms_per_step: float
    recipe: Mapping[str, Any]

    def of_steps(self, row: Mapping[str, float], name: str) -> list[float]:
        """Return a figure of a row for each step ahead; empty where it was not measured."""
        names = [f"{name}_{k}" for k in range(1, self.steps_ahead + 1)]
        return [row[each] for each in names] if names[0] in row else []

    def results(self) -> dict[str, Any]:
        """Return the figures for `results.json`."""
        best = self.best
        return {
            "hours": self.hours,
            "held_out_hours": self.held_out_hours,
            "speakers": {
                name: {"recordings": n, "hours": h, "windows": w, "held_out": v}
                for name, n, h, w, v in self.speakers
            },
            "parameters": self.parameters,
            "steps": self.rows[-1]["step"],
            "epochs": self.rows[-1]["epoch"],
            "stopped_early": self.stopped,
            "chosen_by": self.by,
            "best": {"step": best["step"], "epoch": best["epoch"]},
            "chance_loss": self.chance,
            **{
                name: {"mean": best[name], "by_step_ahead": self.of_steps(best, name)}
                for name in ("loss", "accuracy", "valid_loss", "valid_accuracy")
                if name in best
            },
            "same_speaker_negatives": best["same_speaker"],
            "abx": {
                kind: {
                    "error": best[f"abx_{kind}"],
                    "stderr": best.get(f"abx_{kind}_stderr"),
                    "untrained": self.rows[0].get(f"abx_{kind}"),
                    "mfcc": self.mfcc[f"abx_{kind}"],
                    "items_without_frame": best[f"abx_{kind}_dropped"],
                }
                for kind in KINDS
                if f"abx_{kind}" in best
            },
            "abx_items": dict(self.items),
            "abx_without": dict(self.without),
            "ms_per_step": self.ms_per_step,
            "recipe": dict(self.recipe),
            "preparation": list(self.preparation),
        }


def found_by(
    corpus: Corpus,
    task: Task,
    material: Material,
    plan: Plan,
    done: Progress,
    rows: Sequence[dict[str, Any]],
    *,
    source: str,
    batch: int,
    processes: int,
    augmented: tuple[str, str | None, str | None],
    mfcc: Mapping[str, float],
) -> Finding:
    """Gather what a run found.

    Args:
        corpus: Its recordings.
        task: The trained network.
        material: Its samples and batches.
        plan: How it was trained.
        done: How that went.
        rows: Of metrics.jsonl, the untrained network first.
        source: The recordings, as given.
        batch: Windows a step and process.
        processes: How many.
        augmented: Which copy, by which effects, with noise from where.
        mfcc: ABX errors of MFCC on the same items.
    """
    learn, held, sampler, model = corpus.learn, corpus.held, material.sampler, task.model
    window = task.samples / corpus.sample_rate
    return Finding(
        source=source,
        hours=learn.hours,
        held_out_hours=held.hours,
        speakers=by_speaker(learn, held, sampler),
        sample_rate=corpus.sample_rate,
        window=window,
        steps_ahead=task.loss.steps,
        chance=task.chance(batch),
        negatives=task.negatives or 0,
        sampling=sampler.mode,
        scope=task.loss.scope,
        views=_views(*augmented),
        preparation=material.preparation,
        parameters=sum(p.numel() for p in model.parameters()),
        rows=tuple(rows),
        best=done.best or rows[-1],
        known_speakers=len(set(learn.speakers or ()) & set(held.speakers or ())),
        by=material.validation.by,
        items={kind: len(some) for kind, some in corpus.items.items()},
        mfcc=mfcc,
        without=corpus.missing,
        stopped=plan.patience is not None and done.worse >= plan.patience,
        ms_per_step=1000 * done.seconds / max(done.step, 1),
        recipe={
            **{name: value for name, value in model.config.items() if name != "window"},
            "window, s": window,
            "batch": batch,
            "processes": processes,
            "sampling": sampler.mode,
            "straddle": sampler.straddle,
            "candidates": task.loss.candidates,
            "negatives": task.negatives,
            "exclude positive": task.loss.exclude_positive,
            "negatives scope": task.loss.scope,
            "augment": augmented[0],
            "chain": augmented[1],
            "learning rate": plan.schedule.peak,
            "ramp, steps": plan.schedule.ramp,
            "halved after, epochs": plan.schedule.halve,
            "epochs at most": plan.epochs,
            "steps at most": plan.steps,
            "clip": plan.clip,
        },
    )


def _views(augment: str, chain: str | None, noise: str | None) -> str:
    """Say what was augmented, and how."""
    if augment == "none":
        return "Nothing was augmented."
    copies = {
        "past": "what it predicts from, and not what is predicted",
        "future": "what is predicted, and not what it predicts from",
        "both": "what it predicts from and what is predicted, each its own way",
        "same": "each window, before anything else",
    }
    by = f"{chain}, noise from {noise}" if noise else chain
    return f"Augmented was {copies[augment]}, by {by}."
