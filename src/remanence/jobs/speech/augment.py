"""`remanence speech augment`: recordings with another pitch, noise and room (arXiv 2007.00991)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import soundfile
import torch

from remanence.errors import InputError
from remanence.jobs.options import check_options
from remanence.jobs.speech.augment_batches import FLOATS, Augmenting
from remanence.jobs.speech.augment_noise import Chains, chain_text
from remanence.jobs.speech.augment_plan import (
    Batch,
    Output,
    fresh_outputs,
    plan,
    replayed_outputs,
)
from remanence.jobs.speech.augment_report import build_report
from remanence.jobs.speech.augment_results import results_of, write_params
from remanence.jobs.speech.shares import check_share, share_folder
from remanence.kit.audio import treatment
from remanence.kit.devices import launch
from remanence.kit.progress import bar, say
from remanence.kit.recordings import list_recordings
from remanence.kit.run import run_folder
from remanence.kit.words import counted, duration
from remanence.speech.wavaugment.random import RandomBabble


@dataclass(frozen=True, eq=False)
class Augmented:
    """What `augment` leaves behind.

    Attributes:
        out: Run folder; recordings lie in `out / "audio"`, what was drawn in `params.jsonl`.
        results: What `results.json` holds; on other ranks than the first, nothing.
    """

    out: Path
    results: dict[str, Any]


def augment(
    audio: str,
    *,
    out: Path,
    chain: str | None = None,
    noise: str | None = None,
    copies: int = 1,
    sample_rate: int | None = None,
    replay: Path | None = None,
    format: Literal["wav", "flac"] = "wav",  # noqa: A002  # the option's name
    subtype: str = "PCM_16",
    overflow: Literal["clip", "lower"] = "clip",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_seconds: float = 120.0,
    piece_seconds: float = 60.0,
    rank: int | None = None,
    world_size: int | None = None,
    skip_broken: bool = False,
    seed: int = 0,
    resume: bool = False,
) -> Augmented:
    """Write copies of recordings with another pitch, noise and room, and the words where they were.

    OUT/audio keeps the paths of AUDIO; OUT/params.jsonl has a line for each file with all that was
    drawn, from which --replay makes it again. What is drawn for a file depends on the seed, its
    name and the number of its copy alone.

    A chain is effects with options, in order: pitch[-300:300] (cents), noise[5:15] (dB),
    reverb[room=0:100], bandreject, drop[100] (ms), clip[0.5:1], and more; each takes p=0.5 to touch
    half of the recordings. oneof[[drop,clip]] takes one of several. A noise step may name its own
    folder: noise[5:15,dir=street]. Of all effects only speed, tempo and splice change lengths: a
    file becomes longer or shorter than its recording, and keeps its end.

    Memory beside the program's own: the noise, 13 bytes for each sample of the longest recording
    (an hour at 16 kHz: 0.8 GB) and 100 for each of --batch-seconds (two minutes: 0.2 GB).

    Args:
        audio: A recording, a folder, a quoted glob, or a .txt list with a path a line.
        out: Run folder to create.
        chain: Effects, in order, with what to draw their strength from: pitch[-300:300] (cents),
            noise[5:15] (dB), reverb[room=0:100] (%), bandreject, drop[100] (ms), clip[0.5:1], ...;
            p=0.5 in brackets touches half of the recordings. Or a recipe: cpc2 (pitch, noise,
            reverberation, as published; taken if not given), cpc2-community, wav2aug-top3 or -top6.
        noise: Recordings of noise, written as AUDIO is, for noise steps without dir=.
        copies: Copies of each recording, each with its own draw.
        sample_rate: Sample rate of what is written; each recording's own if not given.
        replay: The params.jsonl of a run: make its files again, of the same AUDIO, --noise,
            --format, --subtype, --overflow and --piece-seconds.
        format: Of the files.
        subtype: Sample format, in libsndfile's words: PCM_16, PCM_24, and for wav FLOAT, which
            keeps what lies beyond full scale.
        overflow: Where a wave ends up beyond full scale: clip cuts its samples off there, lower
            makes the whole recording quieter.
        device: Where to compute.
        batch_seconds: Audio augmented at once.
        piece_seconds: Longer recordings are augmented in pieces, each with its own draw,
            cross-faded over 20 ms.
        rank: Do only this share of the work, from 0; it goes to OUT-RANK-of-WORLD_SIZE. torchrun
            needs neither and writes one folder.
        world_size: Number of shares.
        skip_broken: Leave unreadable recordings out and count them.
        seed: Seed.
        resume: Go on with the interrupted run in OUT.partial, with the same options.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("out", "resume")}
    text = _check(options)
    fabric = launch(1, "32-true", device)
    out = share_folder(out, rank, world_size)
    with run_folder(
        out, "speech augment", options, seed=seed, resume=resume, rank=fabric.global_rank
    ) as run:
        show = fabric.is_global_zero
        fabric.barrier()  # the folder is there
        broken: dict[str, str] = {}
        recordings = list_recordings(audio, broken=broken if skip_broken else None)
        if not recordings:
            raise _none_left(audio, broken)
        if replay is None:
            outputs = fresh_outputs(recordings, text, copies, sample_rate)
        else:
            outputs = replayed_outputs(replay, recordings, broken)
        chains = Chains(noise, fabric.device)
        _rehearse(chains, outputs, piece_seconds, show=show)
        batches = plan(outputs, chains.most_samples, batch_seconds, piece_seconds)
        if rank is not None and world_size is not None:
            batches = batches[rank::world_size]
        if not batches:
            raise InputError(
                f"--world-size {world_size}: there is less work than that; --rank {rank} has none"
            )
        remarks = _remarks(outputs, piece_seconds) + chains.said
        for remark in remarks if show else []:
            say(remark)
        work = Augmenting(
            run.partial,
            chains,
            fabric.device,
            f".{format}",
            subtype,
            lower=overflow == "lower",
            piece_seconds=piece_seconds,
            seed=seed,
            skip_broken=skip_broken,
            resume=resume,
        )
        mine = batches[fabric.global_rank :: fabric.world_size]
        with bar("augment", sum(len(b.outputs) for b in mine), show=show) as progress:
            for done in work.run(mine):
                progress.advance(done)
        fabric.barrier()
        results: dict[str, Any] = {}
        if run.first:
            rows = _ordered(work, batches, outputs)
            broken |= {row["recording"]: row["broken"] for row in rows if "broken" in row}
            rows = [row for row in rows if "broken" not in row]
            if not rows:
                raise _none_left(audio, broken)
            write_params(run.path("params.jsonl"), rows)
            seconds = sum(work.seconds(batch) for batch in batches)
            results = results_of(rows, broken, chains, seconds, floats=subtype in FLOATS)
            results["remarks"] = remarks + results["remarks"]
            run.write_results(results)
            build_report(run, audio, rows, outputs, chains, results).write(run.path("report.html"))
            for remark in results["remarks"][len(remarks) :]:
                say(remark)
            say(
                f"{counted(results['outputs'], 'recording')}, "
                f"{duration(3600 * results['hours'])}, in {duration(seconds)}: "
                f"{results['times_real_time']:.0f} times real time"
            )
    return Augmented(out, results)


