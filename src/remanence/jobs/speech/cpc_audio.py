"""What `remanence speech cpc` hears: recordings, who speaks, what is held out."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.kit.audio import (
    Heard,
    Recording,
    list_recordings,
    read_audio,
    speakers_of,
    treatment,
)
from remanence.kit.progress import bar
from remanence.kit.words import counted
from remanence.speech.cpc.sampler import WindowBatch, WindowSampler
from remanence.speech.cpc.windows import Piece

IN_MEMORY = 4 * 2**30  # bytes of float32 samples; what is larger stays on disk
MARGIN = 0.05  # seconds around what is resampled, longer than the filter
VALID_FRACTION = 0.05
THREADS, AHEAD = 4, 8  # of reading from disk


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


class Waves:
    """Samples of recordings at one rate, in memory where they fit, else read when asked for.

    Args:
        recordings: The recordings; channels are averaged.
        sample_rate: Rate to bring them to.
        in_memory: Bytes that may be kept.
        show: Show progress.

    Attributes:
        lengths: Samples of each at that rate.
        kept: Whether they are in memory.
        heard: What was noticed on reading them into memory.

    Raises:
        InputError: A recording is broken, or holds NaN.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        sample_rate: int,
        *,
        in_memory: int = IN_MEMORY,
        show: bool = True,
    ) -> None:
        self.recordings, self.sample_rate = tuple(recordings), sample_rate
        self.lengths = [r.frames * sample_rate // r.sample_rate for r in recordings]
        self.kept = 4 * sum(self.lengths) <= in_memory
        self.heard = Heard()
        self._waves: list[Tensor] = []
        if self.kept:
            with bar("recordings", len(self.recordings), show=show) as progress:
                for recording in self.recordings:
                    self._waves.append(read_audio(recording, sample_rate=sample_rate))
                    self.heard.add(self._waves[-1])
                    progress.advance()
            self.lengths = [len(wave) for wave in self._waves]

    def whole(self, recording: int) -> Tensor:
        """Return all samples of a recording (T,), float32."""
        if self.kept:
            return self._waves[recording]
        return read_audio(self.recordings[recording], sample_rate=self.sample_rate)

    def window(self, pieces: Sequence[Piece]) -> Tensor:
        """Return the samples of pieces, one after the other (T,), float32."""
        if self.kept:
            return torch.cat([self._waves[p.recording][p.start : p.stop] for p in pieces])
        return torch.cat([self._read(piece) for piece in pieces])

    def batches(
        self, given: Iterator[WindowBatch]
    ) -> Generator[tuple[WindowBatch, Tensor], None, None]:
        """Yield batches with their samples (B, T), those on disk read ahead."""

        def load(batch: WindowBatch) -> tuple[WindowBatch, Tensor]:
            return batch, torch.stack([self.window(pieces) for pieces in batch.windows])

        if self.kept:
            yield from map(load, given)
            return
        with ThreadPoolExecutor(THREADS) as pool:
            coming: deque[Future[tuple[WindowBatch, Tensor]]] = deque()
            try:
                for batch in given:
                    coming.append(pool.submit(load, batch))
                    if len(coming) > AHEAD:
                        yield coming.popleft().result()
                while coming:
                    yield coming.popleft().result()
            finally:
                for future in coming:
                    future.cancel()

    def _read(self, piece: Piece) -> Tensor:
        recording = self.recordings[piece.recording]
        # Resampling goes on the same grid as over the whole recording: `ours` samples of ours are
        # `theirs` of the file's.
        common = math.gcd(recording.sample_rate, self.sample_rate)
        ours, theirs = self.sample_rate // common, recording.sample_rate // common
        margin = math.ceil(MARGIN * common) if ours != theirs else 0
        first = max(0, piece.start // ours - margin)
        last = min(-(-recording.frames // theirs), -(-piece.stop // ours) + margin)
        try:
            wave, _ = soundfile.read(
                recording.path,
                start=first * theirs,
                stop=min(last * theirs, recording.frames),
                dtype="float32",
                always_2d=True,
            )
        except (soundfile.LibsndfileError, OSError) as error:
            raise InputError(f"recording {recording.path} cannot be read any more") from error
        wave = wave.mean(1)
        if not np.isfinite(wave).all():
            raise InputError(
                f"recording {recording.path} holds NaN or infinite samples: repair or leave it out"
            )
        if ours != theirs:
            wave = soxr.resample(wave, recording.sample_rate, self.sample_rate, quality="VHQ")
        begin = piece.start - first * ours
        wave = wave[begin : begin + piece.stop - piece.start]
        if len(wave) < piece.stop - piece.start:
            raise InputError(f"recording {recording.path} is shorter than its header says")
        return torch.from_numpy(np.ascontiguousarray(wave))


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
    if not waves.kept:
        said.append(
            f"more than {IN_MEMORY / 2**30:.0f} GB of samples: windows are read from disk, and not "
            "looked at for clipping"
        )
    return said
