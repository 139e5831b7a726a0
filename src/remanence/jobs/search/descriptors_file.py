"""The file of descriptors, written row by row: a safetensors file larger than memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.whitening import Whitening

FILE = "descriptors.safetensors"
VECTORS = "vectors"
ROWS = 65_536  # whitened at a time
CODES = {"float32": "F32", "int64": "I64", "bool": "BOOL"}  # safetensors' names of types


def columns(
    descriptor: KernelDescriptor, *, places: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what the file holds, name to type and shape of a row.

    Args:
        descriptor: Of the vectors, before a whitening.
        places: Whether it says where in the picture they are from.
    """
    # The widest types first, so that all stand at multiples of their size.
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "image": ("int64", ()),
        VECTORS: ("float32", (descriptor.dim,)),
    }
    if places:
        found |= {"xy": ("float32", (2,)), "scale": ("float32", ()), "angle": ("float32", ())}
    return found | {"valid": ("bool", ())}


class Rows:
    """Tensors that grow along their first axis, each in a file of its own until they are joined.

    Args:
        folder: Where the files lie.
        columns: Name to type and shape of a row.
    """

    def __init__(self, folder: Path, columns: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.count = 0
        self._columns = dict(columns)
        self._paths = {name: folder / f"{name}.rows" for name in columns}
        self._streams = {name: path.open("wb") for name, path in self._paths.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in self._streams.values():
            stream.close()

    def add(self, **values: Tensor) -> None:
        """Append n rows to every tensor."""
        for name, (dtype, shape) in self._columns.items():
            array = values[name].detach().cpu().numpy()
            assert array.dtype == dtype
            assert array.shape[1:] == shape
            self._streams[name].write(np.ascontiguousarray(array).tobytes())
        self.count += len(array)

    def whiten(self, whitening: Whitening) -> None:
        """Replace the vectors by whitened ones."""
        path, (dtype, (length,)) = self._paths[VECTORS], self._columns[VECTORS]
        self._streams[VECTORS].close()
        whitened = path.with_suffix(".whitened")
        with path.open("rb") as raw, whitened.open("wb") as stream:
            while part := raw.read(ROWS * 4 * length):
                rows = torch.from_numpy(np.frombuffer(part, dtype).reshape(-1, length).copy())
                stream.write(whitening(rows).numpy().tobytes())
        whitened.replace(path)
        self._columns[VECTORS] = dtype, (whitening.projection.shape[1],)

    def join(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write all as one safetensors file and remove what was written before.

        Args:
            path: Where to.
            metadata: Of its header.
        """
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        start = 0
        for name, (dtype, shape) in self._columns.items():
            stop = start + self.count * np.dtype(dtype).itemsize * int(np.prod(shape))
            header[name] = {
                "dtype": CODES[dtype],
                "shape": [self.count, *shape],
                "data_offsets": [start, stop],
            }
            start = stop
        words = json.dumps(header).encode()
        words += b" " * (-len(words) % 8)
        with path.open("wb") as stream:
            stream.write(len(words).to_bytes(8, "little") + words)
            for name in self._columns:
                self._streams[name].close()
                with self._paths[name].open("rb") as column:
                    shutil.copyfileobj(column, stream, 2**22)
                self._paths[name].unlink()
