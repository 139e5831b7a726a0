"""Which recordings a source holds: one grammar for every command, headers read by libsndfile.

| written as | is |
|---|---|
| `FILE.wav`, `.flac`, ... | one recording |
| `FOLDER` | every recording below it and below folders linked there, sorted |
| `"FOLDER/*_[0-2].wav"` | those that match (quote it); `**` goes down folders |
| `LIST.txt` | a path a line, from the list's own folder; `#` begins a comment |

A recording's name is its path within the source, without the suffix. Outputs are written under it,
so it never leads out of a folder.
"""

from __future__ import annotations

import glob
import os
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import soundfile

from remanence.errors import InputError
from remanence.kit.progress import track
from remanence.kit.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("wav", "flac", "ogg", "opus", "mp3", "aif", "aiff", "aifc"),
        *("au", "snd", "caf", "w64", "rf64", "nist", "sph", "voc"),
    )
)
MANY = 1000  # recordings whose headers take long enough to read for a bar
UNKNOWN = 2**62  # frames, and more, are those of older libsndfiles that found no end
OGG_PAGE = 27 + 255 + 255 * 255  # the most bytes of one


@dataclass(frozen=True)
class Recording:
    """A recording whose header was read.

    Attributes:
        path: The file.
        name: Its path within the source without the suffix, with forward slashes.
        sample_rate: Samples a second.
        frames: Samples of each channel.
        channels: Channels.
    """

    path: Path
    name: str
    sample_rate: int
    frames: int
    channels: int

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.frames / self.sample_rate


def list_recordings(source: str | Path, *, broken: dict[str, str] | None = None) -> list[Recording]:
    """Return the recordings of a source, in the order of their names (a list: its own order).

    Only headers are read.

    Args:
        source: As above.
        broken: Where given, unreadable recordings are left out and put here, by name with the
            reason.

    Raises:
        InputError: The source holds no recording, one is empty, cut off or unreadable, or two
            share one name.
    """
    paths, root = _paths(str(source))
    if not paths:
        raise InputError(
            f"{source} holds no recordings: give a folder, a file, a quoted glob or a .txt list of "
            f"{', '.join(sorted(SUFFIXES)[:3])}, .wav ... files"
        )
    names = [_name(path, root) for path in paths]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(
            f"{source}: {counted(len(twice), 'name')} {'stands' if len(twice) == 1 else 'stand'} "
            f"for two recordings, such as {twice[0]!r}: rename one, names without suffix tell "
            "recordings apart"
        )
    pairs = list(zip(paths, names, strict=True))
    files = track(pairs, f"headers of {len(paths):,} recordings", show=len(paths) >= MANY)
    found = []
    for path, name in files:
        try:
            found.append(open_recording(path, name))
        except InputError as error:
            if broken is None:
                raise
            broken[name] = str(error)
    return found


