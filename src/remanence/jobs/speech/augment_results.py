"""What `speech augment` counts: hours, speed, clipped samples, and how the draws fell."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from remanence.jobs.speech.augment_noise import Chains, applied, effect_name
from remanence.kit.words import counted
from remanence.speech.wavaugment.params import Params

BINS = 20
PLACES = frozenset(
    {"clip", "response", "offset", "starts", "order", "sizes", "seed"}
)  # drawn evenly, and no news to anyone


@dataclass
class Drawn:
    """What an effect drew over all outputs.

    Attributes:
        name: Of the effect, with its place in the chain from 1.
        pieces: How often it was drawn for.
        applied: How often it was applied.
        values: Of each parameter, where it was applied.
    """

    name: str
    pieces: int = 0
    applied: int = 0
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def draws_of(rows: Sequence[dict[str, Any]], chains: Chains) -> list[Drawn]:
    """Collect the draws of each effect, in the order of the chain."""
    found: dict[tuple[str, str], Drawn] = {}
    for row in rows:
        built = chains.build(row["chain"], row["sample_rate"], show=False)
        names = {place: effect_name(effect) for place, effect in built.effects.items()}
        for piece in row["pieces"]:
            params = Params.from_json(json.dumps(piece["params"]))
            for place, name in names.items():
                drawn = found.setdefault((place, name), Drawn(f"{_label(place)} {name}"))
                drawn.pieces += 1
                if applied(params, place):
                    drawn.applied += 1
                    for key, values in parameters(piece["params"], place).items():
                        drawn.values[key] += values
    return list(found.values())


def _label(place: str) -> str:
    """A place counted from 1: `1.chain.0` is 2.1, the first step of the second one's own chain."""
    return ".".join(str(int(part) + 1) for part in place.split(".") if part.isdigit())


def parameters(params: dict[str, Any], place: str) -> dict[str, list[float]]:
    """What was drawn at a place of a chain, by name, each as a flat list."""
    return {
        key.removeprefix(f"{place}."): np.ravel(drawn["values"]).tolist()
        for key, drawn in params.items()
        if key.rpartition(".")[0] == place and not key.endswith(".apply")
    }


def results_of(
    rows: Sequence[dict[str, Any]],
    broken: Mapping[str, str],
    chains: Chains,
    seconds: float,
    *,
    floats: bool,
) -> dict[str, Any]:
    """The figures of a run.

    Args:
        rows: Lines of `params.jsonl`.
        broken: Why recordings were left out, by their names.
        chains: The chains that made the rows.
        seconds: How long that took.
        floats: Whether samples beyond full scale were kept.
    """
    hours = sum(row["frames"] / row["sample_rate"] for row in rows) / 3600
    inputs = {row["recording"]: row for row in rows}.values()
    beyond = [row for row in rows if row["beyond_full_scale"]]
    figures: dict[str, Any] = {
        "outputs": len(rows),
        "recordings": len(inputs),
        "broken": dict(broken),
        "hours": hours,
        "seconds": round(seconds, 2),
        "times_real_time": hours * 3600 / seconds if seconds else None,
        "inputs_at_full_scale": sum(row["input_at_full_scale"] > 0 for row in inputs),
        "silent_inputs": sum(row["silent"] for row in inputs),
        "outputs_beyond_full_scale": len(beyond),
        "samples_beyond_full_scale": sum(row["beyond_full_scale"] for row in beyond),
        "samples_cut_off": sum(row["cut_off"] for row in rows),
        "outputs_lowered": sum(row["gain_db"] < 0 for row in rows),
        "most_lowered_db": min(row["gain_db"] for row in rows),
        "outputs_with_looped_noise": sum(row["noise_looped"] for row in rows),
        "snr_db": _snr(rows),
        "effects": {
            drawn.name: {
                "applied": drawn.applied,
                "of": drawn.pieces,
                "parameters": {k: _histogram(v) for k, v in drawn.values.items()},
            }
            for drawn in draws_of(rows, chains)
        },
    }
    return figures | {"remarks": _remarks(figures, floats=floats)}


def realised_snr(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """What noise steps asked for and what they reached, dB, wherever both are known."""
    pairs = [
        (parameters(piece["params"], place)["snr_db"][0], reached)
        for row in rows
        for piece in row["pieces"]
        for place, reached in piece["snr_db"].items()
    ]
    return [asked for asked, _ in pairs], [reached for _, reached in pairs]


def write_params(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a line for each output."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _snr(rows: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    asked, reached = map(np.array, realised_snr(rows))
    if not len(reached):
        return None
    return {
        "mean_asked": float(asked.mean()),
        "mean_reached": float(reached.mean()),
        "least_reached": float(reached.min()),
        "greatest_reached": float(reached.max()),
        "largest_difference": float(np.abs(reached - asked).max()),
    }


def _histogram(values: Sequence[float]) -> dict[str, Any]:
    counts, edges = np.histogram(values, BINS)
    spread = {"least": min(values), "mean": float(np.mean(values)), "greatest": max(values)}
    if min(values) == max(values):
        return spread
    return spread | {"counts": counts.tolist(), "edges": edges.tolist()}


def _remarks(figures: dict[str, Any], *, floats: bool) -> list[str]:
    said = []
    if touched := figures["inputs_at_full_scale"]:
        said.append(
            f"{touched:,} of {counted(figures['recordings'], 'recording')} "
            f"{'was' if touched == 1 else 'were'} at full scale already, perhaps clipped"
        )
    if silent := figures["silent_inputs"]:
        said.append(f"{counted(silent, 'silent recording')}: no noise is mixed in")
    if beyond := figures["outputs_beyond_full_scale"]:
        what = f"{beyond:,} of {counted(figures['outputs'], 'output')} went beyond full scale"
        if figures["outputs_lowered"]:
            were = "was" if beyond == 1 else "were"
            what += f" and {were} made quieter, by up to {-figures['most_lowered_db']:.1f} dB"
        elif floats:
            what += ", which floats keep"
        else:
            lost = figures["samples_cut_off"]
            what += (
                f": {counted(lost, 'sample')} {'was' if lost == 1 else 'were'} cut off there; "
                "--overflow lower makes such recordings quieter, --subtype FLOAT keeps them"
            )
        said.append(what)
    if looped := figures["outputs_with_looped_noise"]:
        said.append(f"noise shorter than the recording starts over in {counted(looped, 'output')}")
    if left := figures["broken"]:
        said.append(
            f"{counted(len(left), 'unreadable recording')} left out, the first: "
            f"{next(iter(left.values()))}"
        )
    return said
