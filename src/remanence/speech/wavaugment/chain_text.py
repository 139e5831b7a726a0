"""Chains written as text: `pitch[-300:300],noise[dir=street,snr=5:15],reverb[room=0:100]`.

An effect is a name and, in brackets, options: `key=value`, a number, a range `low:high`, a word, or
a chain in brackets of its own. The effect's main option may stand without its key, first. Every
effect but `oneof` and `someof` takes `p`, the share of examples that it touches.

    pitch       cents (main), quality, search
    speed       factor (main), quality
    tempo       factor (main), search
    reverb      room (main), reverberance, damping, depth, delay, wet
    room        dir (main), align, energy
    noise       snr (main), dir, mix, band, chain
    babble      snr (main), voices
    bandreject  scaler (main), transition
    freqdrop    count (main), width, transition
    drop        ms (main), count, edge, fill
    splice      ms (main), count
    swap        chunks (main), share
    clip        factor (main), law, peak
    gain        db (main)
    polarity
    dither      bits (main)
    oneof       of (main): `oneof[[pitch,clip[0.5:1]]]`, one of them for each example
    someof      k (main), of: `someof[2,of=[pitch,drop,reverb]]`
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from remanence.errors import InputError
from remanence.speech.wavaugment import random
from remanence.speech.wavaugment.chain import RECIPES, Chain, OneOf, SomeOf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from remanence.speech.wavaugment.augmentation import Augmentation

    OpenNoise = Callable[[str], Tensor | Sequence[Tensor]]

DEEPEST = 50  # brackets in one another
FOR_PYTHON = "wav2aug-top9"  # the recipe that no text can say
_COUNT = {"count": ("count", "range")}
_SLOPES = {"transition": ("transition_hz", "number")}
# Options by effect, the main one first: what they are called in Python, and what they take.
OPTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "pitch": {
        "cents": ("cents", "range"),
        "quality": ("quality", "high|quick"),
        "search": ("search", "full|quick"),
    },
    "speed": {"factor": ("factor", "range"), "quality": ("quality", "high|quick")},
    "tempo": {"factor": ("factor", "range"), "search": ("search", "full|quick")},
    "reverb": {
        "room": ("room", "range"),
        "reverberance": ("reverberance", "range"),
        "damping": ("damping", "range"),
        "depth": ("stereo_depth", "range"),
        "delay": ("pre_delay_ms", "range"),
        "wet": ("wet_db", "range"),
    },
    "room": {
        "dir": ("source", "word"),
        "align": ("align", "yes|no"),
        "energy": ("unit_energy", "yes|no"),
    },
    "noise": {
        "snr": ("snr", "range"),
        "dir": ("source", "word"),
        "mix": ("mix", "rms|wavaugment|rms_peak"),
        "band": ("band_hz", "pair"),
        "chain": ("chain", "chain"),
    },
    "babble": {"snr": ("snr", "range"), "voices": ("voices", "whole")},
    "bandreject": {"scaler": ("scaler", "number"), **_SLOPES},
    "freqdrop": {**_COUNT, "width": ("width", "number"), **_SLOPES},
    "drop": {
        "ms": ("max_ms", "number"),
        **_COUNT,
        "edge": ("edge_ms", "number"),
        "fill": ("fill", "silence|noise"),
    },
    "splice": {"ms": ("max_ms", "number"), **_COUNT},
    "swap": {"chunks": ("chunks", "whole"), "share": ("share", "number")},
    "clip": {
        "factor": ("factor", "range"),
        "law": ("law", "triangular|uniform"),
        "peak": ("keep_peak", "yes|no"),
    },
    "gain": {"db": ("db", "range")},
    "polarity": {},
    "dither": {"bits": ("bits", "whole")},
    "oneof": {"of": ("effects", "chain")},
    "someof": {"k": ("k", "whole"), "of": ("effects", "chain")},
}
_WITH_RATE: dict[str, Callable[..., Augmentation]] = {
    "tempo": random.RandomTempo,
    "reverb": random.RandomReverb,
    "bandreject": random.RandomBandReject,
    "freqdrop": random.RandomFrequencyDrop,
    "drop": random.RandomTimeDrop,
    "splice": random.RandomSpliceOut,
}
_WITHOUT_RATE: dict[str, Callable[..., Augmentation]] = {
    "speed": random.RandomSpeed,
    "babble": random.RandomBabble,
    "swap": random.RandomChunkSwap,
    "clip": random.RandomClip,
    "gain": random.RandomGain,
    "polarity": random.RandomPolarity,
    "dither": random.RandomDither,
}


def from_text(
    text: str,
    sample_rate: int,
    open_noise: OpenNoise | None = None,
    *,
    noise: str | None = None,
    saturate: bool = False,
    always: bool = False,
) -> Chain:
    """Build the chain that a text describes.

    Args:
        text: see the module.
        sample_rate: Hz.
        open_noise: makes a bank of what `dir` names, noise or impulse responses; needed only where
            a chain has `noise` or `room`.
        noise: what `dir` is of a `noise` without one.
        saturate: cut off at full scale after each effect.
        always: augment in eval mode too.

    Returns:
        The chain.

    Raises:
        InputError: the text is no chain; the message gives the column, from 1.
    """
    reader = _Reader(text, sample_rate, open_noise, noise)
    reader.check_depth()
    effects = reader.effects(0, len(text))
    return Chain(effects, saturate=saturate, always=always)


@dataclass(frozen=True)
class _Reader:
    """A text and what its effects need. Places are counted from 0, columns in errors from 1."""

    text: str
    sample_rate: int
    open_noise: OpenNoise | None
    noise: str | None

    def wrong(self, place: int, what: str) -> InputError:
        return InputError(f"chain {self.text!r}, column {place + 1}: {what}")

    def check_depth(self) -> None:
        """Raise InputError where more brackets are open than anyone needs."""
        depth = 0
        for place, character in enumerate(self.text):
            depth += {"[": 1, "]": -1}.get(character, 0)
            if depth > DEEPEST:
                raise self.wrong(place, f"more than {DEEPEST} brackets in one another: write fewer")

    def effects(self, begin: int, end: int) -> list[Augmentation]:
        """The effects written between two places."""
        found = []
        for first, last in self.parts(begin, end):
            name = re.compile(r"[A-Za-z_][\w-]*").match(self.text, first, last)
            if not name:
                known = ", ".join(OPTIONS)
                raise self.wrong(first, f"an effect must stand here: one of {known}")
            found.append(self.effect(name[0], first, name.end(), last))
        return found

    def parts(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """What stands between the commas outside brackets, without the spaces around it."""
        at = begin
        while at <= end:
            stop = at
            while stop < end and self.text[stop] != ",":
                stop = self.closing(stop, end) + 1 if self.text[stop] == "[" else stop + 1
            first = at + len(self.text[at:stop]) - len(self.text[at:stop].lstrip())
            yield first, max(first, at + len(self.text[at:stop].rstrip()))
            at = stop + 1

    def closing(self, opening: int, end: int) -> int:
        """The place of the bracket that closes another."""
        depth = 0
        for place in range(opening, end):
            depth += {"[": 1, "]": -1}.get(self.text[place], 0)
            if depth == 0:
                return place
        raise self.wrong(opening, "this bracket is never closed: add ']'")

    def inside(self, opening: int, end: int) -> tuple[int, int]:
        """What stands in the brackets that open here and must close at the end."""
        close = self.closing(opening, end)
        after = (
            close + 1 + len(self.text[close + 1 : end]) - len(self.text[close + 1 : end].lstrip())
        )
        if after < end and self.text[after] == "]":
            raise self.wrong(after, "this bracket closes nothing: take it out")
        if after < end:
            raise self.wrong(after, f"{self.text[after]!r} after ']': put ',' between effects")
        return opening + 1, close

    def effect(self, name: str, first: int, at: int, end: int) -> Augmentation:
        """The effect whose name ends at a place, with the options behind it."""
        if name not in OPTIONS:
            raise self.wrong(first, _no_effect(name))
        at += len(self.text[at:end]) - len(self.text[at:end].lstrip())
        given: dict[str, Any] = {}
        places: dict[str, tuple[int, int]] = {}
        if at < end:
            if self.text[at] == "]":
                raise self.wrong(at, "this bracket closes nothing: take it out")
            if self.text[at] != "[":
                raise self.wrong(at, f"{self.text[at]!r} after an effect: put ',' between effects")
            given, places = self.options(name, *self.inside(at, end))
        try:
            return self.build(name, given)
        except InputError as error:
            said = str(error)
            for key, (option, _) in _options(name).items():
                if option in places and said.startswith(f"{option} "):
                    # As the text has it: the option's name and what was written.
                    first, last = places[option]
                    rest = re.sub(r"^\w+ (\([^)]*\)|[^\s:]+)", "", said)
                    said = f"{key} {self.text[first:last]}{rest}"
            raise self.wrong(first, f"{name}: {said}") from error

    def options(
        self, name: str, begin: int, end: int
    ) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        """An effect's options by Python's names: their values, and where these are written."""
        known = _options(name)
        given: dict[str, Any] = {}
        places: dict[str, tuple[int, int]] = {}
        for place, (first, last) in enumerate(self.parts(begin, end)):
            named = re.compile(r"([^\[=]*)=\s*").match(self.text, first, last)
            if not named and place:
                raise self.wrong(
                    first, f"{self.text[first:last]!r} needs its name: write key=value"
                )
            key = named[1].strip() if named else next(iter(known))
            if key not in known:
                choice = ", ".join(known)
                raise self.wrong(first, f"{name} has no option {key!r}: use one of {choice}")
            option, kind = known[key]
            if option in given:
                raise self.wrong(first, f"{key!r} is given twice")
            start = named.end() if named else first
            places[option] = start, last
            if kind == "chain":
                given[option] = self.chain(start, last)
            else:
                try:
                    given[option] = _value(self.text[start:last], kind)
                except InputError as error:
                    raise self.wrong(start, str(error)) from None
        return given, places

    def chain(self, begin: int, end: int) -> list[Augmentation]:
        """The effects of a chain in brackets."""
        if begin == end or self.text[begin] != "[":
            raise self.wrong(begin, "a chain must stand here in brackets of its own: [pitch,clip]")
        return self.effects(*self.inside(begin, end))

    def build(self, name: str, given: dict[str, Any]) -> Augmentation:
        """The effect of Python's names and values."""
        if name == "pitch":
            cents = given.pop("cents", (-300, 300))
            low, high = cents if isinstance(cents, tuple) else (cents, cents)
            return random.RandomPitch(self.sample_rate, low, high, **given)
        if name in ("noise", "room"):
            bank = self.bank(name, given)
            if name == "room":
                return random.RandomRoom(bank, **given)
            if "chain" in given:
                given["chain"] = Chain(given["chain"])
            return random.RandomNoise(bank, sample_rate=self.sample_rate, **given)
        if name in ("oneof", "someof"):
            if "effects" not in given:
                raise InputError(f"its effects are missing: write {name}[of=[pitch,clip]]")
            return OneOf(**given) if name == "oneof" else SomeOf(**{"k": 2, **given})
        if name in _WITH_RATE:
            return _WITH_RATE[name](self.sample_rate, **given)
        return _WITHOUT_RATE[name](**given)

    def bank(self, name: str, given: dict[str, Any]) -> Tensor | Sequence[Tensor]:
        """What `dir` names, opened."""
        if name == "noise" and self.noise is not None:
            given.setdefault("source", self.noise)
        if "source" not in given:
            raise InputError(f"dir is missing: say where it lies, as in {name}[dir=folder]")
        if self.open_noise is None:
            raise InputError(f"nothing opens {name} here: give open_noise")
        return self.open_noise(given.pop("source"))


