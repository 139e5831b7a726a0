"""Features of recordings, by name: a folder of files, or a network over recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.speech.encoders import (
    RATE,
    Encoder,
    check_frame_rate,
    is_network,
    open_encoder,
)
from remanence.jobs.speech.feature_files import (
    feature_files,
    hold_times,
    read_features,
    read_times,
    written_rate,
)
from remanence.kit.audio import Heard, read_audio, treatment
from remanence.kit.progress import bar, say
from remanence.kit.recordings import Recording, list_recordings
from remanence.speech.abx.items import WHOLE, Items, most_common

LOOKED_AT = 50  # files whose features are held against their items
FAR = 1.6  # times that all features outlast their items, from which the frame rate is doubtful
SLACK = 3  # frames by which a file's features may miss its duration, as without padding
TOGETHER = 16  # recordings of similar length that a network sees at a time


class Features(Mapping[str, Tensor]):
    """Features (S, D) of each file, read or computed when asked for, and checked then.

    Floats are float32; integers (ids of units, also of shape (S,)) are int64.

    Attributes:
        names: Of the files, sorted.
        rate: Frames a second; where files say when their frames are, how many follow each other.
        description: What they are, in words.
        seconds: Durations, where the recordings are known.
        recordings: The recordings, where they are known, by name.
        remarks: What was done to the recordings on the way, in words.
    """

    def __init__(
        self,
        names: Iterable[str],
        load: Callable[[Sequence[str]], list[Tensor]],
        rate: float,
        description: str,
        recordings: Mapping[str, Recording] | None = None,
        *,
        keep: bool = False,
        heard: Heard | None = None,
        times: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Keep what is needed to load.

        Args:
            names: Of the files.
            load: From names to features.
            rate: Frames a second.
            description: What they are, in words.
            recordings: By name, where they are known.
            keep: Whether features stay in memory once loaded, for those that cost time.
            heard: What `load` notices of samples, for `prepare` to remark on.
            times: From a name to the centres of its frames in seconds (S,), where they are known.
        """
        self.names = tuple(sorted(names))
        self.rate = rate
        self.description = description
        self.recordings = dict(recordings or {})
        self.seconds = {name: r.seconds for name, r in self.recordings.items()}
        self._names = frozenset(self.names)
        self._load, self._keep, self._heard = load, keep, heard or Heard()
        self._times = times
        self._kept: dict[str, Tensor] = {}
        self._first: tuple[str, int, bool] | None = None
        self.remarks: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._kept[name] if name in self._kept else self._read([name])[0]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def require(self, names: Iterable[str]) -> None:
        """Refuse names without features.

        Raises:
            InputError: Names up to three of them and says how many more there are.
        """
        lacking = [name for name in dict.fromkeys(names) if name not in self._names]
        if lacking:
            raise InputError(
                f"{self.description}: no features of {most_common(lacking)}; there are "
                f"{len(self.names):,} files such as {self.names[0]!r}"
            )

    @property
    def timed(self) -> bool:
        """Whether files say when their frames are."""
        return self._times is not None

    def when(self, names: Iterable[str]) -> dict[str, Any]:
        """Return `times` of these files or `frame_rate`, as `slice_frames` and `run` take them."""
        if self._times is None:
            return {"frame_rate": self.rate}
        return {"times": {name: self._times(name) for name in names}}

    def prepare(self, names: Iterable[str] | None = None, *, show: bool = True) -> None:
        """Compute the features of these files now, those of similar length together.

        Nothing happens where they are read from files. Remarks on clipped and silent recordings.
        """
        if not self._keep:
            return
        wanted = [n for n in dict.fromkeys(self.names if names is None else names)
                  if n not in self._kept]  # fmt: skip
        self.require(wanted)
        wanted.sort(key=lambda name: self.seconds.get(name, 0.0))
        with bar("features", len(wanted), show=show and bool(wanted)) as progress:
            for i in range(0, len(wanted), TOGETHER):
                part = wanted[i : i + TOGETHER]
                self._read(part)
                progress.advance(len(part))
        for remark in self._heard.remarks():
            if remark not in self.remarks:
                self.remarks.append(remark)
                if show:
                    say(remark)

    def _read(self, names: Sequence[str]) -> list[Tensor]:
        found = self._load(names)
        checked = [self.check(name, frames) for name, frames in zip(names, found, strict=True)]
        if self._keep:
            self._kept.update(zip(names, checked, strict=True))
        return checked

    def check(self, name: str, frames: Tensor) -> Tensor:
        """Return a file's features as `features[name]` gives them.

        Raises:
            InputError: They are not (S, D), hold NaN, or fit neither the other files' nor the
                recording's duration.
        """
        whole = not frames.is_floating_point()
        if whole and frames.ndim == 1:
            frames = frames.unsqueeze(1)
        if frames.ndim != 2 or 0 in frames.shape:
            raise InputError(
                f"features of {name!r} have shape {tuple(frames.shape)}: give (frames, dimension)"
            )
        frames = frames.long() if whole else frames.float()
        if not whole and not bool(frames.isfinite().all()):
            raise InputError(f"features of {name!r} hold NaN or infinity: check what made them")
        first = self._first or (name, frames.shape[1], whole)
        self._first = first
        if (frames.shape[1], whole) != first[1:]:
            kinds = {True: "integers", False: "floats"}
            raise InputError(
                f"features of {name!r} are {frames.shape[1]} {kinds[whole]} a frame, of "
                f"{first[0]!r} {first[1]} {kinds[first[2]]}: use one encoder for all"
            )
        seconds = self.seconds.get(name)
        if seconds is not None and self._times is not None:
            end = float(self._times(name)[-1])
            if end > seconds + SLACK / self.rate:
                raise InputError(
                    f"the last frame of {name!r} is at {end:.2f} s of {seconds:.2f} s: check its "
                    "times"
                )
        elif seconds is not None and abs(len(frames) - seconds * self.rate) > SLACK:
            raise InputError(
                f"features of {name!r} have {len(frames):,} frames for {seconds:.2f} s, which is "
                f"{seconds * self.rate:,.0f} at {self.rate:g} a second, and missing padding "
                f"explains {SLACK} at most: check --frame-rate and file"
            )
        return frames


