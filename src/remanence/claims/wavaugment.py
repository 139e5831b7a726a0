"""WavAugment: a recogniser that heard noise and rooms in training errs less in them.

Settings were chosen on seeds 0 and 1; the seeds of the claim were drawn afterwards and run once.
A matching augmentation must lower the error by 30 % or more, with an interval above 0, and err
less than a wrong one: clipping, for noise and reverberation also help against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from remanence.claims.claim import Claim
from remanence.claims.synthetic_speech import WORDS, SyntheticSpeech, synthesise
from remanence.kit.report import Cell, Report, curve_figure
from remanence.speech.wavaugment.band_reject import band_reject
from remanence.speech.wavaugment.noise import add_noise
from remanence.speech.wavaugment.pitch import pitch_shift
from remanence.speech.wavaugment.random import RandomClip, RandomNoise, RandomReverb
from remanence.speech.wavaugment.reverb import convolve_room, reverb

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from remanence.speech.wavaugment.augmentation import Augmentation

RATE = 8000
CLIP = 5600  # samples of a word
PAUSE_MS = 350.0
VOICES, UNHEARD = 10, 8  # to train on, to test
SEEDS = (2, 3, 4, 5)
EPOCHS = 12
BATCH = 64
COPIES = 2  # augmented copies of the training words, one an epoch in turn
RATIOS = (0.0, 5.0, 10.0, 20.0)  # dB, of the noisy tests
SNR = 5.0  # dB, of the one that decides
ARMS = ("nothing", "noise", "reverberation", "clipping")
CLEAN, NOISY, ROOM, OTHER_ROOM = "clean", "noise", "reverberation", "another kind of room"
MATCHING = {NOISY: "noise", ROOM: "reverberation"}
WRONG = "clipping"
LEAST = 30.0  # %, relative drop of the error
DRAWS = 10_000


class Check(NamedTuple):
    """An effect held against what it must give.

    Attributes:
        name: What was measured.
        expected: What theory says.
        found: What the effect gave.
        tolerance: How far they may lie apart.
        unit: Of all three.
    """

    name: str
    expected: float
    found: float
    tolerance: float
    unit: str

    @property
    def holds(self) -> bool:
        """Whether they agree."""
        return abs(self.found - self.expected) <= self.tolerance


@dataclass(frozen=True)
class _Measured:
    """What was measured.

    Attributes:
        checks: The effects against closed forms.
        errors: By (trained with, tested in): share of each test voice's words that were taken for
            others (seeds, voices).
        words: Words a seed trains on, and is tested on.
    """

    checks: Sequence[Check]
    errors: dict[tuple[str, str], NDArray[np.float64]]
    words: tuple[int, int]

    def error(self, arm: str, test: str) -> float:
        """Mean error, %."""
        return 100 * float(self.errors[arm, test].mean())

    def drop(self, arm: str, test: str) -> tuple[float, float, float]:
        """Relative drop of the error against training with nothing, with its interval, %."""
        return _with_interval(
            lambda with_, without: 100 * (1 - with_ / without),
            self.errors[arm, test],
            self.errors["nothing", test],
        )

    def beyond(self, test: str) -> tuple[float, float, float]:
        """Error of the wrong augmentation less that of the matching one, points."""
        return _with_interval(
            lambda wrong, right: 100 * (wrong - right),
            self.errors[WRONG, test],
            self.errors[MATCHING[test], test],
        )


def _with_interval(
    of: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    a: NDArray[np.float64],
    b: NDArray[np.float64],
) -> tuple[float, float, float]:
    """Return a figure of two mean errors with its 95 % interval, over seeds and their voices.

    Seeds are drawn with replacement, then voices of each: a seed's voices share one network.
    """
    seeds, voices = a.shape
    rng = np.random.default_rng(0)
    seed = rng.integers(seeds, size=(DRAWS, seeds, 1))
    voice = rng.integers(voices, size=(DRAWS, seeds, voices))
    drawn = of(a[seed, voice].mean((1, 2)), b[seed, voice].mean((1, 2)))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(of(a.mean(), b.mean())), float(low), float(high)


def wavaugment_claim() -> Claim:
    """Measure what arXiv 2007.00991 needs of its effects, on synthetic speech."""
    parts = [_errors(seed) for seed in SEEDS]
    errors = {key: np.stack([part[0][key] for part in parts]) for key in parts[0][0]}
    return _claim(_Measured(_checks(), errors, parts[0][1]))


def _claim(measured: _Measured) -> Claim:
    right = sum(check.holds for check in measured.checks)
    holds = right == len(measured.checks) and all(
        measured.drop(arm, test)[0] >= LEAST
        and measured.drop(arm, test)[1] > 0
        and measured.beyond(test)[1] > 0
        for test, arm in MATCHING.items()
    )
    gains = "; ".join(
        f"{test}: error {measured.error('nothing', test):.1f} % without, "
        f"{measured.error(arm, test):.1f} % with it, "
        + "{:.0f} % less (95 % interval {:.0f} to {:.0f})".format(*measured.drop(arm, test))
        for test, arm in MATCHING.items()
    )
    wrong = "; ".join(
        f"in {test}: {measured.error(WRONG, test):.1f} %, "
        + "{:+.1f} points (95 % interval {:+.1f} to {:+.1f})".format(*measured.beyond(test))
        for test in MATCHING
    )
    return Claim(
        system="wavaugment",
        paper="Data augmenting contrastive learning of speech representations in the time domain: "
        "WavAugment (2007.00991)",
        sentence="Waveforms augmented with noise and reverberation make a network robust to them, "
        "and each effect does what its definition says.",
        measured=f"{right} of {len(measured.checks)} figures of the effects agree with theory. "
        f"Words heard in {gains}. Mean of {len(SEEDS)} seeds.",
        control=f"The wrong augmentation, {WRONG}, {wrong} over the matching one. Clean words: "
        + ", ".join(f"{measured.error(arm, CLEAN):.1f} % ({arm})" for arm in ARMS)
        + ".",
        holds=holds,
        data=f"synthetic speech made by this project: {len(WORDS)} invented words; each seed "
        f"trains on {measured.words[0]} words of {VOICES} voices and is tested once on "
        f"{measured.words[1]} words of {UNHEARD} other voices, in other noise and rooms",
        details=lambda report: _details(report, measured),
    )


def _errors(
    seed: int,
) -> tuple[dict[tuple[str, str], NDArray[np.float64]], tuple[int, int]]:
    """Train one recogniser with each augmentation, and test each on words of new voices."""
    generator = torch.Generator().manual_seed(seed)
    # Other seeds are other voices, texts and noises.
    speech = synthesise(10 * seed, voices=VOICES, recordings=4, words=12, pause=PAUSE_MS)
    unheard = synthesise(10 * seed + 1, voices=UNHEARD, recordings=3, words=12, pause=PAUSE_MS)
    words, labels = speech.clips(CLIP)
    answers = unheard.clips(CLIP)[1]
    tests = _tests(unheard, _noises(10 * seed + 3), generator)
    augmentations: dict[str, Augmentation | None] = {
        "nothing": None,
        "noise": RandomNoise(_noises(10 * seed + 2), (0.0, 15.0), p=0.75),
        "reverberation": RandomReverb(RATE, reverberance=(30.0, 90.0), p=0.75),
        WRONG: RandomClip((0.1, 0.6), p=0.75),
    }
    errors = {}
    for arm, augmentation in augmentations.items():
        copies = [
            log_mel(words if augmentation is None else augmented(augmentation, words, generator))
            for _ in range(1 if augmentation is None else COPIES)
        ]
        network = _trained(copies, labels, seed)
        with torch.no_grad():
            for test, heard in tests.items():
                wrong = network(heard).argmax(1) != answers  # voice by voice
                errors[arm, test] = wrong.double().view(UNHEARD, -1).mean(1).numpy()
    return errors, (len(words), len(answers))


def augmented(effect: Augmentation, words: Tensor, generator: torch.Generator) -> Tensor:
    """Augment clips (N, T), each by its own draw."""
    out: Tensor = effect(words[:, None], generator=generator)
    return out[:, 0]


def _tests(
    speech: SyntheticSpeech, noises: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return log-mel features of the test words: clean, in noise, in two kinds of rooms."""
    words = speech.clips(CLIP)[0]
    # An echo is of what was said before, so that rooms hear whole recordings.
    rooms = {
        ROOM: RandomReverb(RATE, room=(0, 100), reverberance=(50.0, 90.0), always=True),
        OTHER_ROOM: None,
    }
    heard = {
        CLEAN: words,
        **{f"{r:.0f} dB": augmented(RandomNoise(noises, r), words, generator) for r in RATIOS},
    }
    heard[NOISY] = heard[f"{SNR:.0f} dB"]
    for name, room in rooms.items():
        waves = {}
        for recording, wave in speech.waves.items():
            if room is not None:
                waves[recording] = room(wave, generator=generator)
            else:
                waves[recording] = convolve_room(wave, _impulse_response(generator))
        echoing = SyntheticSpeech(RATE, waves, speech.voices, speech.phones, speech.words)
        heard[name] = echoing.clips(CLIP)[0]
    return {name: log_mel(clips) for name, clips in heard.items()}


