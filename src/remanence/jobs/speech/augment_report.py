"""The report of `speech augment`: what was drawn, and recordings to see and hear, before, after."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import soundfile
from markupsafe import Markup
from matplotlib.figure import Figure
from scipy.signal import spectrogram
from torch import Tensor

from remanence.jobs.speech.augment_batches import read_at
from remanence.jobs.speech.augment_noise import Chains, applied, effect_name
from remanence.jobs.speech.augment_plan import Output
from remanence.jobs.speech.augment_results import PLACES, draws_of, parameters, realised_snr
from remanence.kit.audio import read_audio
from remanence.kit.report import Cell, Report, Value
from remanence.kit.run import RunFolder
from remanence.kit.words import counted, duration
from remanence.speech.wavaugment.params import Params

EXAMPLES = 5
SHOWN_SECONDS, SHOWN_SAMPLES = 4.0, 2**17  # of an example; its player must fit into the page
RANGE_DB = 80.0
# Units, and words for parameters whose names say too little.
WORDS = {
    "cents": ("shift", "cents"),
    "snr_db": ("signal-to-noise ratio", "dB"),
    "room": ("room size", "%"),
    "reverberance": ("reverberance", "%"),
    "damping": ("damping", "%"),
    "stereo_depth": ("stereo depth", "%"),
    "pre_delay_ms": ("pre-delay", "ms"),
    "wet_db": ("level of the echoes", "dB"),
    "low_hz": ("lower edge", "Hz"),
    "high_hz": ("upper edge", "Hz"),
    "depth_db": ("gain at the band's middle", "dB"),
    "durations": ("silenced", "samples"),
    "db": ("gain", "dB"),
}


class SoundReport(Report):
    """A report that also holds players."""

    def players(self, waves: Mapping[str, Tensor], sample_rate: int, caption: str) -> None:
        """Add a player for each wave, (T,), by its name."""
        shown = Markup("")  # what is joined to it is escaped
        for name, wave in waves.items():
            buffer = io.BytesIO()
            soundfile.write(buffer, wave.clamp(-1, 1).numpy(), sample_rate, "PCM_16", format="WAV")
            source = f"data:audio/wav;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            shown += Markup('<p>{}<br><audio controls preload="none" src="{}"></audio></p>').format(
                name, source
            )
        self._add("figure", svg=shown, caption=caption)

    def html(self) -> str:
        """The page as one string; its policy lets the players play."""
        return super().html().replace("img-src data:", "img-src data:; media-src data:", 1)


def build_report(
    run: RunFolder,
    source: str,
    rows: Sequence[dict[str, Any]],
    outputs: Sequence[Output],
    chains: Chains,
    results: Mapping[str, Any],
) -> Report:
    """Build the report.

    Args:
        run: The run folder, in which the outputs lie.
        source: What was augmented, as given.
        rows: Lines of `params.jsonl`.
        outputs: What they are of, more perhaps.
        chains: The chains.
        results: The figures of the run.
    """
    report = SoundReport(f"Augmented recordings of {source}", "remanence speech augment")
    copies = max(row["copy"] for row in rows) + 1
    report.text(
        f"{counted(results['outputs'], 'file')} of {duration(3600 * results['hours'])} "
        f"{'was' if len(rows) == 1 else 'were'} written, "
        f"{copies} {'copy' if copies == 1 else 'copies'} of each of "
        f"{counted(results['recordings'], 'recording')}, in {duration(results['seconds'])}: "
        f"{results['times_real_time']:.0f} times real time."
    )
    built = {
        row["chain"]: chains.build(row["chain"], row["sample_rate"], show=False) for row in rows
    }
    if not any(each.chain.changes_ends for each in built.values()):
        report.text("Each is as long as the recording it was made of, to the sample.")
    for chain in built:
        report.text(f"Chain: {chain}")
    for remark in results["remarks"]:
        report.text(f"{remark[0].upper()}{remark[1:]}.")
    if results["broken"]:
        left_out = list(results["broken"].items())
        report.table(["left out", "why"], left_out, "Recordings that cannot be read.")
    by_name = {output.name: output for output in outputs}
    last = len(rows) - 1
    chosen = sorted({round(last * k / max(1, EXAMPLES - 1)) for k in range(EXAMPLES)})
    report.section("Before and after")
    for row in (rows[number] for number in chosen):
        name = row["output"].removeprefix("audio/").rpartition(".")[0]
        _example(report, run, row, by_name[name], chains)
    report.section("What was drawn")
    _drawn(report, rows, chains)
    asked, reached = realised_snr(rows)
    if reached:
        report.section("Signal-to-noise ratio")
        report.figure(
            _snr_figure(asked, reached),
            "The ratio that each noise step was asked for, and the one measured in its result: the "
            "energy of the speech over that of what was added.",
            "histograms of signal-to-noise ratios asked for and reached",
        )
    report.section("Run")
    report.facts(run.summary())
    return report


def in_words(row: Mapping[str, Any], chains: Chains) -> str:
    """What was done to the first piece of an output, as a sentence."""
    piece, rate = row["pieces"][0], row["sample_rate"]
    params = Params.from_json(json.dumps(piece["params"]))
    done = []
    for place, effect in chains.build(row["chain"], rate, show=False).effects.items():
        if not applied(params, place):
            continue
        own, parts = parameters(piece["params"], place), []
        if place in piece["noise"]:
            begin = f" from {own['offset'][0] / rate:.2f} s" if "offset" in own else ""
            parts.append(f"{piece['noise'][place]}{begin}")
        if "durations" in own:
            spans = zip(own["starts"], own.pop("durations"), strict=True)
            parts += [f"{1000 * n / rate:.0f} ms from {at / rate:.2f} s" for at, n in spans if n]
        for key, values in own.items():
            if key not in PLACES:
                name, unit = _words(key)
                numbers = ", ".join(f"{value:.4g}" for value in values)
                parts.append(f"{name} {numbers} {unit}".rstrip())
        reached = piece["snr_db"].get(place)
        if reached is not None:
            parts.append(f"{reached:.4g} dB reached")
        done.append(": ".join(filter(None, [effect_name(effect), ", ".join(parts)])))
    return f"{'; '.join(done) or 'nothing was applied'}."


def _words(key: str) -> tuple[str, str]:
    return WORDS.get(key, (key.replace("_", " "), ""))


def _example(
    report: SoundReport, run: RunFolder, row: Mapping[str, Any], output: Output, chains: Chains
) -> None:
    rate = row["sample_rate"]
    frames = min(int(SHOWN_SECONDS * rate), SHOWN_SAMPLES)
    before = read_at(output.recording, rate).mean(0)[:frames]
    after = read_audio(run.path(row["output"]))[:frames]
    part = "" if row["frames"] <= frames else f" Shown: the first {frames / rate:.1f} s."
    report.text(f"{row['output']}: {in_words(row, chains)}{part}")
    report.figure(
        spectrogram_figure({"before": before, "after": after}, rate),
        "Spectrograms on one scale; dB under the loudest point of either.",
        f"spectrograms of {row['recording']} before and after",
    )
    report.players({"before": before, "after": after}, rate, f"{row['recording']}, to be heard.")


def spectrogram_figure(waves: Mapping[str, Tensor], sample_rate: int) -> Figure:
    """Spectrograms side by side on one scale, dB under the loudest point of all.

    Args:
        waves: (T,) each, by name.
        sample_rate: Hz.
    """
    window = 1 << max(5, round(math.log2(sample_rate * 0.025)))
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots(1, len(waves), sharey=True, squeeze=False)[0]
    levels = []
    for wave in waves.values():
        samples = np.pad(wave.double().numpy(), window // 2)  # the first window is centred at 0
        frequencies, _, power = spectrogram(
            samples, sample_rate, nperseg=window, noverlap=window * 3 // 4, scaling="spectrum"
        )
        levels.append(10 * np.log10(np.maximum(power, 1e-14)))
    top = max(float(level.max()) for level in levels)
    for name, level, axis in zip(waves, levels, axes, strict=True):
        image = axis.imshow(
            level - top,
            origin="lower",
            aspect="auto",
            extent=(0, len(waves[name]) / sample_rate, 0, frequencies[-1] / 1000),
            vmin=-RANGE_DB,
            vmax=0,
            cmap="magma",
        )
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("time, s")
    axes[0].set_ylabel("frequency, kHz")
    figure.colorbar(image, ax=axes, label="dB")
    return figure


def _drawn(report: Report, rows: Sequence[dict[str, Any]], chains: Chains) -> None:
    draws = draws_of(rows, chains)
    table: list[list[Value | Cell]] = []
    varied = []
    for drawn in draws:
        share = 100 * drawn.applied / drawn.pieces
        for key, values in drawn.values.items():
            if key in PLACES:
                continue
            name, unit = _words(key)
            label = f"{name}, {unit}".rstrip(", ")
            table.append(
                [drawn.name, share, label, min(values), float(np.mean(values)), max(values)]
            )
            if min(values) < max(values):
                varied.append((drawn.name, label, values))
        if not drawn.values:
            table.append([drawn.name, share, "nothing drawn", None, None, None])
    header = ["effect", "applied to, %", "parameter", "least", "mean", "greatest"]
    report.table(header, table, "Parameters of the outputs that an effect was applied to.")
    if varied:
        report.figure(
            histogram_figure(varied),
            "How the draws fell: number of outputs by the value drawn.",
            "histograms of the parameters drawn",
        )


def histogram_figure(varied: Sequence[tuple[str, str, Sequence[float]]]) -> Figure:
    """Histograms in rows of three: effect, parameter, values."""
    columns = min(3, len(varied))
    lines = -(-len(varied) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (effect, label, values) in zip(axes, varied, strict=False):
        axis.hist(values, bins=20, color="#0072B2")
        axis.set_title(effect, fontsize=9)
        axis.set_xlabel(label, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(varied) :]:
        axis.set_visible(False)
    return figure


def _snr_figure(asked: Sequence[float], reached: Sequence[float]) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    low, high = min(*asked, *reached), max(*asked, *reached)
    bins = np.linspace(low - 0.5, high + 0.5, 31).tolist()
    axes.hist(reached, bins, color="#56B4E9", label="reached")
    axes.hist(asked, bins, histtype="step", color="#D55E00", linewidth=1.6, label="asked for")
    axes.set_xlabel("signal-to-noise ratio, dB")
    axes.set_ylabel("outputs")
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure
