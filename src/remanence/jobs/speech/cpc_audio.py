"""What `remanence speech cpc` hears: recordings, who speaks, what is held out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from remanence.errors import InputError
from remanence.jobs.speech.cpc_waves import Waves
from remanence.kit.audio import Heard, treatment
from remanence.kit.recordings import Recording, list_recordings, speakers_of
from remanence.kit.words import counted
from remanence.speech.cpc.sampler import WindowSampler

GIB = 2**30
VALID_FRACTION = 0.05


@dataclass(frozen=True)
class Speech:
    """Recordings to learn from or to measure on.

    Attributes:
        recordings: The recordings.
        speakers: Who speaks in each; None where nobody knows.
    """

    recordings: tuple[Recording, ...]
    speakers: tuple[str, ...] | None

    def __getitem__(self, index: Sequence[int]) -> Speech:
        """Return some of them."""
        names = None if self.speakers is None else tuple(self.speakers[i] for i in index)
        return Speech(tuple(self.recordings[i] for i in index), names)

    @property
    def hours(self) -> float:
        """How long they last together."""
        return sum(recording.seconds for recording in self.recordings) / 3600


def open_speech(audio: str, names: str | None, *, speakers: bool) -> Speech:
    """Read the headers of recordings, and who speaks.

    Args:
        audio: Source; see `kit.audio`.
        names: Regular expression for names; None where folders name speakers.
        speakers: Whether speakers are needed.

    Raises:
        InputError: There are no recordings, or no speakers where they are needed.
    """
    recordings = tuple(list_recordings(audio))
    told = all("/" in r.name for r in recordings) if names is None else "(?P<speaker>" in names
    if not speakers and not told:
        return Speech(recordings, None)
    found = speakers_of(recordings, names)
    return Speech(recordings, tuple(found[recording.name] for recording in recordings))


def usual_rate(recordings: Sequence[Recording]) -> int:
    """Return 8000 where no recording has more, else 16000."""
    return 8000 if all(recording.sample_rate <= 8000 for recording in recordings) else 16000


def split(
    speech: Speech,
    valid: str | None,
    share: float | None,
    names: str | None,
    seed: int,
    *,
    window: float,
) -> tuple[Speech, Speech]:
    """Return what to learn from and what to measure on.

    Without `valid` and `share`, a twentieth of each speaker's recordings are held out, or as many
    as make a window of so many seconds, if half of them do.

    Raises:
        InputError: What is given to measure on cannot be opened, or is learned from.
    """
    if valid is None:
        if share is None:
            learn, held = hold_out(speech, VALID_FRACTION, seed, seconds=window)
        else:
            learn, held = hold_out(speech, share, seed)
        return speech[learn], speech[held]
    other = open_speech(valid, names, speakers=speech.speakers is not None)
    paths = {recording.path.resolve() for recording in speech.recordings}
    both = [each for each in other.recordings if each.path.resolve() in paths]
    if both:
        raise InputError(
            f"--valid {valid}: {len(both):,} of its recordings, such as {both[0].path}, are among "
            "those to learn from; take them out of one"
        )
    return speech, other


def hold_out(
    speech: Speech, share: float, seed: int, *, seconds: float = 0.0
) -> tuple[list[int], list[int]]:
    """Choose recordings of each speaker, at least one where there are two, to hold out.

    Args:
        speech: All.
        share: Share of the recordings of each speaker; 0 for none.
        seed: Of the choice.
        seconds: How long those of a speaker should last at least, where half of them do.

    Returns:
        Numbers of the recordings to learn from, and of those held out.
    """
    by_speaker: dict[str, list[int]] = {}
    for i in range(len(speech.recordings)):
        by_speaker.setdefault(speech.speakers[i] if speech.speakers else "", []).append(i)
    rng = np.random.default_rng(seed)
    held: list[int] = []
    for own in by_speaker.values():
        count = min(max(round(share * len(own)), 1), len(own) - 1) if share else 0
        order = [int(i) for i in rng.permutation(own)]
        lasts = np.cumsum([speech.recordings[i].seconds for i in order])
        enough = int(np.searchsorted(lasts, seconds)) + 1
        held += order[: max(count, enough if count and enough <= len(own) // 2 else 0)]
    out = set(held)
    return [i for i in range(len(speech.recordings)) if i not in out], sorted(held)


def by_speaker(
    learn: Speech, held: Speech, sampler: WindowSampler
) -> tuple[tuple[str, int, float, int, int], ...]:
    """Return for each speaker: name, recordings, hours, windows an epoch, recordings held out."""
    names = learn.speakers or ("",) * len(learn.recordings)
    recordings, hours = Counter(names), dict.fromkeys(names, 0.0)
    for name, recording in zip(names, learn.recordings, strict=True):
        hours[name] += recording.seconds / 3600
    out = Counter(held.speakers or ("",) * len(held.recordings))
    windows = sampler.windows_of()
    return tuple(
        (name, recordings[name], hours[name], windows[name], out[name]) for name in windows
    )


def prepared(
    learn: Speech, held: Speech, waves: Waves, held_waves: Waves | None, sampler: WindowSampler
) -> list[str]:
    """Say what was resampled, averaged, joined and left out."""
    rate = waves.sample_rate
    heard = Heard()
    for each in (waves, held_waves):
        heard.full_scale += each.heard.full_scale if each else 0
        heard.silent += each.heard.silent if each else 0
    said = [*treatment((*learn.recordings, *held.recordings), rate), *heard.remarks()]
    short = sum(length < sampler.window for length in waves.lengths)
    if sampler.straddle:
        said.append("windows run from one recording of a speaker into the next (straddle)")
    elif short:
        said.append(
            f"{counted(short, 'recording')} shorter than a window of {sampler.window / rate:g} s: "
            "joined with others of the speaker, in another order each epoch"
        )
    if sampler.skipped:
        some = ", ".join(sampler.skipped[:5]) + (" ..." if len(sampler.skipped) > 5 else "")
        said.append(
            f"{counted(len(sampler.skipped), 'speaker')} with less than a window left out: {some}"
        )
    if sampler.left_out:
        said.append(
            f"{counted(sampler.left_out, 'window')} of an epoch left out, so that processes have "
            "batches of one size"
        )
    every = [each for each in (waves, held_waves) if each]
    count, kept = (sum(map(f, every)) for f in (lambda w: len(w.recordings), lambda w: w.kept))
    if kept < count:
        gibibytes = math.ceil(sum(each.bytes_of_all for each in every) / GIB)
        said.append(
            f"{kept:,} of {counted(count, 'recording')} are in memory; windows of the others are "
            f"read from disk, and not looked at for clipping: --memory {gibibytes} would keep all"
        )
    return said
