"""Synthetic speech: recordings of invented words by invented voices, made by a source and filters.

A train of glottal pulses and a hiss pass through resonances that move from phone to phone. Voices
differ in pitch, length of the vocal tract, slope of the spectrum, rate and microphone. It sounds
like a toy's voice and is nobody's: every phone's place is known to the sample, and what is measured
on it is measured on synthetic data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy import fft, signal

from remanence.speech.abx.items import Items

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float32]
    Integers = NDArray[np.int64]

PAUSE = "sil"
FLOOR = 0.06  # of each recording's level: hiss of the recording itself
TICK = 200  # control frames a second; phones begin and end on them


class _Phone(NamedTuple):
    """How a phone is made: Hz, levels from 0 to 1, milliseconds."""

    formants: tuple[float, float, float]
    voice: float
    hiss: float
    hiss_at: float
    lasts: float


PHONES = {
    PAUSE: _Phone((500, 1500, 2500), 0.0, 0.0, 2000, 90),
    "a": _Phone((730, 1090, 2440), 1.0, 0.0, 2000, 110),
    "e": _Phone((530, 1840, 2480), 1.0, 0.0, 2000, 110),
    "i": _Phone((270, 2290, 3010), 1.0, 0.0, 2000, 110),
    "o": _Phone((570, 840, 2410), 1.0, 0.0, 2000, 110),
    "u": _Phone((300, 870, 2240), 1.0, 0.0, 2000, 110),
    "l": _Phone((360, 1300, 2700), 0.6, 0.0, 2000, 70),
    "m": _Phone((250, 1100, 2200), 0.5, 0.0, 2000, 70),
    "s": _Phone((320, 1390, 2530), 0.0, 0.25, 3500, 90),
    "S": _Phone((320, 1700, 2500), 0.0, 0.25, 2500, 90),
    "z": _Phone((300, 1390, 2530), 0.5, 0.12, 3500, 80),
}
# Groups of three differ in one phone only, so that phones meet in shared contexts.
WORDS = (
    "sam", "sim", "sum", "laS", "leS", "loS", "mali", "masi", "mazi", "zulo", "zumo", "zuSo",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class SyntheticSpeech:
    """Synthetic recordings and what is said in them, to the sample.

    Attributes:
        sample_rate: Hz.
        waves: Recording's name, `voice/number`, to its samples (T,), float32 in -1..1.
        voices: Recording's name to its voice.
        phones: Recording's name to (onset, offset, phone) in samples, pauses (`sil`) included.
        words: The same with words.
    """

    sample_rate: int
    waves: dict[str, Tensor]
    voices: dict[str, str]
    phones: dict[str, list[tuple[int, int, str]]]
    words: dict[str, list[tuple[int, int, str]]]

    @property
    def seconds(self) -> float:
        """The duration of all recordings."""
        return sum(len(wave) for wave in self.waves.values()) / self.sample_rate

    def phone_items(self) -> Items:
        """Items of all phones, each with its neighbours as context."""
        return self._items(self.phones)

    def word_items(self) -> Items:
        """Items of all words, without context."""
        return self._items(self.words)

    def clips(self, length: int) -> tuple[Tensor, Tensor]:
        """Cut each word out with what surrounds it.

        Args:
            length: Samples of a clip; the word stands in its middle.

        Returns:
            (N, length) float32, silent beyond the recording's ends, and the words' numbers in
            `WORDS` (N,) int64.
        """
        clips, labels = [], []
        for name, wave in self.waves.items():
            padded = torch.nn.functional.pad(wave, (length, length))
            for onset, offset, word in self.words[name]:
                if word != PAUSE:
                    start = length + (onset + offset - length) // 2
                    clips.append(padded[start : start + length])
                    labels.append(WORDS.index(word))
        return torch.stack(clips), torch.tensor(labels)

    def _items(self, tier: Mapping[str, list[tuple[int, int, str]]]) -> Items:
        lines = {
            name: "\n".join(f"{onset} {offset} {label}" for onset, offset, label in intervals)
            for name, intervals in tier.items()
        }
        return Items.from_phn(lines, self.voices, sample_rate=self.sample_rate)


def synthesise(
    seed: int,
    *,
    voices: int = 8,
    recordings: int = 10,
    words: int = 6,
    pause: float = 90.0,
    sample_rate: int = 8000,
) -> SyntheticSpeech:
    """Synthesise recordings of random words; another seed gives other voices and other texts.

    Args:
        seed: Of voices, texts and noise; equal seeds give equal samples.
        voices: Number of voices.
        recordings: Of each voice.
        words: In each recording, with pauses between them; each word is said equally often.
        pause: Between words, ms, give or take a fifth.
        sample_rate: Hz, a multiple of 200.

    Returns:
        The recordings; a word and its pause last about half a second.
    """
    rng = np.random.default_rng(seed)
    names = list(PHONES)
    script = [_script(rng, recordings, words) for _ in range(voices)]
    sentences = [sentence for voice in script for sentence in voice]  # recordings, voice by voice
    spelt = [[PAUSE, *_spell(sentence)] for sentence in sentences]
    phone = np.array([names.index(p) for row in spelt for p in row])
    tokens = np.array([len(row) for row in spelt])
    speaker = np.repeat(np.repeat(np.arange(voices), recordings), tokens)
    rate = np.exp(rng.uniform(-0.18, 0.18, voices))[speaker]
    usual = {name: made.lasts for name, made in PHONES.items()} | {PAUSE: pause}
    lasts = np.array(list(usual.values()))[phone] / rate
    lasts = lasts * np.exp(rng.normal(0, 0.2, len(phone)))
    ticks = np.maximum(np.rint(lasts * TICK / 1000), 5).astype(np.int64)
    hop = sample_rate // TICK
    samples = _sound(rng, phone, speaker, ticks, voices, sample_rate)

    # Where each token begins, counted from the beginning of all.
    edges = np.concatenate([[0], np.cumsum(ticks)]) * hop
    first = np.concatenate([[0], np.cumsum(tokens)])
    waves, owners, phones, said = {}, {}, {}, {}
    for number, (row, sentence) in enumerate(zip(spelt, sentences, strict=True)):
        voice = f"voice{number // recordings}"
        name = f"{voice}/{number % recordings}"
        own = edges[first[number] : first[number + 1] + 1]
        wave = samples[own[0] : own[-1]]
        wave = wave / np.sqrt(np.mean(wave**2)) + FLOOR * rng.standard_normal(len(wave))
        wave = 0.15 * 10 ** (rng.uniform(-2, 2) / 20) * wave
        waves[name] = torch.from_numpy(np.clip(wave, -1, 1, dtype=np.float32))
        owners[name] = voice
        times = (own - own[0]).tolist()
        phones[name] = list(zip(times[:-1], times[1:], row, strict=True))
        said[name] = _word_intervals(times, sentence)
    return SyntheticSpeech(sample_rate, waves, owners, phones, said)


def _script(rng: np.random.Generator, recordings: int, words: int) -> list[list[str]]:
    """Return the words of each recording of a voice, from shuffled copies of the list of words."""
    copies = -(-recordings * words // len(WORDS))
    order = np.concatenate([rng.permutation(len(WORDS)) for _ in range(copies)])
    rows = order[: recordings * words].reshape(recordings, words)
    return [[WORDS[i] for i in row] for row in rows]


def _spell(sentence: list[str]) -> list[str]:
    return [phone for word in sentence for phone in (*word, PAUSE)]


def _word_intervals(times: list[int], sentence: list[str]) -> list[tuple[int, int, str]]:
    """Return the tier of words from the edges of all phones and pauses."""
    intervals = [(times[0], times[1], PAUSE)]
    place = 1
    for word in sentence:
        end = place + len(word)
        intervals += [(times[place], times[end], word), (times[end], times[end + 1], PAUSE)]
        place = end + 1
    return intervals


def _sound(
    rng: np.random.Generator,
    phone: Integers,
    speaker: Integers,
    ticks: Integers,
    voices: int,
    sample_rate: int,
) -> Floats:
    """Return the samples of all tokens (n,), one after the other."""
    table = list(PHONES.values())
    n, hop = len(phone), sample_rate // TICK
    # A voice is a length of vocal tract, a pitch that goes with it, and ways of its own.
    tract = np.exp(rng.uniform(-0.3, 0.3, voices))
    pitch = 140 * tract**1.5 * np.exp(rng.normal(0, 0.2, voices))
    accent = np.exp(rng.normal(0, 0.12, (voices, len(table), 3)))
    formants = np.array([p.formants for p in table])[phone] * tract[speaker, None]
    formants = formants * accent[speaker, phone] * np.exp(rng.normal(0, 0.12, (n, 3)))
    hiss_at = np.array([p.hiss_at for p in table])[phone] * tract[speaker]
    levels = np.array([(p.voice, p.hiss) for p in table])[phone]
    levels = levels * np.exp(rng.normal(0, 0.15, (n, 2)))
    tune = np.log(pitch)[speaker] + rng.normal(0, 0.06, n)

    owner = np.repeat(speaker, ticks)  # (frames,), as all below

    def track(values: NDArray[np.float64], milliseconds: float) -> NDArray[np.float64]:
        """From token to token, smoothly: (frames, ...)."""
        window = np.hanning(round(milliseconds * TICK / 1000) + 2)[1:-1]
        steps = np.repeat(values, ticks, axis=0).reshape(len(owner), -1)
        smooth: NDArray[np.float64] = signal.oaconvolve(
            np.pad(steps, ((len(window) // 2, (len(window) - 1) // 2), (0, 0)), mode="edge"),
            window[:, None] / window.sum(), mode="valid", axes=0,
        )  # fmt: skip
        return smooth

    shake = rng.normal(0, 0.01, len(owner))  # jitter
    cycles = np.repeat(np.exp(track(tune, 120)[:, 0] + shake), hop).cumsum() / sample_rate
    pulses = np.zeros(len(cycles) + 1, dtype=np.float32)
    beat = np.flatnonzero(np.diff(np.floor(cycles)) > 0) + 1
    late = (cycles[beat] % 1) / (cycles[beat] - cycles[beat - 1])  # a pulse falls between samples
    pulses[beat], pulses[beat - 1] = 1 - late, late
    # Glottal pulses fall by 12 dB an octave, and the lips give 6 of them back.
    source = signal.lfilter([1], [1, -0.95], pulses[:-1]).astype(np.float32)
    hiss = rng.standard_normal(len(source), dtype=np.float32)
    voiced, hissing = track(levels, 20).T
    peaks = np.concatenate(
        [track(formants, 70), 3500 * tract[owner, None], track(hiss_at, 30)], axis=1
    )
    return _filtered(
        source, hiss, peaks, voiced, hissing, _microphones(rng, voices, sample_rate)[owner],
        sample_rate,
    )  # fmt: skip


def _microphones(rng: np.random.Generator, voices: int, sample_rate: int) -> Floats:
    """Return the gain of each voice's spectrum (voices, bins): a slope and some ripple."""
    bins = fft.rfftfreq(_length(sample_rate), 1 / sample_rate)
    octaves = np.log2(np.maximum(bins, 100) / 1000)
    slope = rng.uniform(-3, 3, (voices, 1)) * octaves
    ripple = sum(
        rng.uniform(0, 2.5, (voices, 1))
        * np.cos(k * np.pi * bins / bins[-1] + rng.uniform(0, 2 * np.pi, (voices, 1)))
        for k in (2, 4)
    )
    gain: Floats = (10 ** ((slope + ripple) / 20)).astype(np.float32)
    return gain


