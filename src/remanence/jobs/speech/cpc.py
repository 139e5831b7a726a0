"""`remanence speech cpc`: features of speech from recordings without transcripts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from remanence.errors import InputError
from remanence.jobs.options import check_options
from remanence.jobs.speech.augment_noise import Chains, chain_text
from remanence.jobs.speech.cpc_audio import (
    Waves,
    by_speaker,
    open_speech,
    prepared,
    split,
    usual_rate,
)
from remanence.jobs.speech.cpc_report import (
    Finding,
    beside_mfcc,
    build_report,
    sentence,
    views,
)
from remanence.jobs.speech.cpc_training import STAGE, Plan, train
from remanence.jobs.speech.cpc_validation import (
    KINDS,
    Validation,
    chosen_by,
    fixed_batches,
    open_items,
)
from remanence.kit.devices import launch, seed_all
from remanence.kit.progress import say
from remanence.kit.run import run_folder
from remanence.kit.words import counted
from remanence.speech.cpc.loss import Candidates, CPCLoss
from remanence.speech.cpc.model import CPC, Predictor
from remanence.speech.cpc.presets import PRESETS
from remanence.speech.cpc.sampler import Mode, WindowSampler
from remanence.speech.cpc.training import Contrast, Schedule
from remanence.speech.wavaugment.chain import Chain, TwoView
from remanence.speech.wavaugment.random import RandomChunkSwap

Preset = Literal["cpc2", "small"]
Augment = Literal["none", "past", "future", "both", "same"]
Precision = Literal["auto", "32-true", "bf16-mixed"]
VALID_FRACTION = 0.05
# Beside the sizes of a network: seconds of a window, and what else trains it.
RECIPES: dict[Preset, dict[str, Any]] = {
    "cpc2": {"window": 1.28, "negatives": 128, "lr": 2e-4, "epochs": 200},
    "small": {"window": 0.9, "negatives": 64, "lr": 1e-3, "max_steps": 3000},
}
RAMP_EPOCHS, RAMP_STEPS = 10, 100  # of cpc2 as published; of small


@dataclass(frozen=True)
class Trained:
    """What `cpc` leaves behind.

    Attributes:
        out: Run folder; `CPC.load` opens it.
        steps: Steps trained.
        best_epoch: After which the weights kept were taken.
        losses: Of each step ahead on held-out windows with these weights; empty where there are
            none.
        accuracies: As `losses`.
        chance: Loss of guessing.
        abx: ABX errors of these weights, `within` and `across`, where they were asked for.
        ms_per_step: Time of a step.
    """

    out: Path
    steps: int
    best_epoch: int
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    chance: float
    abx: Mapping[str, float]
    ms_per_step: float


def cpc(
    audio: str,
    *,
    out: Path,
    names: str | None = None,
    valid: str | None = None,
    valid_fraction: float | None = None,
    augment: Augment = "past",
    chain: str | None = None,
    noise: str | None = None,
    preset: Preset = "cpc2",
    sample_rate: Literal[8000, 16000] | None = None,
    window: float | None = None,
    batch_size: int = 8,
    negatives: int | None = None,
    candidates: Candidates = "sampled",
    exclude_positive: bool = False,
    steps_ahead: int | None = None,
    predictor: Predictor = "multihead",
    sampling: Mode = "speaker",
    straddle: bool = False,
    epochs: int | None = None,
    max_steps: int | None = None,
    lr: float | None = None,
    ramp: int | None = None,
    halve_lr_every: int | None = None,
    clip: float = 1000.0,
    items: Path | None = None,
    abx_every: int = 1,
    abx_items: int = 2000,
    patience: int | None = None,
    precision: Precision = "auto",
    devices: int = 1,
    checkpoint_steps: int = 1000,
    seed: int = 0,
    resume: bool = False,
) -> Trained:
    """Learn features of speech from recordings without transcripts (CPC, WavAugment).

    A network turns a waveform into a vector every 10 ms and learns to tell which vectors come next
    from those that do not. Augmenting only what it predicts from makes the features care less for
    speaker and room. Give 8 to 100 hours of speech; minutes do for --preset small. The folder OUT
    serves speech extract, probe and abx.

    Args:
        audio: Recordings to learn from: a folder, a file, a quoted glob or a .txt list.
        out: Run folder to create.
        names: Regular expression for the beginning of a recording's name, with groups speaker, and
            phone for ABX errors of whole recordings: `(?P<phone>[0-9])_(?P<speaker>[a-z]+)_`. By
            default the first folder of a recording names its speaker.
        valid: Recordings to measure on; by default some of AUDIO are held out.
        valid_fraction: Share of the recordings of each speaker to hold out, 0 for none; a twentieth
            if not given, or more where that is less than a window.
        augment: Which copy of a window is augmented: past, what is predicted from; future, what is
            predicted; both, each its own way; same, both the same way; none.
        chain: Effects, or a recipe's name: see speech augment. By default pitch,reverb, and with
            --noise cpc2, which adds noise between them.
        noise: Recordings of noise, for the steps of the chain that mix it in.
        preset: Sizes and training: cpc2, as published; small, for minutes of speech and a
            processor.
        sample_rate: Rate to bring recordings to, in Hz; by default 8000 where all are at most that,
            else 16000.
        window: Seconds of a window; of cpc2 1.28, of small 0.9.
        batch_size: Windows a step, on each device; negatives come from the same device.
        negatives: Negatives of each frame; of cpc2 128, of small 64.
        candidates: sampled, or all frames of the batch; the loss then has another scale.
        exclude_positive: Leave out negatives that are the true frame.
        steps_ahead: Frames of 10 ms that are predicted; of cpc2 12, of small 8.
        predictor: multihead, shared by all steps ahead; separate, a transformer each, as before
            CPC2; linear.
        sampling: Where a batch comes from: one speaker, one sequence (recording), uniform over all,
            or sequential, in order.
        straddle: Let windows run from one recording of a speaker into the next, as the published
            code does; otherwise only recordings shorter than a window are joined.
        epochs: Passes over the recordings at most; of cpc2 200.
        max_steps: Steps at most; of small 3000.
        lr: Peak learning rate of Adam, multiplied by the number of processes; of cpc2 2e-4, of
            small 1e-3.
        ramp: Steps in which it rises; by default ten epochs of cpc2, 100 steps of small, and no
            more than a tenth of all steps.
        halve_lr_every: Epochs after which the learning rate is halved, again and again.
        clip: Largest norm of the gradient.
        items: Item file with what ABX errors are to tell apart in the held-out recordings: a
            header, then 'file onset offset phone prev next speaker' a line. The weights with the
            least error are kept; without items those with the best held-out accuracy.
        abx_every: Epochs between ABX errors.
        abx_items: About so many items at most, of those in held-out recordings; always the same.
        patience: Measurements without a better one after which training stops.
        precision: Number format of convolutions and attention; auto is bf16-mixed on a GPU that has
            it. The LSTM and the loss are float32 in any case.
        devices: Devices on this machine; under torchrun the processes it started.
        checkpoint_steps: Steps between checkpoints, beside those after each epoch.
        seed: Seed.
        resume: Go on with the interrupted run in OUT.partial.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("out", "resume")}
    check_options(options)
    _check(options)
    recipe: dict[str, Any] = dict(RECIPES[preset])
    if epochs is not None or max_steps is not None:
        recipe |= {"epochs": epochs, "max_steps": max_steps}
    recipe |= {
        name: options[name] for name in ("window", "negatives", "lr") if options[name] is not None
    }
    written = None
    if augment != "none":
        usual_chain = "cpc2" if noise else "pitch,reverb"
        written = chain_text(usual_chain if chain is None else chain, noise)

    fabric = launch(devices, precision)
    with (
        warnings.catch_warnings(),
        run_folder(
            out, "speech cpc", options, seed=seed, resume=resume, rank=fabric.global_rank
        ) as run,
    ):
        # The encoder's products leave gradients in another order than distributed training likes.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        speech = open_speech(audio, names, speakers=sampling == "speaker")
        rate = sample_rate or usual_rate(speech.recordings)
        learn, held = split(speech, valid, valid_fraction, names, seed, window=recipe["window"])
        found, missing = open_items(items, names, held, abx_items, seed)

        sizes = dict(PRESETS[preset]) | {"predictor": predictor, "sample_rate": rate}
        sizes["steps"] = steps_ahead or sizes["steps"]
        frames = round(recipe["window"] * 100)
        seed_all(seed)
        model = CPC(**sizes | {"window": frames})
        samples = frames * model.encoder.stride
        loss = CPCLoss(
            model.config["steps"],
            recipe["negatives"],
            candidates=candidates,
            exclude_positive=exclude_positive,
        )
        chains = Chains(noise, fabric.device)
        view = None
        if augment != "none" and written is not None:
            built = chains.build(written, rate, show=run.first).chain
            _check_aligned(built, written)
            view = TwoView(built, augment)

        waves = Waves(learn.recordings, rate, show=run.first)
        sampler = WindowSampler(
            waves.lengths,
            learn.speakers,
            window=samples,
            batch=batch_size,
            mode=sampling,
            straddle=straddle,
            seed=seed,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )
        held_waves = Waves(held.recordings, rate, show=False) if run.first else None
        batches = fixed_batches(
            held,
            held_waves.lengths if held_waves else [],
            window=samples,
            batch=batch_size,
            one_speaker=sampling == "speaker",
        )
        validation = Validation(
            held,
            held_waves,
            batches,
            loss,
            found,
            seed,
            by=fabric.broadcast(chosen_by(found, batches)),
        )
        if patience is not None and not validation.by:
            raise InputError(
                f"--patience {patience}: nothing is held out to measure on; give --valid, or more "
                "recordings"
            )
        preparation = [*prepared(learn, held, waves, held_waves, sampler), *chains.said]
        if held.recordings and not batches:
            preparation.append(
                f"{counted(len(held.recordings), 'held-out recording')}, of no speaker a whole "
                "window: loss and accuracy are not measured on them"
            )
        if run.first:
            for remark in preparation:
                say(remark)

        epoch_steps = len(sampler)
        total = min(
            (recipe.get("epochs") or math.inf) * epoch_steps, recipe.get("max_steps") or math.inf
        )
        usual = RAMP_STEPS if preset == "small" else RAMP_EPOCHS * epoch_steps
        plan = Plan(
            Schedule(
                recipe["lr"] * fabric.world_size,
                int(min(usual, total / 10)) if ramp is None else ramp,
                halve_lr_every,
            ),
            recipe.get("epochs"),
            recipe.get("max_steps"),
            clip,
            patience,
            abx_every,
            checkpoint_steps,
            seed,
        )
        contrast = Contrast(model, loss)
        done = train(fabric, run, model, contrast, view, sampler, waves, validation, plan)
        rows = fabric.broadcast(run.metrics(STAGE) if run.first else [])
        best = done.best or rows[-1]
        chance = (
            math.log(1 + loss.negatives)
            if candidates == "sampled"
            else math.log(batch_size * frames - loss.steps + 1)
        )
        finding = Finding(
            source=audio,
            hours=learn.hours,
            held_out_hours=held.hours,
            speakers=by_speaker(learn, held, sampler),
            sample_rate=rate,
            window=samples / rate,
            steps_ahead=model.config["steps"],
            chance=chance,
            negatives=loss.negatives if candidates == "sampled" else 0,
            sampling=sampling,
            views=views(augment, written, noise),
            preparation=tuple(preparation),
            parameters=sum(p.numel() for p in model.parameters()),
            rows=tuple(rows),
            best=best,
            known_speakers=len(set(learn.speakers or ()) & set(held.speakers or ())),
            by=validation.by,
            items={kind: len(some) for kind, some in found.items()},
            mfcc=fabric.broadcast(validation.baseline()),
            without=missing,
            stopped=patience is not None and done.worse >= patience,
            ms_per_step=1000 * done.seconds / max(done.step, 1),
            recipe={
                **{name: value for name, value in model.config.items() if name != "window"},
                "window, s": samples / rate,
                "batch": batch_size,
                "processes": fabric.world_size,
                "sampling": sampling,
                "candidates": candidates,
                "negatives": loss.negatives if candidates == "sampled" else None,
                "augment": augment,
                "chain": written,
                "learning rate": plan.schedule.peak,
                "ramp, steps": plan.schedule.ramp,
                "halved after, epochs": halve_lr_every,
                "epochs at most": plan.epochs,
                "steps at most": plan.steps,
                "clip": clip,
            },
        )
        if run.first:
            model.save(run.partial)
            run.write_results(finding.results())
            report = build_report(finding)
            report.section("Run")
            report.facts(run.summary())
            report.write(run.path("report.html"))
            say(sentence(finding))
            if finding.items:
                say(beside_mfcc(finding))
    return Trained(
        out,
        done.step,
        best["epoch"],
        tuple(finding.of_steps(best, "valid_loss")),
        tuple(finding.of_steps(best, "valid_accuracy")),
        chance,
        {kind: best[f"abx_{kind}"] for kind in KINDS if f"abx_{kind}" in best},
        finding.ms_per_step,
    )


def _check(options: Mapping[str, Any]) -> None:
    for name, kind in (
        ("augment", Augment),
        ("preset", Preset),
        ("sampling", Mode),
        ("precision", Precision),
    ):
        if options[name] not in get_args(kind):
            raise InputError(
                f"--{name} {options[name]}: give one of {', '.join(map(str, get_args(kind)))}"
            )
    if options["sample_rate"] not in (None, 8000, 16000):
        raise InputError(f"--sample-rate {options['sample_rate']}: give 8000 or 16000")
    for name in ("chain", "noise"):
        if options["augment"] == "none" and options[name] is not None:
            raise InputError(f"--{name}: --augment none takes none; leave one of them out")
    if options["valid"] is not None and options["valid_fraction"] is not None:
        raise InputError("--valid-fraction: --valid says what to measure on; leave one out")


def _check_aligned(chain: Chain, written: str) -> None:
    moving = [m for m in chain.modules() if isinstance(m, RandomChunkSwap)]
    if chain.changes_ends or moving:
        raise InputError(
            f"--chain {written}: past and future must stay aligned; leave out effects that move "
            "speech in time (speed, tempo, splice, swap)"
        )
