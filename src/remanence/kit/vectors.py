"""Where vectors come from: one grammar for every command.

| written as | is |
|---|---|
| `digits` | scikit-learn's 1,797 handwritten digits as 64 pixels each, 0 to 16, embedded |
| `FILE.fvecs`, `.bvecs`, `.ivecs` | rows of int32 d, then d float32, uint8 or int32 |
| `FILE.npy` | one array (n, d) |
| `FILE.npz@NAME` | one array of several; read whole |
| `FILE.fbin`, `.u8bin`, `.i8bin` | uint32 n, uint32 d, then n x d float32, uint8 or int8 |
| `FILE.safetensors@NAME` | one tensor of several |
| `FILE.parquet@COLUMN` | a column of lists of one length |

`@NAME` may be left out where there is only one. `@START:STOP` behind it all takes those rows,
counted from 0, STOP not included; either may be left out. Files are memory-mapped, parquet is read
by row groups, and nothing is ever unpickled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from remanence.errors import InputError
from remanence.kit import vector_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray

CHUNK = vector_files.CHUNK


@dataclass(frozen=True, eq=False)
class Vectors:
    """An opened source of vectors (n, d); rows are read when asked for.

    Whatever is read is new memory, and refused where a value is NaN, infinite or beyond float32.

    Attributes:
        source: As the user wrote it, for messages.
    """

    source: str
    _store: vector_files.Store
    _first: int
    _stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return len(self), self._store.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values as stored."""
        return self._store.dtype

    def __len__(self) -> int:
        return self._stop - self._first

    def rows(self, start: int, stop: int, *, stored: bool = False) -> NDArray[Any]:
        """Return rows start..stop (stop - start, d), float32, or as stored.

        Raises:
            InputError: A value is not finite, or the range is not within 0..n.
        """
        if not 0 <= start <= stop <= len(self):
            raise InputError(f"{self.source}: has no rows {start}:{stop}; it has {len(self)} rows")
        found = self._store[self._first + start : self._first + stop]
        return self._checked(found, np.arange(start, stop), stored)

    def take(self, indices: ArrayLike, *, stored: bool = False) -> NDArray[Any]:
        """Return the rows of integer indices (m,), in their order, as `rows` does.

        Raises:
            InputError: A value is not finite, or an index is not within 0..n - 1.
        """
        index = np.asarray(indices)
        if index.ndim != 1 or (len(index) and index.dtype.kind not in "iu"):
            raise InputError(f"indices {index.dtype} {index.shape}: give a list of integers")
        index = index.astype(np.int64)
        wrong = (index < 0) | (index >= len(self))
        if wrong.any():
            raise InputError(
                f"{self.source}: has no row {index[wrong.argmax()]}; its {len(self)} rows count "
                "from 0"
            )
        return self._checked(self._store[self._first + index], index, stored)

    def chunks(self, rows: int = CHUNK) -> Iterator[NDArray[np.float32]]:
        """Yield all rows in order, so many at a time, float32."""
        for start in range(0, len(self), rows):
            yield self.rows(start, min(start + rows, len(self)))

    def array(self, *, stored: bool = False) -> NDArray[Any]:
        """Return all rows (n, d), float32, or as stored."""
        whole = np.empty(self.shape, self.dtype.newbyteorder("=") if stored else np.float32)
        for start in range(0, len(self), CHUNK):
            stop = min(start + CHUNK, len(self))
            whole[start:stop] = self.rows(start, stop, stored=stored)
        return whole

    def _checked(
        self, found: NDArray[Any], numbers: NDArray[np.int64], stored: bool
    ) -> NDArray[Any]:
        if self.dtype.kind != "f" and stored:
            return np.array(found, self.dtype.newbyteorder("="), order="C")
        with np.errstate(over="ignore"):  # what overflows is refused here
            single = np.array(found, np.float32, order="C")
        finite = np.isfinite(single).all(1)
        if not finite.all():
            raise InputError(
                f"{self.source}: row {numbers[finite.argmin()]} holds NaN, infinity or a value "
                "beyond float32; leave that row out"
            )
        return np.array(found, self.dtype.newbyteorder("="), order="C") if stored else single


