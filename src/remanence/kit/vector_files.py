"""Tables of vectors in files, one function a format: each gives something to read rows from."""

from __future__ import annotations

import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError  # of numpy 1's reading of a damaged header
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from remanence.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 65_536  # rows read at a time
VECS = {".fvecs": "<f4", ".bvecs": "u1", ".ivecs": "<i4"}
BINS = {".fbin": "<f4", ".u8bin": "u1", ".i8bin": "i1"}
NAMED = (".npz", ".safetensors", ".parquet")
SUFFIXES = (*VECS, ".npy", *BINS, *NAMED)


class Store(Protocol):
    """What holds the rows; indexing reads them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""

    def __getitem__(self, rows: Any, /) -> Any: ...


def open_store(name: str, wanted: slice) -> Store:
    """Open a file of vectors.

    Args:
        name: Path, with `@NAME` behind it for kinds that hold several tables.
        wanted: Rows that will be read; a .fvecs file says in each row what it is, and these rows
            are looked at.

    Returns:
        The table, of any shape and type.

    Raises:
        InputError: The file is missing, unreadable, damaged or of an unknown kind, or holds no such
            name.
    """
    path, key = Path(name).expanduser(), None
    if not path.exists():
        head, at, tail = name.rpartition("@")
        if at and Path(head).suffix in NAMED:
            path, key = Path(head).expanduser(), tail
            if not key:
                raise InputError(f"{name}: names nothing behind the @")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{name}: unknown kind of vectors; give digits or {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if path.suffix in VECS:
            return vecs(path, wanted)
        if path.suffix in BINS:
            return binary(path)
        if path.suffix == ".npy":
            return npy(path)
        if path.suffix == ".npz":
            return npz(path, key)
        return safetensors(path, key) if path.suffix == ".safetensors" else Parquet(path, key)
    except PermissionError as error:
        raise InputError(f"{path}: may not be read; change its permissions") from error


def row_type(suffix: str, d: int) -> np.dtype[Any]:
    """Return a row of a .fvecs, .bvecs or .ivecs file: its dimension, then its values."""
    return np.dtype([("d", "<i4"), ("x", VECS[suffix], (d,))])


def vecs(path: Path, wanted: slice) -> Store:
    """Map a .fvecs, .bvecs or .ivecs file; the rows wanted must repeat one dimension."""
    size = path.stat().st_size
    d = int(np.fromfile(path, "<i4", 1)[0]) if size >= 4 else 0
    if size == 0:
        raise InputError(f"{path}: is empty; give at least one vector")
    if d < 1 or row_type(path.suffix, 1)["x"].itemsize * d > size - 4:
        raise InputError(
            f"{path}: its first row says dimension {d}, in a file of {size} bytes; it is "
            f"truncated, or not {path.suffix}"
        )
    row = row_type(path.suffix, d)
    count, rest = divmod(size, row.itemsize)
    table = np.memmap(path, row, "r", shape=(count,))
    # Rows that nobody asked for are not read: a billion of them would take minutes.
    first, stop = wanted.indices(count)[:2] if rest == 0 else (0, count)
    for start in range(first, stop, CHUNK):
        unlike = table["d"][start : min(start + CHUNK, stop)] != d
        if unlike.any():
            number = start + int(unlike.argmax())
            raise InputError(
                f"{path}: row {number} says dimension {table['d'][number]}, the first one {d}; "
                "the file is damaged"
            )
    if rest:
        raise InputError(
            f"{path}: truncated in row {count}, at byte {size}: a row of {d} takes {row.itemsize} "
            f"bytes, {rest} are there"
        )
    values: Store = table["x"]
    return values


def binary(path: Path) -> Store:
    """Map a .fbin, .u8bin or .i8bin file."""
    size = path.stat().st_size
    if size < 8:
        raise InputError(f"{path}: truncated in its header, at byte {size} of 8")
    n, d = (int(value) for value in np.fromfile(path, "<u4", 2))
    return _mapped(path, np.dtype(BINS[path.suffix]), (n, d), 8, fortran=False)


def npy(path: Path) -> Store:
    """Map a .npy file."""
    with path.open("rb") as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(stream)
        except (ValueError, KeyError, SyntaxError, TokenError) as error:
            raise InputError(f"{path}: not a .npy file; write it with numpy.save") from error
        start = stream.tell()
    if dtype.hasobject:
        raise InputError(f"{path}: holds Python objects, which are never unpickled; give numbers")
    return _mapped(path, dtype, shape, start, fortran=fortran)


def _mapped(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], start: int, *, fortran: bool
) -> Store:
    size = path.stat().st_size
    row = dtype.itemsize * int(np.prod(shape[1:], dtype=object))
    needed = start + row * (shape[0] if shape else 1)
    if size < needed:
        raise InputError(
            f"{path}: truncated at byte {size} of {needed}, in row {(size - start) // max(row, 1)}"
        )
    if size > needed:
        raise InputError(
            f"{path}: {size - needed} bytes too long for its header, which says {shape}"
        )
    if row == 0 or not shape:
        return np.zeros(shape, dtype)  # nothing to map; refused by the caller
    return np.memmap(path, dtype, "r", start, shape, order="F" if fortran else "C")


def _pick(path: Path, key: str | None, names: list[str]) -> str:
    if key is None and len(names) == 1:
        return names[0]
    if key not in names:
        asked = "holds several" if key is None else f"holds no {key!r}"
        raise InputError(f"{path}: {asked}; name one with {path.name}@NAME: {', '.join(names)}")
    return key


def npz(path: Path, key: str | None) -> Store:
    """Read one array of a .npz file."""
    broken = (
        ValueError,
        EOFError,
        OSError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
        SyntaxError,
        TokenError,
    )
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not a whole .npz file; write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as opened:
            values: Any = opened[_pick(path, key, opened.files)]
    except InputError:
        raise
    except broken as error:
        if "allow_pickle" in str(error):
            raise InputError(
                f"{path}: holds Python objects, which are never unpickled; give numbers"
            ) from error
        raise InputError(f"{path}: not a whole .npz file; write it with numpy.savez") from error
    if not isinstance(values, np.ndarray):  # numpy gives a member of another kind as bytes
        raise InputError(f"{path}: holds more than arrays; write it with numpy.savez")
    return values


def safetensors(path: Path, key: str | None) -> Store:
    """Map one tensor of a .safetensors file."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:  # maps the file: a tensor is read where it is used
            tensor = opened.get_tensor(_pick(path, key, sorted(opened.keys())))
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole .safetensors file ({error})") from error
    if tensor.dtype == torch.bfloat16:
        return _Bfloat16(tensor)
    try:
        values: Store = tensor.numpy()
    except TypeError as error:
        raise InputError(f"{path}: holds {tensor.dtype}; give numbers that numpy knows") from error
    return values