def _options(name: str) -> dict[str, tuple[str, str]]:
    if name in ("oneof", "someof"):
        return OPTIONS[name]
    return {**OPTIONS[name], "p": ("p", "number")}


def _no_effect(name: str) -> str:
    """Why a word cannot stand for an effect, and what may have been meant."""
    if name == FOR_PYTHON:
        return f"{name!r} is a recipe for Python alone, from_recipe, as babble needs a batch"
    if name in RECIPES:
        return f"{name!r} is a recipe and stands alone, outside of chains; in Python, from_recipe"
    recipes = [recipe for recipe in RECIPES if recipe != FOR_PYTHON]
    near = difflib.get_close_matches(name.lower(), [*OPTIONS, *recipes], n=1)
    if near:
        kind = "the recipe " if near[0] in RECIPES else ""
        return f"{name!r} is no effect: did you mean {kind}{near[0]}?"
    return (
        f"{name!r} is no effect: use one of {', '.join(OPTIONS)}; or a recipe alone, one of"
        f" {', '.join(recipes)}"
    )


def _value(value: str, kind: str) -> Any:
    if "|" in kind:
        if value not in kind.split("|"):
            raise InputError(f"{value!r} is none of {kind.replace('|', ', ')}")
        return value == "yes" if kind == "yes|no" else value
    if kind == "word":
        if not value:
            raise InputError("a name must follow '='")
        return value
    try:
        if kind == "whole":
            return int(value)
        numbers = tuple(float(number) for number in value.split(":"))
    except ValueError:
        wanted = "whole number" if kind == "whole" else "number"
        raise InputError(f"{value!r} is no {wanted}") from None
    fits, wanted = {
        "number": ((1,), "one number"),
        "range": ((1, 2), "one number or low:high"),
        "pair": ((2,), "low:high"),
    }[kind]
    if len(numbers) not in fits:
        raise InputError(f"{value!r} does not fit: give {wanted}")
    if numbers[0] > numbers[-1]:
        low, high = reversed(value.split(":"))
        raise InputError(f"{value!r} runs from high to low: write {low}:{high}")
    return numbers if len(numbers) == 2 else numbers[0]
