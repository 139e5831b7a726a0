"""Race of the ABX error: ours against fastabx, on the same frames, items and cells.

Whole words of real recordings (MFCC), and items of the length of phones, of several speakers in
several contexts (drawn). The errors must agree to 1e-6 before anything is timed. Ours is timed with
its checks of the features, fastabx without the making of its dataset; a lap includes the listing of
all cells. A process for each shows its peak of memory and, in its first lap, what compiling takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import harness
from remanence.speech.abx.cells import fixed_subsample
from remanence.speech.abx.items import Items
from remanence.speech.abx.score import run

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NAME = r"(?P<phone>[0-9])_(?P<speaker>[a-z]+)_"
SIDES = ("within", "across")
AGREE = 1e-6
SUBSAMPLE = 500  # items
GATHER = "FASTABX_GATHER_CHUNK_ROWS"


@dataclass(frozen=True)
class Course:
    """Features of files, and items that are whole files.

    Attributes:
        title: What they are.
        features: Frames (T, D) of each file.
        items: The items.
    """

    title: str
    features: dict[str, Tensor]
    items: Items


def words(data: Path, takes: int) -> Course:
    """Open spoken digits as MFCC, each a whole word."""
    from remanence.kit.audio import mfcc, read_audio
    from remanence.kit.recordings import list_recordings

    features = {}
    for recording in list_recordings(data / "spoken_digits" / "recordings"):
        if int(recording.name.rpartition("_")[2]) < takes:
            features[recording.name] = mfcc(read_audio(recording), recording.sample_rate)
    items = Items.from_file_names(features, NAME)
    return Course(f"{len(items):,} spoken digits", features, items)


def phones(speakers: int, contexts: int, tokens: int, dim: int) -> Course:
    """Draw items of 5 to 20 frames, near the mean of their phone."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, dim)).astype("f4")
    keys = ("file", "phone", "prev", "next", "speaker")
    columns: dict[str, list[str]] = {key: [] for key in keys}
    features = {}
    for context in range(contexts):
        some = rng.choice(40, 5, replace=False)
        for speaker in range(speakers):
            for phone in rng.choice(some, tokens):
                name = f"f{len(features)}"
                noise = rng.normal(size=(rng.integers(5, 21), dim)).astype("f4")
                features[name] = torch.from_numpy(centres[phone] + 6 * noise)
                row = (name, f"p{phone}", f"l{context}", "r", f"s{speaker}")
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(value)
    items = Items.from_table(columns)
    return Course(f"{len(items):,} phones of {speakers} speakers", features, items)


def ours(course: Course, speaker: str) -> tuple[float, int]:
    """Return the error by ours, and the number of cells."""
    result = run(course.features, course.items, frame_rate=100, speaker=speaker)
    return result.error, len(result.cells)


def prepare_peer(course: Course) -> Callable[[str], tuple[float, int]]:
    """Make a dataset of fastabx, and return how to score it."""
    import fastabx
    import polars as pl

    items = course.items
    rows = [course.features[name] for name in items.file]
    ends = np.cumsum([len(row) for row in rows]).tolist()
    index = dict(enumerate(zip([0, *ends[:-1]], ends, strict=True)))
    frames = torch.cat(rows)
    labels = pl.DataFrame(
        {name: getattr(items, name).tolist() for name in ("phone", "prev", "next", "speaker")}
    )

    def score(speaker: str) -> tuple[float, int]:
        # Its score normalises the frames in place.
        accessor = fastabx.InMemoryAccessor(index, frames.clone(), torch.device("cpu"))
        dataset = fastabx.Dataset(labels, accessor)
        by = ["prev", "next"] + ["speaker"] * (speaker == "within")
        across = ["speaker"] if speaker == "across" else None
        task = fastabx.Task(dataset, on="phone", by=by, across=across)
        found = fastabx.Score(task, "angular", progress=False)
        return found.collapse(levels=[("prev", "next"), "speaker"]), len(task)

    return score


def narrow(score: Callable[[str], tuple[float, int]], speaker: str) -> tuple[float, int]:
    """Score with fastabx's own setting against padding: no two groups share a table."""
    os.environ[GATHER] = "1"
    try:
        return score(speaker)
    finally:
        del os.environ[GATHER]


