"""`remanence speech cpc`: features of speech from recordings without transcripts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from remanence.errors import InputError
from remanence.jobs.options import check_options
from remanence.jobs.speech.cpc_finding import Finding, found_by
from remanence.jobs.speech.cpc_recipe import RECIPES, Preset
from remanence.jobs.speech.cpc_report import beside_mfcc, build_report, sentence
from remanence.jobs.speech.cpc_setup import (
    Augment,
    Task,
    build_task,
    load_material,
    open_corpus,
    written_chain,
)
from remanence.jobs.speech.cpc_training import STAGE, Plan, train
from remanence.jobs.speech.cpc_validation import KINDS
from remanence.kit.devices import launch
from remanence.kit.progress import say
from remanence.kit.run import RunFolder, run_folder
from remanence.speech.cpc.loss import Candidates, Scope
from remanence.speech.cpc.model import Predictor
from remanence.speech.cpc.sampler import Mode
from remanence.speech.cpc.training import Contrast, Schedule

Precision = Literal["auto", "32-true", "bf16-mixed"]


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
    negatives_scope: Scope = "local",
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
    memory: float = 4,
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
        batch_size: Windows a step, on each device.
        negatives: Negatives of each frame; of cpc2 128, of small 64.
        candidates: sampled, or all frames of the batch; the loss then has another scale.
        exclude_positive: Leave out negatives that are the true frame.
        negatives_scope: local, negatives from a process's own batch; global, from those of all
            processes, whose speakers differ.
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
        ramp: Steps in which it rises, at each a little; by default ten epochs of cpc2, 100 steps of
            small, and no more than a tenth of all steps.
        halve_lr_every: Epochs after which the learning rate is halved, again and again.
        clip: Largest norm of the gradient.
        items: Item file with what ABX errors are to tell apart in the held-out recordings: a
            header, then 'file onset offset phone prev next speaker' a line. The weights with the
            least error are kept; without items those with the best held-out accuracy.
        abx_every: Epochs between ABX errors.
        abx_items: About so many items at most, of those in held-out recordings; always the same.
        patience: Measurements without a better one after which training stops.
        memory: Gibibytes of samples that each process keeps in memory; windows of what does not fit
            are read from disk. 100 hours at 16 kHz take 11, or 22 where files were resampled or
            hold more than 16 bits.
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
    recipe = RECIPES[preset].changed(
        window=window, negatives=negatives, lr=lr, epochs=epochs, max_steps=max_steps
    )
    written = written_chain(augment, chain, noise)

    fabric = launch(devices, precision)
    with (
        warnings.catch_warnings(),
        run_folder(
            out, "speech cpc", options, seed=seed, resume=resume, rank=fabric.global_rank
        ) as run,
    ):
        # The encoder's products leave gradients in another order than distributed training likes.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        corpus = open_corpus(
            audio,
            names,
            valid=valid,
            valid_fraction=valid_fraction,
            sampling=sampling,
            sample_rate=sample_rate,
            window=recipe.window,
            items=items,
            abx_items=abx_items,
            seed=seed,
        )
        task = build_task(
            preset,
            recipe,
            sample_rate=corpus.sample_rate,
            predictor=predictor,
            steps_ahead=steps_ahead,
            candidates=candidates,
            exclude_positive=exclude_positive,
            scope=negatives_scope if fabric.world_size > 1 else "local",
            augment=augment,
            chain=written,
            noise=noise,
            device=fabric.device,
            seed=seed,
            show=run.first,
        )
        material = load_material(
            fabric,
            corpus,
            task,
            batch=batch_size,
            sampling=sampling,
            straddle=straddle,
            memory=memory,
            seed=seed,
        )
        if patience is not None and not material.validation.by:
            raise InputError(
                f"--patience {patience}: nothing is held out to measure on; give --valid, or more "
                "recordings"
            )
        if run.first:
            for remark in material.preparation:
                say(remark)
        epoch_steps = len(material.sampler)
        plan = Plan(
            Schedule(
                recipe.lr * fabric.world_size,
                recipe.ramp(epoch_steps) if ramp is None else ramp,
                halve_lr_every,
            ),
            recipe.epochs,
            recipe.max_steps,
            clip,
            patience,
            abx_every,
            checkpoint_steps,
            seed,
        )
        done = train(
            fabric,
            run,
            task.model,
            Contrast(task.model, task.loss),
            task.view,
            material.sampler,
            material.waves,
            material.validation,
            plan,
        )
        rows = fabric.broadcast(run.metrics(STAGE) if run.first else [])
        finding = found_by(
            corpus,
            task,
            material,
            plan,
            done,
            rows,
            source=audio,
            batch=batch_size,
            processes=fabric.world_size,
            augmented=(augment, written, noise),
            mfcc=fabric.broadcast(material.validation.baseline()),
        )
        if run.first:
            _tell(run, task, finding)
    best = finding.best
    return Trained(
        out,
        done.step,
        best["epoch"],
        tuple(finding.of_steps(best, "valid_loss")),
        tuple(finding.of_steps(best, "valid_accuracy")),
        finding.chance,
        {kind: best[f"abx_{kind}"] for kind in KINDS if f"abx_{kind}" in best},
        finding.ms_per_step,
    )


def _check(options: Mapping[str, Any]) -> None:
    for name, kind in (
        ("augment", Augment),
        ("preset", Preset),
        ("negatives_scope", Scope),
        ("sampling", Mode),
        ("precision", Precision),
    ):
        if options[name] not in get_args(kind):
            raise InputError(
                f"--{name.replace('_', '-')} {options[name]}: give one of "
                f"{', '.join(map(str, get_args(kind)))}"
            )
    if options["sample_rate"] not in (None, 8000, 16000):
        raise InputError(f"--sample-rate {options['sample_rate']}: give 8000 or 16000")
    for name in ("chain", "noise"):
        if options["augment"] == "none" and options[name] is not None:
            raise InputError(f"--{name}: --augment none takes none; leave one of them out")
    if options["valid"] is not None and options["valid_fraction"] is not None:
        raise InputError("--valid-fraction: --valid says what to measure on; leave one out")
    if options["negatives_scope"] == "global" and options["candidates"] == "all":
        raise InputError(
            "--candidates all: takes the batch of one process, as held-out windows are measured; "
            "leave --negatives-scope global out"
        )


def _tell(run: RunFolder, task: Task, finding: Finding) -> None:
    """Write network, figures and report, and say how it went."""
    task.model.save(run.partial)
    run.write_results(finding.results())
    report = build_report(finding)
    report.section("Run")
    report.facts(run.summary())
    report.write(run.path("report.html"))
    say(sentence(finding))
    if finding.items:
        say(beside_mfcc(finding))
