"""The secret key's file: written once, readable by its owner only, outside what is given away."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from remanence.audit.radioactive import SecretKey
from remanence.errors import InputError


def key_path(out: Path, key: Path | None) -> Path:
    """Return where the key lies: `key`, or beside the run folder.

    Raises:
        InputError: That is inside the run folder.
    """
    out = out.expanduser()
    path = out.parent / f"{out.name}.key" if key is None else key.expanduser()
    if any(
        path.resolve().is_relative_to(folder.resolve())
        for folder in (out, out.parent / f"{out.name}.partial")
    ):
        raise InputError(
            f"{path}: lies inside the run folder, of which parts are to be published; choose a "
            "place outside it"
        )
    return path


def read_key(path: Path) -> SecretKey:
    """Read a key of 64 hexadecimal digits.

    Raises:
        InputError: The file is missing, cannot be read, or holds no key.
    """
    try:
        return SecretKey.from_hex(path.expanduser().read_text(encoding="ascii"))
    except OSError as error:
        raise InputError(f"{path}: key cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a key of 64 hexadecimal digits") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@contextmanager
def key_of_run(
    path: Path, *, given: bool, resume: bool, keep: Callable[[], bool]
) -> Iterator[SecretKey]:
    """Read the key of a run or, for a new one, draw and write it; a run that fails takes it back.

    Args:
        path: The key's file.
        given: The user named it, so one that exists may be used.
        resume: An interrupted run goes on, whose key must be there.
        keep: Whether a failed run leaves something that needs the key.

    Yields:
        The key.

    Raises:
        InputError: The file exists though it was not named, is missing though a run goes on, or
            cannot be read or written.
    """
    if path.exists():
        if not (given or resume):
            raise InputError(
                f"{path}: already exists; pass --key {path} to use it, or choose another --out"
            )
        yield read_key(path)
        return
    if resume:
        raise InputError(f"{path}: missing; the interrupted run was marked with that key")
    key = SecretKey.generate()
    try:
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
            stream.write(key.to_hex() + "\n")
    except OSError as error:
        raise InputError(f"{path}: key cannot be written ({error.strerror})") from error
    try:
        yield key
    except BaseException:  # an interrupt, too, must leave no key without its images; it rises again
        if not keep():
            path.unlink(missing_ok=True)
        raise
