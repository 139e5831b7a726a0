"""`remanence speech extract`: features of recordings, a file each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.options import check_options
from remanence.jobs.speech.encoders import Encoder, open_encoder
from remanence.jobs.speech.feature_files import FEATURES, read_features
from remanence.jobs.speech.features import Features, encode, encoded, read_waves
from remanence.jobs.speech.shares import check_share, share_folder
from remanence.kit.audio import Heard
from remanence.kit.devices import launch, sum_over_processes
from remanence.kit.progress import bar, say
from remanence.kit.recordings import Recording, list_recordings
from remanence.kit.report import Report
from remanence.kit.run import RunFolder, run_folder
from remanence.kit.words import counted, duration

Format = Literal["npy", "npz"]
THREADS, AHEAD = 4, 8  # that read recordings, and batches that they are ahead
SHOWN = 500  # frames of the picture


@dataclass(frozen=True, eq=False)
class Extracted:
    """What `extract` leaves behind.

    Attributes:
        out: Run folder; features lie in `out / "features"`.
        results: What `results.json` holds; on other ranks than the first, nothing.
    """

    out: Path
    results: dict[str, Any]


def extract(
    audio: str,
    *,
    model: str,
    out: Path,
    layer: str = "context",
    chunk: float | None = None,
    strict: bool = False,
    seq_norm: bool = False,
    format: Format = "npy",  # noqa: A002  # the option's name
    frame_rate: float | None = None,
    sample_rate: int | None = None,
    batch_size: int = 16,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    rank: int | None = None,
    world_size: int | None = None,
    resume: bool = False,
) -> Extracted:
    """Write the features of recordings: OUT/features/NAME.npy, float32 (frames, dimensions).

    A recording's features do not depend on the others. OUT serves speech probe and abx, all shares
    of it where --rank shared the work out.

    Args:
        audio: Recordings: a folder, a file, a quoted glob or a .txt list.
        model: A run of speech cpc; mfcc; or FILE.py:FUNCTION that returns a torch module from
            waves (B, T) to features (B, S, D).
        out: Run folder to create.
        layer: Of a CPC network: context, encoder, or the number of a context layer.
        chunk: Seconds that a CPC network sees at a time, as the published code does (4); by default
            the features are those of one pass over the whole recording.
        strict: Let the last chunk be as long as the others, over the end of the one before.
        seq_norm: Subtract the mean over time and divide by the deviation, of each chunk or the
            whole.
        format: npy; or npz, which holds features and times, the centres of frames in seconds.
        frame_rate: Frames a second of FILE.py:FUNCTION; 100 if not given.
        sample_rate: Sample rate that FILE.py:FUNCTION takes, 16000 if not given; of mfcc, each
            recording's own.
        batch_size: Recordings of similar length at a time.
        device: Where to compute.
        rank: Do only this share of the work, from 0; it goes to OUT-RANK-of-WORLD_SIZE. torchrun
            needs neither and writes one folder.
        world_size: Number of shares.
        resume: Go on with the interrupted run in OUT.partial; what is written there stays.
    """
    options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("out", "resume")}
    _check(options)
    fabric = launch(1, "32-true", device)
    out = share_folder(out, rank, world_size)
    with run_folder(out, "speech extract", options, resume=resume, rank=fabric.global_rank) as run:
        fabric.barrier()  # the folder is there
        encoder = open_encoder(
            model,
            layer=layer,
            chunk=chunk,
            strict=strict,
            seq_norm=seq_norm,
            frame_rate=frame_rate,
            sample_rate=sample_rate,
            device=fabric.device,
        )
        recordings = sorted(list_recordings(audio), key=lambda r: (r.seconds, r.name))
        if rank is not None and world_size is not None:
            recordings = recordings[rank::world_size]
        if not recordings:
            raise InputError(
                f"--world-size {world_size}: there are fewer recordings; --rank {rank} has none"
            )
        mine = recordings[fabric.global_rank :: fabric.world_size]
        features = encoded(encoder, recordings, keep=False, show=fabric.is_global_zero)
        done = [r for r in mine if _file(run, r, format).is_file()]
        left = [r for r in mine if not _file(run, r, format).is_file()]
        frames = sum(
            len(features.check(r.name, read_features(_file(run, r, format)))) for r in done
        )
        started = time.perf_counter()
        heard = Heard()
        frames += _write(
            run, encoder, features, left, format, batch_size, heard,
            show=fabric.is_global_zero, done=len(done),
        )  # fmt: skip
        seconds = time.perf_counter() - started
        spent = torch.tensor(
            [sum(r.seconds for r in left), len(done), frames, heard.full_scale, heard.silent]
        ).double()
        if fabric.world_size > 1:
            spent = sum_over_processes(fabric, spent).cpu()
        fabric.barrier()
        results: dict[str, Any] = {}
        if run.first:
            listened, *counts = spent.tolist()
            skipped, frames, heard.full_scale, heard.silent = map(int, counts)
            for remark in heard.remarks():
                say(remark)
            shown = recordings[len(recordings) // 2]
            example = features.check(shown.name, read_features(_file(run, shown, format)))
            results = {
                "model": encoder.name,
                "frame_rate": encoder.rate,
                "sample_rate": encoder.sample_rate,
                "files": len(recordings),
                "frames": frames,
                "dimensions": example.shape[1],
                "audio_seconds": sum(r.seconds for r in recordings),
                "already_there": skipped,
                "seconds": round(seconds, 3),
                "real_time_factor": seconds / listened if listened else None,
                "times_real_time": listened / seconds if listened else None,
                "remarks": [*features.remarks, *heard.remarks()],
            }
            run.write_results(results)
            report = _report(audio, results, shown.name, example)
            report.section("Run")
            report.facts(run.summary())
            report.write(run.path("report.html"))
            say(
                f"{counted(results['files'], 'file')}, {results['frames']:,} frames of "
                f"{results['dimensions']} dimensions, in {duration(seconds)}"
            )
    return Extracted(out, results)


def _check(options: dict[str, Any]) -> None:
    """Refuse options that cannot work, before anything is opened."""
    check_options(options)
    check_share(options["rank"], options["world_size"])
    rate = options["sample_rate"]
    if rate is not None and not 100 <= rate <= 1_000_000:
        raise InputError(f"--sample-rate {rate}: give samples a second, 100 to 1,000,000")


def _file(run: RunFolder, recording: Recording, form: Format) -> Path:
    return run.path(FEATURES) / f"{recording.name}.{form}"


def _write(
    run: RunFolder,
    encoder: Encoder,
    features: Features,
    recordings: Sequence[Recording],
    form: Format,
    batch_size: int,
    heard: Heard,
    *,
    show: bool,
    done: int,
) -> int:
    """Write the features of recordings, each file whole or not at all; returns the frames."""
    count, begun = 0, False
    with bar("extract", len(recordings) + done, done=done, show=show) as progress:
        for batch, waves in _ahead(encoder, recordings, batch_size):
            for wave in waves:
                heard.add(wave)
            for recording, frames in zip(batch, encode(encoder, batch, waves), strict=True):
                checked = features.check(recording.name, frames).numpy()
                target = _file(run, recording, form)
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f".{target.name}.partial")
                with part.open("wb") as stream:
                    if form == "npy":
                        np.save(stream, checked)
                    else:
                        times = (np.arange(len(checked)) + 0.5) / encoder.rate
                        np.savez(stream, features=checked, times=times)
                part.replace(target)
                count += len(checked)
            if not begun:  # from here on an interrupted run is worth keeping
                run.save_state("extract", {"begun": True})
                begun = True
            progress.advance(len(batch))
    return count


def _ahead(
    encoder: Encoder, recordings: Sequence[Recording], size: int
) -> Iterator[tuple[Sequence[Recording], list[Tensor]]]:
    """Yield batches and their waves, the next ones being read meanwhile."""
    batches = [recordings[i : i + size] for i in range(0, len(recordings), size)]
    waiting: deque[tuple[Sequence[Recording], Future[list[Tensor]]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(read_waves, encoder, batch)))
                if len(waiting) > AHEAD:
                    ready, future = waiting.popleft()
                    yield ready, future.result()
            while waiting:
                ready, future = waiting.popleft()
                yield ready, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _report(audio: str, results: dict[str, Any], name: str, features: Tensor) -> Report:
    report = Report(
        f"Features of {audio}", f"{results['model']}, {results['frame_rate']:g} frames a second"
    )
    fast = results["times_real_time"]
    report.text(
        f"{counted(results['files'], 'recording')}, {duration(results['audio_seconds'])}, gave "
        f"{results['frames']:,} frames of {results['dimensions']} dimensions"
        + (f", {fast:,.0f} times faster than real time." if fast else ".")
        + (
            f" From an interrupted run there already: {counted(results['already_there'], 'file')}."
            if results["already_there"]
            else ""
        )
    )
    for remark in results["remarks"]:
        report.text(f"{remark[0].upper()}{remark[1:]}.")
    frames = features[:SHOWN].float().numpy()
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    low, high = np.quantile(frames, [0.02, 0.98])
    end = len(frames) / results["frame_rate"]
    axes.imshow(
        frames.T, aspect="auto", origin="lower", cmap="viridis", vmin=low, vmax=high,
        extent=(0, end, 0, frames.shape[1]), interpolation="nearest",
    )  # fmt: skip
    axes.set_xlabel("seconds")
    axes.set_ylabel("dimension")
    report.figure(
        figure,
        f"The features of {name}, a recording of middling length, dark low and bright high.",
        "a picture of numbers over time, one row a dimension",
    )
    return report