def open_features(
    features: str,
    *,
    audio: str | None = None,
    frame_rate: float | None = None,
    sample_rate: int | None = None,
    layer: str = "context",
    chunk: float | None = None,
    strict: bool = False,
    seq_norm: bool = False,
    device: torch.device | str = "cpu",
) -> Features:
    """Open features of frames.

    Args:
        features: A folder of .npy, .npz, .pt or .txt files, each named like its recording; a run
            of `speech extract`, all shares of it where it was shared out; or, with `audio`, `mfcc`,
            a CPC run folder, or FILE.py:FUNCTION.
        audio: The recordings: what `kit.recordings.list_recordings` takes. With a folder of files
            they serve to check durations.
        frame_rate: Frames a second of files, or of FILE.py:FUNCTION; if None the `times` in .npz
            files, what `speech extract` wrote down, else 100.
        sample_rate: See `open_encoder`; as `layer`, `chunk`, `strict` and `seq_norm`.
        layer: See there.
        chunk: See there.
        strict: See there.
        seq_norm: See there.
        device: Where a network runs.

    Raises:
        InputError: There are none, two files have one name, some hold times and some do not, or an
            option does not go with them.
    """
    if not is_network(features) or (
        features == "mfcc" and audio is None and Path(features).is_dir()
    ):
        if layer != "context" or chunk is not None or strict or seq_norm or sample_rate is not None:
            raise InputError(
                f"{features}: holds features, or nothing; --layer, --chunk, --strict, --seq-norm "
                "and --sample-rate are for networks"
            )
        check_frame_rate(frame_rate)
        recordings = {} if audio is None else {r.name: r for r in list_recordings(audio)}
        return _stored(features, frame_rate, recordings)
    if audio is None:
        raise InputError(f"{features}: turns recordings into features; give them with --audio")
    encoder = open_encoder(
        features,
        layer=layer,
        chunk=chunk,
        strict=strict,
        seq_norm=seq_norm,
        frame_rate=frame_rate,
        sample_rate=sample_rate,
        device=device,
    )
    return encoded(encoder, list_recordings(audio))


