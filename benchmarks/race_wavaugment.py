"""Race of WavAugment's effects (arXiv 2007.00991) on spoken digits, on the CPU.

Clips of 1.28 s at 16 kHz, cut from the recordings of a speaker one after another. In each race
ours, sox 14.4.2, pedalboard, audiomentations and torch-audiomentations apply one effect of the
same strength, each clip by its own amount, with one thread or process and with two. A rate is
seconds of audio a second. Each peer goes the quickest way that it has:

- sox: a process a clip, 32-bit floats through pipes; with two threads two processes at once. "one
  pipe" sends all clips through one process as one recording: its best case, as all clips then
  share one amount and run into each other.
- pedalboard: one board on float32 arrays, parameters set for each clip, state reset before each
  (its default); with two threads two boards, as it lets go of the interpreter's lock.
- audiomentations: a clip a call, parameters set; with two threads two processes that read and
  write shared memory.
- torch-audiomentations: the batch a call, `per_example`, with its own draws. It reads noise and
  impulse responses by functions that torchaudio has dropped: here it gets them from memory.
  Its import of torchaudio is refused where torch was built for another CUDA release, which no
  operator on the CPU depends on: that check is answered for it.

Not the same in every peer:

- pitch: ours and sox are WSOLA; pedalboard is Rubber Band, audiomentations Signalsmith Stretch,
  torch-audiomentations a phase vocoder that only knows a few ratios.
- reverb: ours and sox are sox's freeverb, 50 / 50 / room; pedalboard is JUCE's freeverb of the
  same size and damping. audiomentations and torch-audiomentations convolve with our response cut
  at the clip's length.
- noise: babble from memory at 5..15 dB. sox and audiomentations read it from files in the page
  cache; pedalboard has no such effect, so numpy adds it.
- band reject: ours, sox and pedalboard's `Convolution` are the same 323 taps; its `PeakFilter` is
  one biquad as deep at the band's middle; audiomentations is a Butterworth filter of 24 dB an
  octave, torch-audiomentations a windowed sinc.
- chain: pitch, noise, reverb. sox takes two processes a clip, with the noise added between.

Peers whose cost a clip does not depend on the batch are timed on a part of it. "dB to sox" is the
median agreement with sox's samples.

What bounds ours on one core, for a clip of 20480 samples: bytes never do (80 KiB stay in cache);
operations do. Splices: 22 searches of 235 offsets by 192 samples in float64, 1.0 million squares.
Resampling: 20480 outputs of 204 taps at two phases, 8.4 million multiply-adds. Reverb: 16 combs
and 8 all-passes, half a million steps of three operations. Band reject: two transforms of five
blocks of 4500 samples, 2.7 million operations. At 40 billion float32 multiply-adds a second, half
as many in float64 and 10 billion operations of a transform: 0.05, 0.2, 0.1 and 0.25 ms at most.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise, product
from multiprocessing import shared_memory
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import audiomentations
import numpy as np
import pedalboard
import soundfile
import soxr
import torch

import harness
from remanence.speech.wavaugment.band_reject import reject_taps
from remanence.speech.wavaugment.chain import Chain
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.random import (
    RandomBandReject,
    RandomNoise,
    RandomPitch,
    RandomReverb,
)
from remanence.speech.wavaugment.reverb import reverb

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    OneClip = Callable[[int], Floats]

RATE = 16000
EFFECTS = ("pitch", "reverb", "noise", "band reject", "chain")
RAW = ["-t", "raw", "-r", str(RATE), "-e", "float", "-b", "32", "-c", "1"]
# Clips on which a peer that takes them one by one is timed; a multiple of the threads.
PART = {"pitch": 8, "reverb": 32, "noise": 32, "band reject": 32, "chain": 8}
LAP_SECONDS = 0.1  # at least
SOX = {
    "pitch": "pitch {cents} rate 16000",
    "quick pitch": "pitch -q {cents} rate -q 16000",
    "reverb": "reverb 50 50 {room} channels 1",
    "band reject": "sinc -a 120 {high_hz}-{low_hz}",
}


def torch_audiomentations() -> Any:
    """Import it past torchaudio's comparison of CUDA releases."""
    built_for = torch.version.cuda
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torch_audiomentations as module
        except RuntimeError as error:
            wanted = str(error).partition("TorchAudio has CUDA version ")[2].split()
            if not wanted:
                raise
            for name in [name for name in sys.modules if name.startswith("torchaudio")]:
                del sys.modules[name]
            torch.version.cuda = wanted[0].rstrip(".")
            import torch_audiomentations as module
        finally:
            torch.version.cuda = built_for
    return module


