"""Samples of recordings: read, looked at, written, and their cepstra."""

from __future__ import annotations

import io
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.kit.recordings import Recording, open_recording, reason
from remanence.kit.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable

FRAME_RATE = 100  # MFCC frames a second
FULL_SCALE = 1 - 2.0**-15  # the largest sample of 16 bits


def read_audio(
    recording: Recording | Path, *, sample_rate: int | None = None, mono: bool = True
) -> Tensor:
    """Read a recording, full scale 1.

    Args:
        recording: What to read.
        sample_rate: Rate to bring it to (soxr, very high quality); None leaves its own.
        mono: Whether to average the channels.

    Returns:
        float32 (T,) where mono, else (C, T).

    Raises:
        InputError: The file is empty, cut off, unreadable, or holds NaN or infinite samples. (An
            Ogg file cut off between two of its pages passes for a shorter recording.)
    """
    if isinstance(recording, Path):
        recording = open_recording(recording, recording.stem)
    try:
        wave, rate = soundfile.read(recording.path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise InputError(f"recording {recording.path} cannot be read: {reason(error)}") from None
    if len(wave) < recording.frames:
        raise InputError(
            f"recording {recording.path} is cut off: {len(wave)} of {recording.frames} samples"
        )
    if not np.isfinite(wave).all():
        bad = int((~np.isfinite(wave)).any(1).argmax())
        raise InputError(
            f"recording {recording.path} holds NaN or infinite samples, the first at "
            f"{bad / rate:.3f} s: repair or leave it out"
        )
    if mono:
        wave = wave.mean(1, keepdims=True) if wave.shape[1] > 1 else wave
    if sample_rate is not None and sample_rate != rate:
        wave = soxr.resample(wave, rate, sample_rate, quality="VHQ")
    return torch.from_numpy(np.ascontiguousarray(wave[:, 0] if mono else wave.T))


@dataclass
class Heard:
    """Counts what the samples of recordings turned out to be.

    Attributes:
        full_scale: Recordings that touch full scale, and may have been clipped.
        silent: Recordings with nothing in them.
    """

    full_scale: int = 0
    silent: int = 0

    def add(self, wave: Tensor) -> None:
        """Look at the samples (T,) or (C, T) of one recording."""
        low, high = (float(edge) for edge in wave.aminmax())
        self.full_scale += max(-low, high) >= FULL_SCALE
        self.silent += low == high == 0

    def remarks(self) -> list[str]:
        """Say what there is to say."""
        said = []
        if self.full_scale:
            some = counted(self.full_scale, "recording")
            said.append(f"{some} {_are(self.full_scale)} at full scale, and may have been clipped")
        if self.silent:
            said.append(f"{counted(self.silent, 'recording')} {_are(self.silent)} silent")
        return said


def treatment(
    recordings: Iterable[Recording], sample_rate: int | None, *, mono: bool = True
) -> list[str]:
    """Say what reading does to recordings: resampling, and what becomes of their channels.

    Args:
        recordings: The recordings.
        sample_rate: Rate that all are brought to; None where each keeps its own.
        mono: Whether channels are averaged.
    """
    every = list(recordings)
    rates = Counter(r.sample_rate for r in every if r.sample_rate != (sample_rate or r.sample_rate))
    said = []
    for own, count in sorted(rates.items()):
        said.append(
            f"{counted(count, 'recording')} of {own:,} Hz {_are(count)} resampled to "
            f"{sample_rate:,} Hz"
        )
        if own < (sample_rate or 0):
            said[-1] += f", and {'holds' if count == 1 else 'hold'} nothing above {own // 2:,} Hz"
    if several := sum(r.channels > 1 for r in every):
        done = "averaged" if mono else "all kept"
        said.append(f"the channels of {counted(several, 'recording')} are {done}")
    return said


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def write_wav(path: Path, wave: Tensor, sample_rate: int, *, subtype: str = "PCM_16") -> int:
    """Write a recording whole or not at all; the suffix says the format (.wav, .flac, ...).

    Args:
        path: File to write.
        wave: (T,) or (C, T), full scale 1.
        sample_rate: Samples a second.
        subtype: libsndfile's name of the sample format, such as `PCM_16`, `PCM_24` or `FLOAT`.

    Returns:
        How many samples lay beyond full scale and were cut there; 0 for floats, which keep them.

    Raises:
        InputError: The format does not take the subtype.
        OSError: The file cannot be written.
    """
    major = path.suffix[1:].upper()
    if not soundfile.check_format(major, subtype):
        raise InputError(
            f"{path.suffix} does not hold {subtype} samples: give one of "
            f"{', '.join(soundfile.available_subtypes(major)) or 'no subtype of it; write .wav'}"
        )
    values = wave.detach().cpu().float().numpy()
    whole = subtype not in {"FLOAT", "DOUBLE"}
    beyond = int((np.abs(values) > 1).sum()) if whole else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    encoded = io.BytesIO()  # libsndfile says nothing where a full disk lacks room for a flac's end
    soundfile.write(
        encoded,
        np.clip(values, -1, 1).T if whole else values.T,
        sample_rate,
        subtype=subtype,
        format=major,
    )
    try:
        partial.write_bytes(encoded.getbuffer())
        partial.replace(path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
    return beyond


def mfcc(wave: Tensor, sample_rate: int, *, coefficients: int = 13, deltas: bool = False) -> Tensor:
    """Mel-frequency cepstral coefficients, their mean over the recording taken off.

    Pre-emphasis 0.97, Hamming windows of 25 ms every 10 ms, 23 mel bands, liftering with 22. The
    first window is centred at 5 ms, so that frame i tells of (i + 0.5) * 10 ms, as the frames of a
    convolution with stride 10 ms do.

    Args:
        wave: (T,), full scale 1.
        sample_rate: Samples a second, a multiple of 100.
        coefficients: How many, the zeroth among them.
        deltas: Whether to append first and second differences over time.

    Returns:
        float32 (S, D), S = max(1, T // 10 ms), D = coefficients, or three times as many.

    Raises:
        InputError: 10 ms are no whole number of samples.
    """
    if sample_rate % FRAME_RATE:
        raise InputError(f"MFCC at {sample_rate} Hz: give a multiple of 100, such as 16000")
    import librosa

    hop, window = sample_rate // FRAME_RATE, sample_rate // 40
    size = 1 << (window - 1).bit_length()
    pad, short = size - hop, max(0, hop - len(wave))
    # Kaldi's settings: without the lifter, ABX errors of spoken digits are twice as high.
    samples = wave.double().numpy()
    samples = np.append(samples[:1], samples[1:] - 0.97 * samples[:-1])
    power = librosa.feature.melspectrogram(
        y=np.pad(samples, (pad // 2, pad - pad // 2 + short)),
        sr=sample_rate,
        n_fft=size,
        win_length=window,
        hop_length=hop,
        window="hamming",
        center=False,
        n_mels=23,
        htk=True,
    )
    found = librosa.feature.mfcc(S=librosa.power_to_db(power), n_mfcc=coefficients, lifter=22)
    found = found - found.mean(1, keepdims=True)
    if deltas:
        more = [librosa.feature.delta(found, order=k, mode="nearest") for k in (1, 2)]
        found = np.concatenate([found, *more])
    return torch.from_numpy(np.ascontiguousarray(found.T, np.float32))