def _length(sample_rate: int) -> int:
    """Samples of a filtered frame: 10 ms and the ringing of the resonances after it."""
    return 1 << (int(0.03 * sample_rate) - 1).bit_length()


def _filtered(
    source: Floats,
    hiss: Floats,
    peaks: NDArray[np.float64],
    voiced: NDArray[np.float64],
    hissing: NDArray[np.float64],
    microphone: Floats,
    sample_rate: int,
    *,
    chunk: int = 8192,
) -> Floats:
    """Filter each frame of 10 ms by its own resonances and add the frames up, half overlapping.

    Args:
        source: Glottal pulses (frames * hop,).
        hiss: White noise of the same length.
        peaks: Resonances (frames, 5), Hz: four of the voice, and the hiss's.
        voiced: Level of the voice (frames,).
        hissing: Level of the hiss (frames,).
        microphone: Gain (frames, bins).
        sample_rate: Hz.
        chunk: Frames held at once.
    """
    hop, length, frames = sample_rate // TICK, _length(sample_rate), len(peaks)
    window = signal.get_window("hann", 2 * hop).astype(np.float32)
    z = np.exp(-2j * np.pi * np.arange(length // 2 + 1) / length).astype(np.complex64)
    blocks = -(-length // hop)
    out = np.zeros((frames + blocks, hop), dtype=np.float32)

    def resonance(hz: NDArray[np.float64], width: float) -> NDArray[np.complex64]:
        """Two poles each, 1 at 0 Hz, wide where half the sample rate is near: (rows, bins)."""
        high = np.clip(hz / sample_rate / 0.08 - 5, 0, 1)
        radius = np.exp(-np.pi * (width + 3000 * high) / sample_rate)
        angle = 2 * np.pi * np.minimum(hz, 0.48 * sample_rate) / sample_rate
        b = (-2 * radius * np.cos(angle)).astype(np.float32)[:, None]
        c = (radius**2).astype(np.float32)[:, None]
        response: NDArray[np.complex64] = (1 + b + c) / (1 + b * z + c * z * z)
        return response

    for start in range(0, frames - 1, chunk):
        rows = np.arange(start, min(start + chunk, frames - 1))
        at = rows[:, None] * hop + np.arange(2 * hop)
        p = peaks[rows]
        filters = np.ones((len(rows), len(z)), dtype=np.complex64)
        for k, width in enumerate((80, 100, 140, 200)):
            filters *= resonance(p[:, k], width)
        # Speakers close their lips less than a chain of resonances would make it sound.
        filters /= np.abs(filters).max(axis=1, keepdims=True) ** 0.7
        voice = fft.rfft(source[at] * window, length) * filters
        voice *= voiced[rows, None].astype(np.float32)
        noise = fft.rfft(hiss[at] * window, length) * hissing[rows, None].astype(np.float32)
        # A resonance less its own value at 0 Hz: the hiss has no low frequencies.
        band = resonance(p[:, 4], 700)
        noise *= band * (1 - z) / np.abs(band).max(axis=1, keepdims=True)
        made = fft.irfft((voice + noise) * microphone[rows], length)
        made = np.pad(made, ((0, 0), (0, blocks * hop - length))).reshape(len(rows), blocks, hop)
        for block in range(blocks):
            out[rows[0] + block : rows[-1] + 1 + block] += made[:, block]
    return out[:frames].ravel()