def groups_of(names: Iterable[str], pattern: str) -> dict[str, dict[str, str]]:
    """Return what each name tells.

    Args:
        names: Names of recordings.
        pattern: Regular expression for the beginning of a name, with named groups:
            `(?P<phone>[0-9])_(?P<speaker>[a-z]+)_`.

    Raises:
        InputError: The pattern is none, has no group, or does not match a name.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{pattern!r} is no regular expression: {error}") from None
    if not compiled.groupindex:
        raise InputError(f"pattern {pattern!r} has no named group: write (?P<speaker>...)")
    found = {}
    for name in names:
        match = compiled.match(name)
        if match is None:
            raise InputError(f"recording {name!r} does not match {pattern!r}: mend the pattern")
        found[name] = {group: value or "" for group, value in match.groupdict().items()}
    return found


def speakers_of(recordings: Sequence[Recording], names: str | None = None) -> dict[str, str]:
    """Return the speaker of each recording by its name.

    Args:
        recordings: The recordings.
        names: Regular expression with the group `speaker` (see `groups_of`); None takes the first
            folder of each name.

    Raises:
        InputError: The pattern has no such group or does not match, or recordings lie in no folder.
    """
    if names is not None:
        found = groups_of((recording.name for recording in recordings), names)
        if "(?P<speaker>" not in names:
            raise InputError(f"pattern {names!r} has no group (?P<speaker>...): add it")
        return {name: groups["speaker"] for name, groups in found.items()}
    bare = [recording.name for recording in recordings if "/" not in recording.name]
    if bare:
        raise InputError(
            f"no telling who speaks in {bare[0]!r}: put each speaker's recordings in a folder, or "
            "give --names with a group (?P<speaker>...)"
        )
    return {recording.name: recording.name.split("/")[0] for recording in recordings}


def _paths(source: str) -> tuple[list[Path], Path]:
    path = Path(source)
    if path.is_dir():
        return sorted(p for p in _below(path) if _is_audio(p)), path
    if path.suffix.lower() == ".txt" and path.is_file():
        paths = _listed(path)
        folders = [os.path.dirname(os.path.abspath(p)) for p in paths]  # noqa: PTH100, PTH120  # pathlib does not take `..` off
        return paths, Path(os.path.commonpath(folders)) if paths else path.parent
    if path.is_file():
        return [path], path.parent
    matched = sorted(Path(p) for p in glob.glob(source, recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
    if matched:
        fixed = re.split(r"[*?\[]", source, maxsplit=1)[0]
        root = Path(fixed) if fixed.endswith("/") else Path(fixed).parent
        return [p for p in matched if _is_audio(p) and not p.is_dir()], root
    if not path.exists() and glob.escape(source) == source:
        raise InputError(f"{source}: there is no such file or folder")
    return [], path


def _below(folder: Path) -> Iterator[Path]:
    """The files below a folder, and below those linked there; no folder is entered twice."""
    entered, waiting = set(), [folder]
    while waiting:
        for base, folders, files in os.walk(waiting.pop(0)):
            real = os.path.realpath(base)
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            folders.sort()
            yield from (Path(base, name) for name in files)
            # Later than all that lies here itself, which keeps its own name.
            waiting += [linked for name in folders if (linked := Path(base, name)).is_symlink()]


def _listed(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is no UTF-8 text: write a path a line") from None
    paths = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        paths.append(path.parent / line)
        if not paths[-1].is_file():
            raise InputError(f"{path}, line {number}: there is no file {paths[-1]}")
    return paths


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _name(path: Path, root: Path) -> str:
    # `..` is taken off by the letters: what is written under the name stays in its folder.
    inside = Path(os.path.relpath(path, root)).with_suffix("")
    if ".." in inside.parts:
        raise InputError(
            f"recording {path} lies outside of {root}: give a folder that holds both, or a list"
        )
    return inside.as_posix()


def open_recording(path: Path, name: str) -> Recording:
    """Read the header of a file.

    Raises:
        InputError: The file is empty, cut off or unreadable.
    """
    try:
        _check_whole(path)
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, OSError) as error:
        raise InputError(f"recording {path} cannot be read: {reason(error)}") from None
    if info.frames >= UNKNOWN:
        raise InputError(f"recording {path} does not say how long it is: convert it, say to .wav")
    if not info.frames:
        raise InputError(f"recording {path} is empty: record it again or leave it out")
    return Recording(path, name, info.samplerate, info.frames, info.channels)


def _check_whole(path: Path) -> None:
    # libsndfile takes a wav or an Ogg that lacks its end for a shorter one, without a word.
    size = path.stat().st_size
    if not size:
        raise InputError(f"recording {path} is an empty file: record it again or leave it out")
    with path.open("rb") as stream:
        head = stream.read(12)
        if head[:4] == b"OggS":
            stream.seek(max(0, size - OGG_PAGE))
            _check_last_page(stream.read(), path)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return
        while len(chunk := stream.read(8)) == 8:
            kind, length = struct.unpack("<4sI", chunk)
            if kind != b"data":
                stream.seek(length + length % 2, os.SEEK_CUR)
                continue
            # A writer into a pipe does not know the length, and writes the largest there is.
            if length < 0x7FFFF000 and stream.tell() + length > size:
                raise InputError(
                    f"recording {path} is cut off: its header promises {length} bytes of samples, "
                    f"it has {size - stream.tell()}"
                )
            return


def _check_last_page(tail: bytes, path: Path) -> None:
    at = tail.rfind(b"OggS")
    page = tail[at:]
    # A page's 27th byte counts its segments, whose lengths follow.
    segments = page[26] if len(page) > 26 else 1
    if at >= 0 and len(page) < 27 + segments + sum(page[27 : 27 + segments]):
        raise InputError(f"recording {path} is cut off: its last page lacks its end")


def reason(error: Exception) -> str:
    """Say why libsndfile or the system did not read a file."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text: str = getattr(error, "error_string", str(error))
    return f"{text.rstrip('.')}; is it a recording? Mend it or leave it out"