def recordings(data: Path, seconds: float, count: int) -> Floats:
    """Return clips (N, T): every speaker's recordings one after another, in equal shares."""
    paths = sorted((data / "recordings").glob("*.wav"))
    if not paths:
        raise SystemExit(f"no recordings in {data}/recordings")
    speakers = sorted({path.stem.split("_")[1] for path in paths})
    time_, share = round(seconds * RATE), -(-count // len(speakers))
    rows: list[Floats] = []
    for speaker in speakers:
        own = [path for path in paths if path.stem.split("_")[1] == speaker]
        pieces, have = [], 0
        for path in own[:: max(1, len(own) // 250)] + own[1::2]:
            wave, rate = soundfile.read(path, dtype="float32")
            pieces.append(soxr.resample(wave, rate, RATE, quality="VHQ"))
            have += len(pieces[-1])
            if have >= share * time_:
                break
        rows.extend(np.concatenate(pieces)[: share * time_].reshape(-1, time_))
    return np.ascontiguousarray(np.stack(rows[:: max(1, len(rows) // count)][:count]))


class Course:
    """Clips, noise, and every clip's own amounts."""

    def __init__(self, clips: Floats, folder: Path) -> None:
        self.clips, self.folder = clips, folder
        count, time_ = clips.shape
        generator = torch.Generator().manual_seed(0)
        rng = np.random.default_rng(0)
        long = clips.ravel()
        cut = min(5 * RATE, len(long) // 2)
        starts = rng.integers(0, len(long) - cut, (20, 6))
        # Babble: six voices at once.
        bank = [sum(long[s : s + cut] for s in six) / 6 for six in starts]
        self.noise = np.stack(bank).astype(np.float32)
        noise = RandomNoise(torch.from_numpy(self.noise))
        self.ours = {
            "pitch": RandomPitch(RATE),
            "quick pitch": RandomPitch(RATE, quality="quick", search="quick"),
            "reverb": RandomReverb(RATE),
            "noise": noise,
            "band reject": RandomBandReject(RATE),
        }
        self.ours["chain"] = Chain([self.ours[n] for n in ("pitch", "noise", "reverb")])
        self.params = {
            name: effect.sample(count, time_, generator) for name, effect in self.ours.items()
        }
        self.params["quick pitch"] = self.params["pitch"]
        self.params["chain"] = Params.nest(
            {str(i): self.params[n] for i, n in enumerate(("pitch", "noise", "reverb"))}
        )
        self.amounts = {
            name: value.tolist()
            for params in self.params.values()
            for name, value in params.values.items()
        }
        for name, rows in (("noise", self.noise), ("room", self.responses(time_))):
            (folder / name).mkdir(exist_ok=True)
            for i, row in enumerate(rows):
                soundfile.write(folder / name / f"{i:03}.wav", row, RATE, subtype="FLOAT")
        (folder / "cut").mkdir(exist_ok=True)
        for i in range(count):
            self.noise_of(i).tofile(folder / "cut" / f"{i}.raw")

    @staticmethod
    def responses(time_: int) -> Floats:
        """Our reverb's responses in 100 rooms, (100, T)."""
        click = torch.zeros(100, 1, time_)
        click[..., 0] = 1
        found: Floats = reverb(click, RATE, room=torch.arange(100))[:, 0].numpy()
        return found

    def amount(self, name: str, i: int) -> float:
        """One clip's amount of `cents`, `room`, `low_hz` ..."""
        value: float = self.amounts[name][i]
        return value

    def noise_of(self, i: int) -> Floats:
        """The noise that is drawn for a clip, (T,)."""
        start = int(self.amount("offset", i))
        cut = self.noise[int(self.amount("clip", i))][start : start + self.clips.shape[1]]
        return np.resize(cut, self.clips.shape[1])

    def gain(self, wave: Floats, i: int) -> float:
        """The factor of the noise that makes the drawn ratio."""
        noise = self.noise_of(i)
        ratio = float(np.dot(wave, wave)) / max(float(np.dot(noise, noise)), 1e-30)
        return math.sqrt(ratio) * 10 ** (-self.amount("snr_db", i) / 20)

    def add_noise(self, wave: Floats, i: int) -> Floats:
        """The noise added by numpy."""
        mixed: Floats = wave + np.float32(self.gain(wave, i)) * self.noise_of(i)
        return mixed


def sox(wave: Floats, effects: str, *before: str) -> Floats:
    """Run the program on one array."""
    command = ["sox", "-D", *before, *RAW, "-", *(before and ()), *RAW, "-", *effects.split()]
    done = subprocess.run(command, input=wave.tobytes(), stdout=subprocess.PIPE, check=True)  # noqa: S603 - our own arguments
    return np.frombuffer(done.stdout, np.float32)


def sox_mix(course: Course, i: int) -> Floats:
    """Add a clip's noise by sox."""
    wave = course.clips[i]
    gain = f"{course.gain(wave, i):.9g}"
    noise = str(course.folder / "cut" / f"{i}.raw")
    command = ["sox", "-D", "-m", "-v", "1", *RAW, "-", "-v", gain, *RAW, noise, *RAW, "-"]
    done = subprocess.run(command, input=wave.tobytes(), stdout=subprocess.PIPE, check=True)  # noqa: S603 - our own arguments
    return np.frombuffer(done.stdout, np.float32)


def sox_clip(course: Course, effect: str) -> OneClip:
    """Return what sox makes of the i-th clip."""

    def words(name: str, i: int) -> str:
        return SOX[name].format(**{key: row[i] for key, row in course.amounts.items()})

    def chain(i: int) -> Floats:
        shifted = sox(course.clips[i], words("pitch", i))
        shifted = np.resize(np.append(shifted, 0), course.clips.shape[1]).astype(np.float32)
        return sox(course.add_noise(shifted, i), words("reverb", i))

    if effect == "noise":
        return partial(sox_mix, course)
    if effect == "chain":
        return chain
    return lambda i: sox(course.clips[i], words(effect, i))


def pedalboard_clip(course: Course, effect: str) -> OneClip:
    """Return what pedalboard makes of the i-th clip; a new board each time this is called."""
    shift = pedalboard.Pedalboard([pedalboard.PitchShift()])
    room = pedalboard.Pedalboard([pedalboard.Reverb(damping=0.5)])
    peak = pedalboard.Pedalboard([pedalboard.PeakFilter()])

    def pitched(wave: Floats, i: int) -> Floats:
        shift[0].semitones = course.amount("cents", i) / 100
        return shift(wave, RATE)

    def echoed(wave: Floats, i: int) -> Floats:
        room[0].room_size = course.amount("room", i) / 100
        return room(wave, RATE)

    def notched(wave: Floats, i: int) -> Floats:
        low, high = course.amount("low_hz", i), course.amount("high_hz", i)
        peak[0].cutoff_frequency_hz = (low + high) / 2
        peak[0].gain_db = course.amount("depth_db", i)
        peak[0].q = (low + high) / 2 / max(high - low, 1)
        return peak(wave, RATE)

    def convolved(wave: Floats, i: int) -> Floats:
        edges = (torch.tensor([course.amount(k, i)]) for k in ("low_hz", "high_hz"))
        taps = reject_taps(RATE, *edges)[0].float().numpy()
        return pedalboard.Convolution(taps, 1.0, sample_rate=RATE)(wave, RATE)

    steps = {
        "pitch": [pitched],
        "reverb": [echoed],
        "noise": [course.add_noise],
        "band reject": [notched],
        "same taps": [convolved],
        "chain": [pitched, course.add_noise, echoed],
    }[effect]

    def run(i: int) -> Floats:
        wave = course.clips[i]
        for step in steps:
            wave = step(wave, i)
        return wave

    return run


def audiomentations_clip(course: Course, effect: str) -> OneClip:
    """Return what audiomentations makes of the i-th clip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shift = audiomentations.PitchShift(p=1)
        noise = audiomentations.AddBackgroundNoise(course.folder / "noise", 5.0, 15.0, p=1)
        stop = audiomentations.BandStopFilter(p=1, min_rolloff=24, max_rolloff=24)
        room = audiomentations.ApplyImpulseResponse(course.folder / "room", p=1)

    def pitched(wave: Floats, i: int) -> Floats:
        shift.parameters = {"should_apply": True, "num_semitones": course.amount("cents", i) / 100}
        return shift.apply(wave, RATE)

    def mixed(wave: Floats, i: int) -> Floats:
        noise.parameters = {
            "should_apply": True,
            "snr_db": course.amount("snr_db", i),
            "noise_file_path": noise.sound_file_paths[int(course.amount("clip", i))],
            "offset": course.amount("offset", i) / RATE,
            "duration": len(wave) / RATE,
        }
        return noise.apply(wave, RATE)

    def echoed(wave: Floats, i: int) -> Floats:
        path = room.ir_files[int(course.amount("room", i))]
        room.parameters = {"should_apply": True, "ir_file_path": path}
        return room.apply(wave, RATE)

    def stopped(wave: Floats, i: int) -> Floats:
        low, high = course.amount("low_hz", i), course.amount("high_hz", i)
        centre = (low + high) / 2
        stop.randomize_parameters(wave, RATE)
        stop.parameters.update(center_freq=centre, bandwidth=min(high - low, 1.9 * centre))
        return stop.apply(wave, RATE)

    steps = {
        "pitch": [pitched],
        "reverb": [echoed],
        "noise": [mixed],
        "band reject": [stopped],
        "chain": [pitched, mixed, echoed],
    }[effect]

    def run(i: int) -> Floats:
        wave = course.clips[i]
        for step in steps:
            wave = step(wave, i)
        return wave

    return run


class Memory:
    """Clips in the place of torch-audiomentations' reader of files; the rest is its own."""

    def __init__(self, reader: Any, rows: Floats) -> None:
        self.rows, self.rms_normalize = torch.from_numpy(rows)[:, None], reader.rms_normalize

    def get_num_samples(self, path: Path) -> int:
        """Samples of a clip."""
        return int(self.rows[int(path.stem)].shape[-1])

    def __call__(
        self, path: Path, sample_offset: int = 0, num_samples: int | None = None
    ) -> torch.Tensor:
        """Return a clip (1, T), or a part of it."""
        row = self.rows[int(path.stem)]
        return row[:, sample_offset:][:, :num_samples]


def torch_audiomentations_batch(
    course: Course, effect: str, module: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what torch-audiomentations makes of a batch (B, 1, T)."""
    common = {"p": 1.0, "mode": "per_example", "sample_rate": RATE, "output_type": "dict"}

    def build(name: str) -> Any:
        if name == "pitch":
            return module.PitchShift(-3, 3, **common)
        if name == "reverb":
            room = module.ApplyImpulseResponse(course.folder / "room", **common)
            room.audio = Memory(room.audio, course.responses(course.clips.shape[1]))
            return room
        if name == "noise":
            noise = module.AddBackgroundNoise(course.folder / "noise", 5.0, 15.0, **common)
            noise.audio = Memory(noise.audio, course.noise)
            return noise
        return module.BandStopFilter(**common)

    names = ("pitch", "noise", "reverb") if effect == "chain" else (effect,)
    steps = [build(name) for name in names]

    def run(batch: torch.Tensor) -> torch.Tensor:
        for step in steps:
            batch = step(batch, sample_rate=RATE).samples
        return batch

    return run


# What a worker process of audiomentations knows: the course, its functions, and the place to write.
WORKER: dict[str, Any] = {}


def begin_worker(course: Course, place: str) -> None:
    """Attach the shared memory for results, which `WORKER` keeps open."""
    torch.set_num_threads(1)
    memory = shared_memory.SharedMemory(place)
    WORKER["memory"] = memory
    WORKER["course"] = course
    WORKER["out"] = np.ndarray(course.clips.shape, np.float32, memory.buf)


def work(task: tuple[str, int, int]) -> None:
    """Augment some clips in a worker process."""
    effect, start, stop = task
    if effect not in WORKER:
        WORKER[effect] = audiomentations_clip(WORKER["course"], effect)
    for i in range(start, stop):
        WORKER["out"][i] = WORKER[effect](i)


def halves(count: int, threads: int) -> list[tuple[int, int]]:
    """Cut 0..count into a part a thread."""
    edges = [count * i // threads for i in range(threads + 1)]
    return list(pairwise(edges))


def contestants(
    course: Course,
    effect: str,
    batch: int,
    threads: int,
    *,
    pool: ThreadPoolExecutor,
    workers: Any,
    module: Any,
) -> dict[str, tuple[Callable[[], object], int]]:
    """Return of each contestant what one go does, and on how many clips; ours first."""
    clips = torch.from_numpy(course.clips[:batch])[:, None]
    part = min(batch, PART[effect])

    def batched(name: str) -> Callable[[], object]:
        module_, params = course.ours[name], course.params[name][:batch]
        return lambda: module_(clips, params=params)

    def one_by_one(clip: Callable[[], OneClip]) -> Callable[[], object]:
        own = [clip() for _ in range(threads)]

        def run(of: OneClip, start: int, stop: int) -> None:
            for i in range(start, stop):
                of(i)

        if threads == 1:
            return lambda: run(own[0], 0, part)
        starts, stops = zip(*halves(part, threads), strict=True)
        return lambda: list(pool.map(run, own, starts, stops))

    entered = {"ours": (batched(effect), batch)}
    if effect == "pitch":
        entered["ours, quick"] = (batched("quick pitch"), batch)
        quick = one_by_one(lambda: sox_clip(course, "quick pitch"))
    entered["sox"] = (one_by_one(lambda: sox_clip(course, effect)), part)
    if effect == "pitch":
        entered["sox -q"] = (quick, part)
    if effect in SOX:
        words = SOX[effect].format(cents=200, room=50, low_hz=1000, high_hz=2000)
        piped = min(max(batch, threads), 32)
        joined = [course.clips[a:b].ravel() for a, b in halves(piped, threads)]

        def one_pipe() -> object:
            return list(pool.map(lambda wave: sox(wave, words), joined))

        entered["sox, one pipe (one amount)"] = (one_pipe, piped)
    board = {"noise": "numpy (pedalboard has none)", "band reject": "pedalboard PeakFilter"}
    entered[board.get(effect, "pedalboard")] = (
        one_by_one(lambda: pedalboard_clip(course, effect)),
        part,
    )
    if effect == "band reject":
        entered["pedalboard Convolution"] = (
            one_by_one(lambda: pedalboard_clip(course, "same taps")),
            part,
        )
    if threads == 1:
        theirs = one_by_one(lambda: audiomentations_clip(course, effect))
    else:
        tasks = [(effect, *ends) for ends in halves(part, threads)]

        def theirs() -> object:
            return workers.map(work, tasks, chunksize=1)

    entered["audiomentations"] = (theirs, part)
    peer = torch_audiomentations_batch(course, effect, module)
    loops = effect in ("pitch", "chain")  # its pitch goes row by row and is nearly all of the chain
    some = clips[: part if loops else batch]
    entered["torch-audiomentations"] = (lambda: peer(some.clone()), len(some))
    return entered


def lap(
    go: Callable[[], object], clips: int, seconds: float, facts: dict[str, float]
) -> harness.Lap:
    """Do it again and again, until what came before in other threads and caches matters little."""
    done, began = 0, time.perf_counter()
    with torch.no_grad():
        while (spent := time.perf_counter() - began) < LAP_SECONDS:
            go()
            done += clips
    return harness.Lap(done * seconds, spent, facts)


def agreement(course: Course, effect: str, count: int = 16) -> float:
    """Median agreement of ours with sox over some clips, dB."""
    count = min(count, len(course.clips))
    clips = torch.from_numpy(course.clips[:count])[:, None]
    ours = course.ours[effect](clips, params=course.params[effect][:count])[:, 0].double().numpy()
    found = []
    for i, row in enumerate(ours):
        theirs = sox_clip(course, effect)(i)[: len(row)].astype(np.float64)
        error = np.square(theirs - row[: len(theirs)]).sum()
        found.append(10 * math.log10(np.square(theirs).sum() / max(error, 1e-300)))
    return median(found)


def resident(key: str) -> int:
    """Read `VmRSS`, or `VmHWM` (the peak), in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def chain_limits(course: Course) -> None:
    """Print the chain's time on 64 clips with two threads, and its most extra memory."""
    torch.set_num_threads(2)
    count = min(64, len(course.clips))
    clips = torch.from_numpy(course.clips[:count])[:, None]
    chain, params = course.ours["chain"], course.params["chain"][:count]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        chain(clips, params=params)
        times.append(time.perf_counter() - began)
    print(f"chain on {count} clips, 2 threads: {median(times[1:]):.3f} s (target 1.0 s)")
    if Path("/proc/self/clear_refs").exists():
        import ctypes

        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak
        before = resident("VmRSS")
        chain(clips, params=params)
        extra = (resident("VmHWM") - before) / (clips.numel() * clips.element_size())
        print(f"chain, most extra memory: {extra:.1f} times the batch (target 12)")


def main() -> None:
    """Race every effect, thread count and batch."""
    options = harness.parser(__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.set_defaults(rounds=3, warmup=1)
    options.add_argument("--data", type=Path, default=harness.SHARED / "spoken_digits")
    options.add_argument("--seconds", type=float, default=1.28, help="of a clip")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    options.add_argument("--effects", nargs="+", choices=EFFECTS, default=EFFECTS)
    options.add_argument("--counts", type=int, nargs="+", default=[1, 2], help="of threads")
    asked = options.parse_args()
    if shutil.which("sox") is None:
        raise SystemExit("install the program sox")
    module = torch_audiomentations()
    peers = ["torch", "pedalboard", "audiomentations", "torch-audiomentations"]
    facts = harness.environment(peers, max(asked.counts))
    print((__doc__ or "").partition("Not the same")[2].partition("What bounds")[0])

    races: list[harness.Race] = []
    with tempfile.TemporaryDirectory() as folder:
        clips = recordings(asked.data, asked.seconds, max(asked.batches))
        course = Course(clips, Path(folder))
        memory = shared_memory.SharedMemory(create=True, size=clips.nbytes)
        fork = multiprocessing.get_context("fork")
        try:
            with (
                fork.Pool(max(asked.counts), begin_worker, (course, memory.name)) as workers,
                ThreadPoolExecutor(max(asked.counts)) as pool,
            ):
                helpers = {"pool": pool, "workers": workers, "module": module}
                for effect in asked.effects:
                    course_facts = {"dB to sox": agreement(course, effect)}
                    for threads, batch in product(asked.counts, asked.batches):
                        asked.threads = threads
                        torch.set_num_threads(threads)
                        entered = contestants(course, effect, batch, threads, **helpers)
                        laps = {
                            name: partial(
                                lap, *go, asked.seconds, course_facts if name == "ours" else {}
                            )
                            for name, go in entered.items()
                        }
                        title = f"{effect}: batch {batch}, threads {threads}"
                        races.append(harness.race(title, laps, asked, unit="x real time"))
        finally:
            memory.close()
            memory.unlink()
        chain_limits(course)
    summary(races)
    harness.finish(races, facts, asked)


def summary(races: Sequence[harness.Race]) -> None:
    """Print the smallest ratio to any peer of each race."""
    print("\nours over the quickest peer (sox's one pipe, one amount for all, aside)")
    for run in races:
        rows = {n: median(run.ratios(n)) for n in run.laps if n[:4] != "ours" and "pipe" not in n}
        if "sox -q" in rows:  # ours in its own coarse way is what it races
            pairs = zip(run.laps["ours, quick"], run.laps["sox -q"], strict=True)
            rows["sox -q"] = median(ours.rate / theirs.rate for ours, theirs in pairs)
        name = min(rows, key=lambda n: rows[n])
        mark = "" if rows[name] > 1 else "   BEHIND"
        print(f"  {run.title:40} {rows[name]:8.2f}  {name}{mark}")


if __name__ == "__main__":
    main()