def _impulse_response(generator: torch.Generator) -> Tensor:
    """Return a room that no freeverb is: direct sound, then noise that dies away."""
    seconds = 0.3 + 0.5 * torch.rand(1, generator=generator)  # until 60 dB below
    time = torch.arange(RATE // 2) / RATE
    tail = torch.randn(len(time), generator=generator) * 10 ** (-3 * time / seconds)
    tail[: RATE // 200] = 0
    response: Tensor = 0.8 * tail / tail.norm()
    response[0] = 1
    return response


def _noises(seed: int) -> Tensor:
    """Return eight noises of three seconds: half of them babble, half hiss of some colour."""
    generator = torch.Generator().manual_seed(seed)
    samples = 3 * RATE
    speech = synthesise(seed, voices=16, recordings=1, words=12)
    voices = torch.stack([wave[:samples] / wave[:samples].std() for wave in speech.waves.values()])
    babble = voices.reshape(4, 4, samples).sum(1)
    slope = torch.rand(4, 1, generator=generator)
    spectrum = torch.fft.rfft(torch.randn(4, samples, generator=generator))
    spectrum /= torch.arange(1, spectrum.shape[1] + 1) ** slope
    hiss = torch.fft.irfft(spectrum, samples)
    noises = torch.cat([babble, hiss])
    return 0.1 * noises / noises.std(1, keepdim=True)


def log_mel(clips: Tensor) -> Tensor:
    """Return log-mel features (N, 32, frames), every 10 ms, each clip's own level taken off."""
    from librosa.filters import mel

    filters = torch.from_numpy(mel(sr=RATE, n_fft=256, n_mels=32))
    spectrum = torch.stft(
        clips, 256, hop_length=80, window=torch.hann_window(256), return_complex=True
    )
    features = (filters @ spectrum.abs().square() + 1e-6).log()
    features = features - features.mean((1, 2), keepdim=True)
    return features / features.std((1, 2), keepdim=True)


def _trained(copies: list[Tensor], labels: Tensor, seed: int) -> nn.Module:
    """Train a small convolutional network; every arm takes the same number of steps."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    network = nn.Sequential(
        nn.Conv1d(32, 48, 5, stride=2),
        nn.BatchNorm1d(48),
        nn.ReLU(),
        nn.Conv1d(48, 64, 5, stride=2),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Conv1d(64, 64, 3),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, len(WORDS)),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.01, fused=True)
    steps = EPOCHS * math.ceil(len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for epoch in range(EPOCHS):
        features = copies[epoch % len(copies)]
        for batch in torch.randperm(len(labels), generator=order).split(BATCH):  # type: ignore[no-untyped-call]  # of torch
            loss = functional.cross_entropy(network(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # of torch
            optimizer.step()
            schedule.step()
    return network.eval()


def _checks() -> list[Check]:
    """Measure effects whose outcome a formula gives."""
    checks = []
    impulse = torch.zeros(8 * RATE, dtype=torch.float64)
    impulse[0] = 1
    for reverberance in (0.0, 50.0, 80.0):
        feedback = _feedback(reverberance)
        found = float(reverb(impulse, RATE, reverberance=reverberance, room=50.0).sum())
        expected = 1 + 0.12 / (1 - feedback)
        name = f"sum of the reverberation's impulse response, reverberance {reverberance:.0f} %"
        checks.append(Check(name, expected, found, 1e-4 * expected, ""))
    time = torch.arange(2 * RATE, dtype=torch.float64) / RATE
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * time)
    checks += [
        Check(
            f"pitch of a tone of 440 Hz, {cents:+d} cents",
            440 * 2 ** (cents / 1200),
            _frequency(pitch_shift(tone, RATE, float(cents))),
            1.0,
            "Hz",
        )
        for cents in (-300, 100, 300)
    ]
    wave = next(iter(synthesise(0, voices=1, recordings=1).waves.values())).double()
    noise = torch.randn(len(wave), generator=torch.Generator().manual_seed(0)).double()
    for ratio in (-5.0, 5.0, 20.0):
        added = add_noise(wave, noise, ratio) - wave
        found = 10 * math.log10(float(wave.square().sum() / added.square().sum()))
        checks.append(Check(f"noise at {ratio:.0f} dB, measured", ratio, found, 1e-3, "dB"))
    # What the design rule of sox leaves of the middle of a band, at 16 kHz.
    seconds = torch.arange(16000, dtype=torch.float64) / 16000
    for low, high, depth in ((1000, 2000, -122.6), (120, 300, -19.7), (7900, 7990, -10.3)):
        middle = torch.sin(2 * torch.pi * (low + high) / 2 * seconds)
        left = band_reject(middle, 16000, float(low), float(high))[4000:12000]
        found = 10 * math.log10(float(left.square().sum() / middle[4000:12000].square().sum()))
        checks.append(
            Check(f"a tone amid the rejected band {low}-{high} Hz", depth, found, 0.1, "dB")
        )
    return checks


def _feedback(reverberance: float) -> float:
    a = -1 / math.log(1 - 0.3)
    b = 100 / (math.log(1 - 0.98) * a + 1)
    return 1 - math.exp((reverberance - b) / (a * b))


def _frequency(tone: Tensor) -> float:
    """Return the frequency of the highest peak, Hz, between bins by a parabola."""
    size = 1 << 17
    level = torch.fft.rfft(tone * torch.hann_window(len(tone)).double(), size).abs().log()
    top = int(level.argmax())
    left, middle, right = level[top - 1 : top + 2].tolist()
    return float(top + 0.5 * (left - right) / (left - 2 * middle + right)) * RATE / size


def _details(report: Report, measured: _Measured) -> None:
    report.figure(
        curve_figure(
            {
                f"trained with {arm}": (
                    RATIOS,
                    [measured.error(arm, f"{ratio:.0f} dB") for ratio in RATIOS],
                    None,
                    None,
                )
                for arm in ARMS
            },
            "speech over noise, dB",
            "error, %",
        ),
        f"Errors in telling {len(WORDS)} words of synthetic speech apart in noise, mean of "
        f"{len(SEEDS)} seeds. {SNR:.0f} dB decides the claim.",
        "error against the level of noise by what was trained with",
    )
    tests = (CLEAN, NOISY, ROOM, OTHER_ROOM)
    report.table(
        ["trained with", *(f"tested {test}, error %" for test in tests)],
        [
            [
                arm,
                *(
                    Cell(measured.error(arm, test), "best" if MATCHING.get(test) == arm else None)
                    for test in tests
                ),
            ]
            for arm in ARMS
        ],
        f"Synthetic words, mean of {len(SEEDS)} seeds; marked is the matching augmentation. Noise "
        f"is babble and hiss at {SNR:.0f} dB; rooms of another kind are noise that dies away, not "
        "the reverberation that augments.",
    )
    report.table(
        ["effect", "expected", "found", "unit", "agrees"],
        [
            [
                check.name,
                check.expected,
                check.found,
                check.unit,
                Cell("yes") if check.holds else Cell("no", "bad"),
            ]
            for check in measured.checks
        ],
        "What theory says of an effect and what it gave. The depths of bands follow from the "
        "design rule of the program sox.",
    )
