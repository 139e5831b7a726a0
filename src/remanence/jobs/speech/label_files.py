"""Text files of labels and alignments, as `remanence speech abx` and `probe` read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from remanence.errors import InputError

PHN_RATE = 16_000  # samples a second of the times in .phn files


def read_text(path: Path) -> str:
    """Read text in UTF-8, or in UTF-16 as Praat writes some.

    Raises:
        InputError: It cannot be read, or is no text.
    """
    try:
        data = path.read_bytes()
        wide = data[:2] in {b"\xff\xfe", b"\xfe\xff"}
        return data.decode("utf-16" if wide else "utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a text file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no text in UTF-8 or UTF-16; save it as UTF-8") from None


def read_rows(path: Path) -> dict[str, list[str]]:
    """Read a file with 'name label label ...' a line.

    Raises:
        InputError: There are none, a name is there twice or has none.
    """
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if len(words) == 1:
            raise InputError(
                f"{path} line {number}: {words[0]!r} has no labels; write 'name label label ...', "
                "or leave it out"
            )
        if words and words[0] in rows:
            raise InputError(f"{path} line {number}: {words[0]!r} is there twice; keep one")
        if words:
            rows[words[0]] = words[1:]
    if not rows:
        raise InputError(f"{path}: holds no labels; write 'name label label ...' a line")
    return rows


def known_names(names: Sequence[str]) -> dict[str, str]:
    """Return what labels may call files: their names, and the last part where that is one's own.

    Args:
        names: Of files, with folders divided by slashes.

    Returns:
        From what labels say to the name.
    """
    last = [name.rpartition("/")[2] for name in names]
    times = Counter(last)
    known = {short: name for short, name in zip(last, names, strict=True) if times[short] == 1}
    return known | {name: name for name in names}


def alignments(folder: Path, suffix: str) -> dict[str, Path]:
    """Return the files below a folder of a suffix, in either case, by name without it."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() == suffix)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