def rate_doubt(items: Items, features: Features) -> str:
    """Say so where all features go on long after their last item, as at a wrong frame rate."""
    if features.seconds or features.timed or not len(items) or (items.offset == WHOLE).any():
        return ""
    files, place = np.unique(items.file.astype(str), return_inverse=True)
    ends = np.zeros(len(files))
    np.maximum.at(ends, place.ravel(), items.offset / items.ticks)
    some = np.linspace(0, len(files) - 1, min(len(files), LOOKED_AT)).astype(int)
    ratios = [len(features[files[i]]) / (ends[i] * features.rate) for i in some if ends[i]]
    if not ratios or min(ratios) < FAR:
        return ""
    return (
        f"features last {np.median(ratios):.1f} times as long as the items reach, in every file "
        f"looked at: is a frame rate of {features.rate:g} a second right?"
    )


def encoded(
    encoder: Encoder, recordings: Sequence[Recording], *, keep: bool = True, show: bool = True
) -> Features:
    """Return the features that an encoder gives recordings.

    Args:
        encoder: What makes them.
        recordings: Of what.
        keep: Whether they stay in memory once computed.
        show: Whether to remark on what is odd.
    """
    by_name = {r.name: r for r in recordings}
    said = treatment(recordings, encoder.sample_rate)
    for remark in said if show else []:
        say(remark)

    def load(names: Sequence[str]) -> list[Tensor]:
        chosen = [by_name[name] for name in names]
        waves = read_waves(encoder, chosen)
        for wave in waves:
            heard.add(wave)
        return encode(encoder, chosen, waves)

    heard = Heard()
    found = Features(by_name, load, encoder.rate, encoder.name, by_name, keep=keep, heard=heard)
    found.remarks += said
    return found


def read_waves(encoder: Encoder, recordings: Sequence[Recording]) -> list[Tensor]:
    """Return the waves (T,) of recordings, at the rate that the encoder takes.

    Raises:
        InputError: One cannot be read, or is too short for a frame.
    """
    waves = []
    for recording in recordings:
        wave = read_audio(recording, sample_rate=encoder.sample_rate)
        if len(wave) < encoder.least:
            raise InputError(
                f"recording {recording.path} is too short for one frame: {len(wave)} of "
                f"{encoder.least} samples; leave it out"
            )
        waves.append(wave)
    return waves


def encode(
    encoder: Encoder, recordings: Sequence[Recording], waves: Sequence[Tensor]
) -> list[Tensor]:
    """Return the features (S, D) of the waves of recordings, as `read_waves` gives them."""
    takes = encoder.sample_rate
    if encoder.together:
        assert takes is not None
        return encoder.encode(waves, takes)
    rates = [takes or recording.sample_rate for recording in recordings]
    return [encoder.encode([w], rate)[0] for w, rate in zip(waves, rates, strict=True)]


def _stored(source: str, rate: float | None, recordings: Mapping[str, Recording]) -> Features:
    files = feature_files(source)
    if recordings and not recordings.keys() & files.keys():
        raise InputError(
            f"{source}: no file is named like a recording, as {next(iter(files))!r} and "
            f"{next(iter(recordings))!r} show; name features like their recordings"
        )
    timed = rate is None and hold_times(files)
    rate = rate or written_rate(files)
    if timed and rate is None:
        steps = (np.diff(read_times(path)) for path in files.values())
        rate = next((round(1 / float(np.median(s)), 6) for s in steps if (s > 0).any()), None)
    found = Features(
        files,
        lambda names: [read_features(files[name]) for name in names],
        rate or RATE,
        source,
        {name: r for name, r in recordings.items() if name in files},
        times=(lambda name: read_times(files[name])) if timed else None,
    )
    if timed:
        found.remarks.append("frames lie where the times in their files say")
    return found
