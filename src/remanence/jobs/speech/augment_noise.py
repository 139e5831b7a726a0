"""Chains of `speech augment`, and the noise and rooms that they open."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.speech.augment_plan import Output
from remanence.kit.audio import read_audio, treatment
from remanence.kit.progress import track
from remanence.kit.recordings import MANY, list_recordings
from remanence.kit.words import counted, duration
from remanence.speech.wavaugment.augmentation import Augmentation
from remanence.speech.wavaugment.chain import Chain
from remanence.speech.wavaugment.chain_text import from_text
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.random import RandomNoise, RandomRoom

_USEFUL = "noise[0:10],freqdrop[1:8,width=0.2],drop[250,count=1:8]"
# The published recipes (`from_recipe`), as text; wav2aug-top9 has babble, which files have not.
RECIPES = {
    "cpc2": "pitch[-300:300],noise[5:15],reverb[room=0:100]",
    "cpc2-community": (
        "pitch[-300:300],noise[5:20,mix=rms_peak],reverb[room=0:100,reverberance=0:100,damping=100]"
    ),
    "wav2aug-top3": f"someof[2,of=[{_USEFUL}]]",
    "wav2aug-top6": (
        f"someof[2,of=[{_USEFUL},speed[0.9:1.1],clip[0:0.75,law=uniform,peak=yes],"
        "swap[4,share=0.01]]]"
    ),
}
GIVEN = "--noise"  # what noise steps without dir= open
HIGH_RATE = 768_000  # at which no band of a chain is too high
MOST_NOISE = 2**30  # samples held in memory, 4 GiB


@dataclass(frozen=True, eq=False)
class Bank:
    """Noise, or responses of rooms, in memory.

    Attributes:
        clips: (T',) each, at one rate.
        names: Of the clips.
    """

    clips: list[Tensor]
    names: list[str]


@dataclass(eq=False)
class Chains:
    """Builds chains for the rates at hand, and keeps them and their noise.

    Attributes:
        noise: What --noise gave.
        device: Where they work.
        said: Remarks on what was opened, for the report.
    """

    noise: str | None
    device: torch.device
    said: list[str] = field(default_factory=list)
    _banks: dict[tuple[str, int], Bank] = field(default_factory=dict)
    _built: dict[tuple[str, int], Built] = field(default_factory=dict)

    def build(self, text: str, sample_rate: int, *, show: bool) -> Built:
        """The chain that a text describes, at a rate.

        Raises:
            InputError: The text is no chain, or its noise cannot be used.
        """
        key = text, sample_rate
        if key not in self._built:
            opened: list[Bank] = []

            def open_noise(source: str) -> list[Tensor]:
                opened.append(self._open(source, sample_rate, show=show))
                return opened[-1].clips

            given = None if self.noise is None else GIVEN
            chain = from_text(text, sample_rate, open_noise, noise=given, always=True)
            chain = chain.to(self.device)
            effects = effects_of(chain)
            # Opened in the order of the text, and the chain of a noise before the noise.
            users = [p for p, e in effects.items() if isinstance(e, RandomNoise | RandomRoom)]
            self._built[key] = Built(chain, effects, dict(zip(users, opened, strict=True)))
            self.said += [remark for remark in _warnings(effects) if remark not in self.said]
        return self._built[key]

    def most_samples(self, output: Output, frames: int) -> int:
        """With how many samples a piece of `frames` of an output may end."""
        built = self.build(output.chain, output.sample_rate, show=False)
        return built.chain.most_samples(frames)

    def _open(self, source: str, sample_rate: int, *, show: bool) -> Bank:
        where = self.noise if source == GIVEN and self.noise is not None else source
        key = where, sample_rate
        if key not in self._banks:
            self._banks[key] = self._read(where, sample_rate, show=show)
        return self._banks[key]

    def _read(self, source: str, sample_rate: int, *, show: bool) -> Bank:
        recordings = list_recordings(source)
        seconds = sum(recording.seconds for recording in recordings)
        _check_fits(source, seconds, sample_rate)
        files = track(recordings, f"noise from {source}", show=show and len(recordings) >= MANY)
        clips = [read_audio(recording, sample_rate=sample_rate) for recording in files]
        said = []
        if all(where != source for where, _ in self._banks):  # not at another rate before
            said.append(f"{counted(len(clips), 'clip')}, {duration(seconds)}")
            if silent := sum(not bool(clip.any()) for clip in clips):
                leave = "leaves" if silent == 1 else "leave"
                said.append(f"{counted(silent, 'silent clip')}, which {leave} recordings alone")
        said += treatment(recordings, sample_rate)
        if said:
            self.said.append(f"noise in {source}: {'; '.join(said)}")
        return Bank(clips, [recording.name for recording in recordings])


@dataclass(frozen=True, eq=False)
class Built:
    """A chain and what its steps opened.

    Attributes:
        chain: On its device.
        effects: Its effects by place, see `effects_of`.
        banks: What noise and room steps opened, by place.
    """

    chain: Chain
    effects: Mapping[str, Augmentation]
    banks: Mapping[str, Bank]

    def clips(self, params: Params) -> dict[str, str]:
        """The clip that each noise or room step drew, by its place, where it is applied.

        Args:
            params: Of one row.

        Raises:
            InputError: There is no such clip.
        """
        found = {}
        for place, bank in self.banks.items():
            if applied(params, place):
                noise = isinstance(self.effects[place], RandomNoise)
                clip = int(params.values[f"{place}.{'clip' if noise else 'response'}"])
                if not 0 <= clip < len(bank.names):
                    raise InputError(f"the noise has {len(bank.names)} clips, not {clip + 1}")
                found[place] = bank.names[clip]
        return found

    def loops(self, params: Params, frames: int) -> bool:
        """Whether a row of `frames` samples drew noise shorter than it is at that step."""
        lengths = _lengths_at(self.chain, params, torch.tensor([frames]))
        return any(
            len(bank.clips[int(params.values[f"{place}.clip"])])
            < lengths[place.partition(".chain.")[0]]
            for place, bank in self.banks.items()
            if isinstance(self.effects[place], RandomNoise) and applied(params, place)
        )


def _lengths_at(chain: Chain, params: Params, length: Tensor, before: str = "") -> dict[str, int]:
    """How long one row is as it comes to each effect of a chain, by its place."""
    found = {}
    for number, effect in enumerate(steps_of(chain)):
        own, place = params.under(str(number)), f"{before}{number}"
        found[place] = int(length)
        if isinstance(effect, Chain):
            found |= _lengths_at(effect, own, length, f"{place}.")
        length = effect.ends(length, own, effect.most_samples(int(length)))
    return found


def _check_fits(source: str, seconds: float, sample_rate: int) -> None:
    if seconds * sample_rate > MOST_NOISE:
        raise InputError(
            f"{source} holds {seconds / 3600:.1f} hours, more than fit in memory: take at most "
            f"{MOST_NOISE / sample_rate / 3600:.1f}, by a glob or a list"
        )


def _warnings(effects: Mapping[str, Augmentation]) -> list[str]:
    """What a user may not expect of effects that change lengths."""
    moving = {effect_name(e) for p, e in effects.items() if e.changes_ends and ".chain." not in p}
    if not moving:
        return []
    return [f"{', '.join(sorted(moving))}: files become longer or shorter, and words move"]


def applied(params: Params, place: str) -> bool:
    """Whether one row's effect at a place is applied, and all that it is part of."""
    parts = place.split(".")
    within = (".".join(parts[: k + 1]) for k in range(len(parts)))
    flags = (params.values.get(f"{outer}.apply") for outer in within)
    return all(bool(flag) for flag in flags if flag is not None)


def steps_of(chain: Chain) -> list[Augmentation]:
    """What a chain does one after the other."""
    return [step for step in chain.effects if isinstance(step, Augmentation)]


def effects_of(chain: Chain, before: str = "") -> dict[str, Augmentation]:
    """The effects of a chain by their place: `0`; `2.0` in a chain within; `1.chain.0` on noise."""
    found: dict[str, Augmentation] = {}
    for place, effect in enumerate(steps_of(chain)):
        if isinstance(effect, Chain):
            found |= effects_of(effect, f"{before}{place}.")
            continue
        if isinstance(effect, RandomNoise) and isinstance(effect.chain, Chain):
            found |= effects_of(effect.chain, f"{before}{place}.chain.")
        found[f"{before}{place}"] = effect
    return found


def effect_name(effect: Augmentation) -> str:
    """What an effect is called: `RandomPitch` is pitch."""
    words = re.findall(r"[A-Z][a-z]*", type(effect).__name__.removeprefix("Random"))
    return " ".join(words).lower()


def chain_text(given: str, noise: str | None) -> str:
    """The chain of --chain, a recipe's name or a text, read through before anything is opened.

    Raises:
        InputError: The text is no chain, a step needs --noise, or none takes it.
    """
    text = RECIPES.get(given, given)
    opened = []

    def note(source: str) -> list[Tensor]:
        opened.append(source)
        return [torch.ones(1)]

    from_text(text, HIGH_RATE, note, noise=GIVEN)
    if GIVEN in opened and noise is None:
        raise InputError(
            f"--chain {given}: mixes noise in; say where it lies with --noise FOLDER, or leave "
            "noise out, as in --chain pitch,reverb"
        )
    if noise is not None and GIVEN not in opened:
        raise InputError(
            f"--noise {noise}: no step of --chain {given} takes it; add a step noise, or leave "
            "--noise out"
        )
    return text