def lap(score: Callable[[], tuple[float, int]]) -> harness.Lap:
    """Time one score."""
    began, spent = time.perf_counter(), time.process_time()
    error, cells = score()
    seconds, spent = time.perf_counter() - began, time.process_time() - spent
    facts = {"seconds": seconds, "of processors": spent, "error, %": 100 * error}
    return harness.Lap(cells, seconds, facts)


def courses(asked: argparse.Namespace) -> dict[str, Callable[[], Course]]:
    """List what is raced."""
    return {
        "words": partial(words, asked.data, asked.takes),
        "phones": partial(phones, asked.speakers, asked.contexts, asked.tokens, asked.dim),
    }


def alone(name: str, contestant: str, side: str) -> dict[str, float]:
    """Run two laps in a process of its own; return their seconds and the peak of memory."""
    given = [word for word in sys.argv[1:] if not word.startswith("--json")]
    command = [sys.executable, __file__, *given, "--alone", name, contestant, side]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - this script
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(name: str, contestant: str, side: str, asked: argparse.Namespace) -> None:
    """Print what a process of one contestant needs."""
    torch.set_num_threads(asked.threads)
    course = courses(asked)[name]()
    score: Callable[[str], tuple[float, int]] = partial(ours, course)
    if contestant != "ours":
        peer = prepare_peer(course)
        score = peer if contestant == "fastabx" else partial(narrow, peer)
    _peak()
    laps = [lap(partial(score, side)).seconds for _ in range(2)]
    print(json.dumps({"first": laps[0], "second": laps[1], "peak": _peak()}))


def _peak() -> float:
    """Return the most memory that this process held since it last asked, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")  # begins anew
    return int(found.split()[1]) / 1024


def main() -> None:
    """Race the errors within and across speakers on each course."""
    options = harness.parser(__doc__)
    options.add_argument("--data", type=Path, default=harness.SHARED)
    options.add_argument("--takes", type=int, default=50, help="of each word and speaker")
    options.add_argument("--speakers", type=int, default=20)
    options.add_argument("--contexts", type=int, default=60)
    options.add_argument("--tokens", type=int, default=10, help="of each speaker and context")
    options.add_argument("--dim", type=int, default=256)
    options.add_argument("--only", choices=["words", "phones"], help="one course")
    options.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.alone:
        measure(*asked.alone, asked)
        return
    facts = harness.environment(["torch", "fastabx", "torchdtw", "numba"], asked.threads)
    torch.set_num_threads(asked.threads)
    races = []
    for name, make in courses(asked).items():
        if asked.only not in {None, name}:
            continue
        course = make()
        peer = prepare_peer(course)
        for side in SIDES:
            (a, cells), (b, theirs) = ours(course, side), peer(side)
            print(f"{course.title}, {side}: ours {a:.9f}, fastabx {b:.9f}, {cells:,} cells")
            assert cells == theirs, (cells, theirs)
            assert abs(a - b) < AGREE, (a, b)
            contestants = {
                "ours": partial(ours, course, side),
                "fastabx": partial(peer, side),
                "fastabx, group by group": partial(narrow, peer, side),
            }
            races.append(
                harness.race(
                    f"{course.title}, {side} speakers, {asked.threads} threads",
                    {key: partial(lap, score) for key, score in contestants.items()},
                    asked,
                    unit="cells/s",
                )
            )
            for contestant in contestants:
                found = alone(name, contestant, side)
                print(
                    f"{contestant}, alone: first lap {found['first']:.2f} s, second "
                    f"{found['second']:.2f} s, peak {found['peak']:,.0f} MiB"
                )
                facts[f"{course.title}, {side}, {contestant}"] = found
        for side in SIDES:
            some = fixed_subsample(course.items, SUBSAMPLE, speaker=side)
            began = time.perf_counter()
            error = run(course.features, some, frame_rate=100, speaker=side).error
            print(
                f"fixed subsample, {side}: {len(some)} of {len(course.items):,} items, "
                f"{time.perf_counter() - began:.2f} s, error {100 * error:.2f} %"
            )
    harness.finish(races, facts, asked)


if __name__ == "__main__":
    main()