def open_vectors(source: str) -> Vectors:
    """Open a source of vectors.

    Args:
        source: As in the module's table.

    Returns:
        The vectors, at least one, not yet read.

    Raises:
        InputError: The file is missing, truncated, of an unknown kind or not a table of numbers,
            or holds no such name or rows.
    """
    name, wanted = _take_range(source)
    if name == "digits":
        from sklearn.datasets import load_digits

        store: vector_files.Store = load_digits().data.astype(np.float32)
    else:
        store = vector_files.open_store(name, wanted)
    if len(store.shape) != 2:
        raise InputError(f"{name}: has shape {store.shape}; give (n, d), a vector a row")
    if store.dtype.kind not in "fiu":
        raise InputError(f"{name}: holds {store.dtype}; give real numbers")
    if 0 in store.shape:
        raise InputError(f"{name}: has shape {store.shape}; give at least one vector")
    count = store.shape[0]
    first, stop = wanted.start or 0, count if wanted.stop is None else wanted.stop
    if not first < stop <= count:
        raise InputError(f"{source}: no such rows; give START below STOP, at most {count}")
    return Vectors(source, store, first, stop)


def open_ids(source: str, below: int | None = None) -> NDArray[np.int64]:
    """Read neighbours' numbers, such as a ground truth.

    Args:
        source: `.ivecs`, or any other source of integers.
        below: How many vectors there are to number.

    Returns:
        (q, k), int64.

    Raises:
        InputError: As `open_vectors`, or a number is negative or not below that.
    """
    opened = open_vectors(source)
    if opened.dtype.kind not in "iu":
        raise InputError(f"{source}: holds {opened.dtype}; give whole numbers, such as .ivecs")
    ids: NDArray[np.int64] = opened.array(stored=True).astype(np.int64)
    wrong = (ids < 0) | (ids >= (np.iinfo(np.int64).max if below is None else below))
    if wrong.any():
        row = int(wrong.any(1).argmax())
        number = ids[row][wrong[row].argmax()]
        known = "numbers count from 0" if below is None else f"numbers are 0 to {below - 1}"
        raise InputError(f"{source}: row {row} names vector {number}; {known}")
    return ids


def save_vectors(path: Path, array: ArrayLike) -> None:
    """Write vectors (n, d) as `.npy`, `.fvecs`, `.ivecs` or `.bvecs`.

    Raises:
        InputError: The suffix is another, the shape is wrong, or the format would change a value.
    """
    values = np.asarray(array)
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.size:
        raise InputError(f"{path}: cannot hold {values.dtype} {values.shape}; give numbers (n, d)")
    if path.suffix == ".npy":
        np.save(path, values, allow_pickle=False)
    elif path.suffix in vector_files.VECS:
        row = vector_files.row_type(path.suffix, values.shape[1])
        # Doubles are rounded to float32, that being what .fvecs is for; integers must fit.
        with np.errstate(all="ignore"):
            if path.suffix != ".fvecs" and (values.astype(row["x"].base) != values).any():
                raise InputError(f"{path}: cannot hold these values; write .fvecs or .npy")
        with path.open("wb") as stream:
            for start in range(0, len(values), CHUNK):
                part = values[start : start + CHUNK]
                table = np.empty(len(part), row)
                table["d"], table["x"] = values.shape[1], part
                stream.write(table.tobytes())
    else:
        raise InputError(
            f"{path}: not a kind that is written; give .npy, {', '.join(vector_files.VECS)}"
        )


def check_finite(vectors: Vectors) -> None:
    """Read all vectors once, so that NaN is found before long work.

    Raises:
        InputError: A row holds NaN or infinity.
    """
    for _ in vectors.chunks():
        pass


def check_varies(vectors: Vectors) -> None:
    """Refuse vectors that are all the same.

    Raises:
        InputError: They are, or a row holds NaN or infinity.
    """
    first = vectors.rows(0, 1)
    if not any((chunk != first).any() for chunk in vectors.chunks()):
        raise InputError(f"{vectors.source}: its {len(vectors)} vectors are all the same")


def check_same_dimension(first: Vectors, *others: Vectors) -> None:
    """Refuse sources of unlike dimension.

    Raises:
        InputError: Names the first two that differ.
    """
    for other in others:
        if other.shape[1] != first.shape[1]:
            raise InputError(
                f"{other.source}: vectors of dimension {other.shape[1]}, but those of "
                f"{first.source} have {first.shape[1]}; give vectors of one kind"
            )


def _take_range(source: str) -> tuple[str, slice]:
    """Take `SOURCE@START:STOP` apart; an @ of an existing path is part of the path."""
    found = re.fullmatch(r"(.+)@(\d*):(\d*)", source, re.ASCII | re.DOTALL)
    if found is None or Path(source).exists():
        return source, slice(None)
    start, stop = (int(part) if part else None for part in found.groups()[1:])
    return found[1], slice(start, stop)