def _check(options: dict[str, Any]) -> str:
    """Refuse options that cannot work, before anything is opened; returns the chain's text."""
    check_options(options)
    check_share(options["rank"], options["world_size"])
    form, subtype = options["format"], options["subtype"]
    if not soundfile.check_format(form.upper(), subtype):
        known = ", ".join(soundfile.available_subtypes(form.upper()))
        raise InputError(f"--subtype {subtype}: .{form} holds one of {known}")
    if options["replay"] is not None:
        for name, unset in {"chain": None, "sample_rate": None, "copies": 1, "seed": 0}.items():
            if options[name] != unset:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag}: --replay draws nothing new; leave {flag} out")
        return ""
    return chain_text("cpc2" if options["chain"] is None else options["chain"], options["noise"])


def _none_left(audio: str, broken: dict[str, str]) -> InputError:
    first = next(iter(broken.values()))
    return InputError(f"{audio}: none of {counted(len(broken), 'recording')} is whole: {first}")


def _rehearse(
    chains: Chains, outputs: Sequence[Output], piece_seconds: float, *, show: bool
) -> None:
    """Build every chain, and run it on a little silence of every number of channels."""
    kinds = {(o.chain, o.sample_rate, o.recording.channels): o.recording for o in outputs}
    for (text, rate, channels), recording in kinds.items():
        built = chains.build(text, rate, show=show)
        if any(isinstance(effect, RandomBabble) for effect in built.effects.values()):
            raise InputError(
                "--chain: babble mixes whatever shares a batch, and each file here depends on its "
                "own recording alone; take noise[dir=FOLDER] with a folder of speech"
            )
        params = built.chain.sample(1, 64, torch.Generator().manual_seed(0))
        silence = torch.zeros(1, channels, 64, device=chains.device)
        try:
            built.chain.run(silence, torch.tensor([64]), params)
        except InputError as error:
            raise InputError(f"{recording.path}: {error}") from error
    for output in outputs:
        built = chains.build(output.chain, output.sample_rate, show=show)
        if built.chain.changes_ends and output.recording.seconds > piece_seconds:
            raise InputError(
                f"{output.recording.path}: lasts longer than --piece-seconds {piece_seconds:g}, "
                "and the chain changes lengths, which pieces cannot; raise --piece-seconds"
            )


def _remarks(outputs: Sequence[Output], piece_seconds: float) -> list[str]:
    said = []
    used = {o.recording.name: o.recording for o in outputs}
    for rate in sorted({o.sample_rate for o in outputs}):
        own = [used[name] for name in {o.recording.name for o in outputs if o.sample_rate == rate}]
        said += treatment(own, rate, mono=False)
    if long := sum(recording.seconds > piece_seconds for recording in used.values()):
        said.append(
            f"{counted(long, 'recording')} of more than {piece_seconds:g} s: augmented in pieces"
        )
    return said


def _ordered(
    work: Augmenting, batches: Sequence[Batch], outputs: Sequence[Output]
) -> list[dict[str, Any]]:
    """The lines of all batches in the order of the outputs."""
    rows = {row["output"]: row for batch in batches for row in work.rows(batch)}
    names = [f"audio/{output.name}{work.suffix}" for output in outputs]
    return [rows[name] for name in names if name in rows]
