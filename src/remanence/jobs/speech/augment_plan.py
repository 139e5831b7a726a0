"""What `speech augment` will write: outputs, the pieces of long ones, and batches of like length.

The plan follows from the recordings and the options alone, whichever process reads it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remanence.errors import InputError
from remanence.kit.recordings import Recording

FADE_SECONDS = 0.02  # over which the pieces of a long recording overlap


@dataclass(frozen=True)
class Output:
    """One recording to write.

    Attributes:
        recording: What it is made of.
        copy: Number of the copy.
        name: Path below `audio/`, without suffix.
        sample_rate: Its rate.
        chain: Its chain, as text.
        drawn: Its line of an earlier `params.jsonl`, to replay; None to draw.
    """

    recording: Recording
    copy: int
    name: str
    sample_rate: int
    chain: str
    drawn: dict[str, Any] | None = None

    @property
    def frames(self) -> int:
        """Samples of a channel, at its rate; one too many perhaps where it is resampled."""
        return -(-self.recording.frames * self.sample_rate // self.recording.sample_rate)


@dataclass(frozen=True)
class Batch:
    """Outputs that are made together.

    Attributes:
        number: Of the batch.
        outputs: Of one rate, one number of channels, one chain and about one length.
        width: Samples to which their pieces are filled up with zeros.
        rows: How many pieces are augmented at once.
    """

    number: int
    outputs: tuple[Output, ...]
    width: int
    rows: int


def fresh_outputs(
    recordings: Sequence[Recording], chain: str, copies: int, sample_rate: int | None
) -> list[Output]:
    """Every copy of every recording."""
    return [
        Output(
            recording,
            copy,
            recording.name if copies == 1 else f"{recording.name}_copy{copy}",
            sample_rate or recording.sample_rate,
            chain,
        )
        for recording in recordings
        for copy in range(copies)
    ]


def replayed_outputs(
    path: Path, recordings: Sequence[Recording], broken: Container[str]
) -> list[Output]:
    """The outputs of an earlier run, by its `params.jsonl`.

    Args:
        path: The file.
        recordings: Those that can be read.
        broken: Names of those that cannot, whose lines are left out.

    Raises:
        InputError: The file is no such thing, or tells of a recording that is not there.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise InputError(f"--replay {path}: cannot be read ({reason})") from error
    there = {recording.name: recording for recording in recordings}
    outputs = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            name, copy = str(row["recording"]), int(row["copy"])
            written = Path(row["output"]).relative_to("audio").with_suffix("").as_posix()
            rate, chain = int(row["sample_rate"]), str(row["chain"])
            known = all(int(piece["stop"]) and piece["params"] for piece in row["pieces"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--replay {path}, line {number}: is no line of a params.jsonl ({error!r})"
            ) from error
        if ".." in Path(written).parts or not known:
            raise InputError(f"--replay {path}, line {number}: names no file of a run")
        if name in broken:
            continue
        if name not in there:
            raise InputError(f"--replay {path}, line {number}: there is no recording {name!r}")
        outputs.append(Output(there[name], copy, written, rate, chain, row))
    if not outputs:
        raise InputError(f"--replay {path}: holds no line; give the params.jsonl of a run")
    name, times = Counter(output.name for output in outputs).most_common(1)[0]
    if times > 1:
        raise InputError(f"--replay {path}: writes {name} twice; drop one of the lines")
    return outputs


def cut(frames: int, sample_rate: int, piece_seconds: float) -> list[tuple[int, int]]:
    """First sample and end of the pieces of a recording, which overlap by the cross-fade.

    Args:
        frames: Its samples.
        sample_rate: Its rate.
        piece_seconds: Longest piece, but for the overlap.

    Returns:
        One piece, or several of about one length.
    """
    count = max(1, -(-frames // max(1, int(piece_seconds * sample_rate))))
    edges = [frames * k // count for k in range(count + 1)]
    overlap = fade_samples(sample_rate)
    return [(edges[k], min(frames, edges[k + 1] + overlap)) for k in range(count)]


def fade_samples(sample_rate: int) -> int:
    """Samples of the cross-fade between two pieces."""
    return int(FADE_SECONDS * sample_rate)


def plan(
    outputs: Sequence[Output],
    most_samples: Callable[[Output, int], int],
    batch_seconds: float,
    piece_seconds: float,
) -> list[Batch]:
    """Divide outputs into batches.

    Args:
        outputs: What to write.
        most_samples: With how many samples a piece of an output and of so many may end.
        batch_seconds: Audio augmented at once, channels added up and padding counted; one piece
            at least.
        piece_seconds: Length from which recordings are cut.
    """

    def kind(output: Output) -> tuple[str, int, int, bool, int]:
        pieces = cut(output.frames, output.sample_rate, piece_seconds)
        longest = max(stop - start for start, stop in pieces)
        width = _width(most_samples(output, longest) + 1)
        channels = output.recording.channels
        return output.chain, output.sample_rate, channels, len(pieces) > 1, width

    groups: dict[tuple[str, int, int, bool, int], list[Output]] = {}
    for output in outputs:
        groups.setdefault(kind(output), []).append(output)
    batches: list[Batch] = []
    for (_, rate, channels, long, width), members in sorted(groups.items(), key=lambda g: g[0]):
        rows = max(1, int(batch_seconds * rate) // (width * channels))
        size = 1 if long else rows  # a recording in pieces fills batches of its own
        batches += [
            Batch(len(batches) + k, tuple(members[i : i + size]), width, rows)
            for k, i in enumerate(range(0, len(members), size))
        ]
    return batches


def _width(samples: int) -> int:
    """The next of eight lengths an octave: like lengths share a shape, a tenth is padding."""
    step = 1 << max(6, samples.bit_length() - 4)
    return -(-samples // step) * step
