"""Chains written as text: `pitch[-300:300],noise[dir=street,snr=5:15],reverb[room=0:100]`.

An effect is a name and, in brackets, options: `key=value`, a number, a range `low:high` or a word.
The effect's main option may stand without its key, first. Every effect takes `p`.

    pitch       cents (main), quality, search
    reverb      room (main), reverberance, damping, depth, delay, wet
    noise       snr (main), dir, mix
    bandreject  scaler (main), transition
    drop        ms (main), count, edge
    clip        factor (main)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from remanence.errors import InputError
from remanence.speech.wavaugment.chain import Chain
from remanence.speech.wavaugment.random import (
    RandomBandReject,
    RandomClip,
    RandomNoise,
    RandomPitch,
    RandomReverb,
    RandomTimeDrop,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from remanence.speech.wavaugment.augmentation import RandomEffect

    OpenNoise = Callable[[str], Tensor | Sequence[Tensor]]

# Options by effect, the main one first: what they are called in Python, and what they take.
OPTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "pitch": {
        "cents": ("cents", "range"),
        "quality": ("quality", "high|quick"),
        "search": ("search", "full|quick"),
    },
    "reverb": {
        "room": ("room", "range"),
        "reverberance": ("reverberance", "range"),
        "damping": ("damping", "range"),
        "depth": ("stereo_depth", "range"),
        "delay": ("pre_delay_ms", "range"),
        "wet": ("wet_db", "range"),
    },
    "noise": {
        "snr": ("snr", "range"),
        "dir": ("source", "word"),
        "mix": ("mix", "rms|wavaugment|rms_peak"),
    },
    "bandreject": {"scaler": ("scaler", "number"), "transition": ("transition_hz", "number")},
    "drop": {
        "ms": ("max_ms", "number"),
        "count": ("count", "whole"),
        "edge": ("edge_ms", "number"),
    },
    "clip": {"factor": ("factor", "range")},
}


@dataclass(frozen=True)
class _Step:
    """One effect as written, and the column where it begins, from 1."""

    name: str
    options: list[tuple[str, int]]
    column: int


def from_text(
    text: str,
    sample_rate: int,
    open_noise: OpenNoise | None = None,
    *,
    saturate: bool = False,
    always: bool = False,
) -> Chain:
    """Build the chain that a text describes.

    Args:
        text: see the module.
        sample_rate: Hz.
        open_noise: makes a noise bank of what `dir` names; needed only where a chain has noise.
        saturate: cut off at full scale after each effect.
        always: augment in eval mode too.

    Returns:
        The chain.

    Raises:
        InputError: the text is no chain; the message gives the column, from 1.
    """
    effects = []
    for step in _steps(text):
        given = _options(text, step)
        try:
            effects.append(_effect(step.name, given, sample_rate, open_noise))
        except InputError as error:
            raise _wrong(text, step.column, f"{step.name}: {error}") from error
    return Chain(effects, saturate=saturate, always=always)


def _wrong(text: str, column: int, what: str) -> InputError:
    return InputError(f"chain {text!r}, column {column}: {what}")


def _steps(text: str) -> list[_Step]:
    steps, at = [], 0
    while True:
        found = re.compile(r"\s*([A-Za-z_]+)\s*").match(text, at)
        if not found:
            raise _wrong(text, at + 1, f"an effect must stand here: one of {', '.join(OPTIONS)}")
        name, column = found[1], found.start(1) + 1
        if name not in OPTIONS:
            raise _wrong(text, column, f"{name!r} is no effect: use one of {', '.join(OPTIONS)}")
        at, options = found.end(), []
        if text[at : at + 1] == "[":
            close = text.find("]", at)
            if close < 0:
                raise _wrong(text, at + 1, "this bracket is never closed: add ']'")
            begin = at + 1
            for part in text[begin:close].split(","):
                options.append((part, begin + 1 + len(part) - len(part.lstrip())))
                begin += len(part) + 1
            at = close + 1 + len(text[close + 1 :]) - len(text[close + 1 :].lstrip())
        steps.append(_Step(name, options, column))
        if at == len(text):
            return steps
        if text[at] != ",":
            raise _wrong(text, at + 1, f"{text[at]!r} after an effect: put ',' between effects")
        at += 1


def _options(text: str, step: _Step) -> dict[str, Any]:
    """Python's names and values of a step's options."""
    known = {**OPTIONS[step.name], "p": ("p", "number")}
    given: dict[str, Any] = {}
    for place, (part, column) in enumerate(step.options):
        key, equals, value = part.partition("=")
        if not equals:
            if place:
                raise _wrong(text, column, f"{part.strip()!r} needs its name: write key=value")
            key, value = next(iter(known)), part
        key = key.strip()
        if key not in known:
            raise _wrong(
                text, column, f"{step.name} has no option {key!r}: use one of {', '.join(known)}"
            )
        name, kind = known[key]
        if name in given:
            raise _wrong(text, column, f"{key!r} is given twice")
        given[name] = _value(text, column, value.strip(), kind)
    return given


def _value(text: str, column: int, value: str, kind: str) -> Any:
    if "|" in kind:
        if value not in kind.split("|"):
            raise _wrong(text, column, f"{value!r} is none of {kind.replace('|', ', ')}")
        return value
    if kind == "word":
        if not value:
            raise _wrong(text, column, "a name must follow '='")
        return value
    try:
        if kind == "whole":
            return int(value)
        numbers = tuple(float(number) for number in value.split(":"))
    except ValueError:
        raise _wrong(text, column, f"{value!r} is no number") from None
    if len(numbers) > (2 if kind == "range" else 1):
        wanted = "one number or low:high" if kind == "range" else "one number"
        raise _wrong(text, column, f"{value!r} is too much: give {wanted}")
    return numbers if len(numbers) == 2 else numbers[0]


def _effect(
    name: str, given: dict[str, Any], sample_rate: int, open_noise: OpenNoise | None
) -> RandomEffect:
    if name == "pitch":
        cents = given.pop("cents", (-300, 300))
        low, high = cents if isinstance(cents, tuple) else (cents, cents)
        return RandomPitch(sample_rate, low, high, **given)
    if name == "reverb":
        return RandomReverb(sample_rate, **given)
    if name == "bandreject":
        return RandomBandReject(sample_rate, **given)
    if name == "drop":
        return RandomTimeDrop(sample_rate, **given)
    if name == "clip":
        return RandomClip(**given)
    if "source" not in given:
        raise InputError("dir is missing: say where the noise lies, as in noise[dir=street]")
    if open_noise is None:
        raise InputError("nothing opens noise here: give open_noise")
    return RandomNoise(open_noise(given.pop("source")), **given)