class _Bfloat16:
    """A tensor of a type that numpy lacks, read as float32."""

    dtype = np.dtype(np.float32)

    def __init__(self, tensor: Any) -> None:
        self.tensor, self.shape = tensor, tuple(tensor.shape)

    def __getitem__(self, rows: Any, /) -> Any:
        return self.tensor[rows].float().numpy()


class Parquet:
    """A column of lists; the row groups last read are kept."""

    def __init__(self, path: Path, key: str | None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            self.file = pq.ParquetFile(path, memory_map=True)
            schema = self.file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: not a whole .parquet file; write it again") from error
        lists = [
            field.name
            for field in schema
            if pa.types.is_list(field.type)
            or pa.types.is_large_list(field.type)
            or pa.types.is_fixed_size_list(field.type)
        ]
        if key in schema.names and key not in lists:
            raise InputError(f"{path}: column {key!r} holds no lists; give a list for each row")
        if not lists:
            raise InputError(
                f"{path}: no column holds lists; its columns: {', '.join(schema.names)}"
            )
        self.column = _pick(path, key, lists)
        sizes = [
            self.file.metadata.row_group(group).num_rows
            for group in range(self.file.num_row_groups)
        ]
        self.starts = np.cumsum([0, *sizes])
        self.group = lru_cache(maxsize=2)(self._read)
        self.dim = 0
        self.shape, self.dtype = (int(self.starts[-1]), 0), np.dtype(np.float32)
        if self.shape[0]:
            try:
                head = next(self.file.iter_batches(1, columns=[self.column]))
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{path}: its first row is damaged; write it again") from error
            values = self._values(head.column(0), 0)
            self.dim, self.dtype = values.shape[1], values.dtype
            self.shape = (self.shape[0], self.dim)

    def __getitem__(self, rows: Any, /) -> Any:
        index = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        found = np.empty((len(index), self.dim), self.dtype)
        groups = np.searchsorted(self.starts, index, side="right") - 1
        for group in np.unique(groups):
            here = groups == group
            found[here] = self.group(int(group))[index[here] - self.starts[group]]
        return found

    def _read(self, group: int) -> NDArray[Any]:
        import pyarrow as pa

        try:
            table = self.file.read_row_group(group, columns=[self.column])
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self.path}: row group {group} is damaged; write it again"
            ) from error
        return self._values(table.column(0).combine_chunks(), int(self.starts[group]))

    def _values(self, lists: Any, start: int) -> NDArray[Any]:
        import pyarrow.compute as pc

        lengths = pc.fill_null(pc.list_value_length(lists), -1).to_numpy(zero_copy_only=False)
        wanted = self.dim or (int(lengths[0]) if len(lengths) else 0)
        if (lengths != wanted).any():
            number = int((lengths != wanted).argmax())
            held = "nothing" if lengths[number] < 0 else f"{lengths[number]} values"
            raise InputError(
                f"{self.path}: row {start + number} of column {self.column!r} holds {held}; give "
                f"{max(wanted, 1)} in every row"
            )
        flat = lists.flatten()
        if flat.null_count:
            row = int(pc.is_null(flat).to_numpy(zero_copy_only=False).argmax()) // wanted
            raise InputError(
                f"{self.path}: row {start + row} of {self.column!r} holds an empty value"
            )
        values: NDArray[Any] = flat.to_numpy(zero_copy_only=False).reshape(len(lists), wanted)
        return values
