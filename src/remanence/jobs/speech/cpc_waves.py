"""Samples of the recordings that `remanence speech cpc` hears, in memory or on disk."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.kit.audio import Heard, read_audio
from remanence.kit.progress import bar
from remanence.kit.recordings import Recording
from remanence.speech.cpc.sampler import WindowBatch
from remanence.speech.cpc.windows import Piece

FULL_SCALE = 2**15  # of 16-bit samples
MARGIN = 0.05  # seconds around what is resampled, longer than the filter
THREADS, AHEAD = 4, 8  # of reading from disk


class Waves:
    """Samples of recordings at one rate: the first ones in memory, as many as fit, others on disk.

    In memory a sample takes two bytes where 16 bits hold a recording exactly, as they do most files
    that need no resampling, else four.

    Args:
        recordings: The recordings; channels are averaged.
        sample_rate: Rate to bring them to.
        in_memory: Bytes that may be kept.
        show: Show progress.

    Attributes:
        lengths: Samples of each at that rate.
        kept: How many are in memory.
        bytes: What they take.
        heard: What was noticed on reading them into memory.

    Raises:
        InputError: A recording is broken, or holds NaN.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        sample_rate: int,
        *,
        in_memory: float = math.inf,
        show: bool = True,
    ) -> None:
        self.recordings, self.sample_rate = tuple(recordings), sample_rate
        self.lengths = [r.frames * sample_rate // r.sample_rate for r in recordings]
        self.bytes = 0
        self.heard = Heard()
        self._waves: list[Tensor] = []
        # At two bytes a sample; where some take four, fewer fit.
        most = int(np.searchsorted(2 * np.cumsum(self.lengths), in_memory, side="right"))
        with bar("recordings", most, show=show and most > 0) as progress:
            for recording in self.recordings[:most]:
                wave = read_audio(recording, sample_rate=sample_rate)
                kept = _in_16_bits(wave)
                if self.bytes + kept.nbytes > in_memory:
                    break
                self._waves.append(kept)
                self.bytes += kept.nbytes
                self.heard.add(wave)
                progress.advance()
        self.kept = len(self._waves)
        self.lengths[: self.kept] = [len(wave) for wave in self._waves]

    @property
    def bytes_of_all(self) -> float:
        """About what all would take in memory, judged by those that are there."""
        known = sum(self.lengths[: self.kept])
        return sum(self.lengths) * (self.bytes / known if known else 4)

    def whole(self, recording: int) -> Tensor:
        """Return all samples of a recording (T,), float32."""
        if recording < self.kept:
            return _as_floats(self._waves[recording])
        return read_audio(self.recordings[recording], sample_rate=self.sample_rate)

    def window(self, pieces: Sequence[Piece]) -> Tensor:
        """Return the samples of pieces, one after the other (T,), float32."""
        return torch.cat([self._piece(piece) for piece in pieces])

    def batches(
        self, given: Iterator[WindowBatch]
    ) -> Generator[tuple[WindowBatch, Tensor], None, None]:
        """Yield batches with their samples (B, T), those on disk read ahead."""

        def load(batch: WindowBatch) -> tuple[WindowBatch, Tensor]:
            return batch, torch.stack([self.window(pieces) for pieces in batch.windows])

        if self.kept == len(self.recordings):
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

    def _piece(self, piece: Piece) -> Tensor:
        if piece.recording < self.kept:
            return _as_floats(self._waves[piece.recording][piece.start : piece.stop])
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


def _in_16_bits(wave: Tensor) -> Tensor:
    """Return samples as int16 where these are the same, else as they are."""
    scaled = wave * FULL_SCALE
    low, high = scaled.aminmax()
    if low < -FULL_SCALE or high >= FULL_SCALE or not torch.equal(scaled, scaled.round()):
        return wave
    return scaled.to(torch.int16)


def _as_floats(wave: Tensor) -> Tensor:
    return wave.float() / FULL_SCALE if wave.dtype == torch.int16 else wave
