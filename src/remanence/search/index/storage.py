"""Where an index keeps its vectors: as codes, or as the points that they stand for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from remanence.search.lattice.code import SphericalCode

CHUNK = 2**16  # vectors that are encoded or decoded at a time


class Storage(ABC):
    """Rows in the order of their insertion.

    Attributes:
        code: The code.
        row_bytes: Bytes a vector takes in memory.
    """

    row_bytes: int

    def __init__(self, code: SphericalCode) -> None:
        self.code = code

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def append(self, rows: Tensor) -> None:
        """Store rows of the kind that `form` makes."""

    @abstractmethod
    def form(self, points: Tensor) -> Tensor:
        """Bring points (n, dim), int8, into the form that is stored."""

    @abstractmethod
    def points(self, rows: slice | Tensor) -> Tensor:
        """Return the points (n, dim), int8, of rows."""

    @abstractmethod
    def codes(self, rows: slice | Tensor) -> Tensor:
        """Return the codes (n, nbytes), uint8, of rows."""

    @abstractmethod
    def keep(self, kept: Tensor) -> None:
        """Drop the rows where a mask (n,) is False."""

    def restore(self, codes: Tensor) -> None:
        """Store codes (n, nbytes), uint8, of a file; refuses what is no code."""
        for start in range(0, len(codes), CHUNK):
            some = slice(start, start + CHUNK)
            points = self.code.unrank(codes[some])
            self.append(points if isinstance(self, Points) else codes[some])

    def chunks(self) -> Iterator[slice]:
        """Yield all rows, `CHUNK` at a time."""
        for start in range(0, len(self), CHUNK):
            yield slice(start, min(start + CHUNK, len(self)))

    def all_codes(self) -> Tensor:
        """Return all codes (n, nbytes), uint8."""
        codes = torch.empty(len(self), self.code.nbytes, dtype=torch.uint8)
        for rows in self.chunks():
            codes[rows] = self.codes(rows)
        return codes


class Codes(Storage):
    """Codes alone; every search decodes what it looks at."""

    def __init__(self, code: SphericalCode) -> None:
        super().__init__(code)
        self.row_bytes = code.nbytes
        self._parts = [torch.empty(0, code.nbytes, dtype=torch.uint8)]
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def _codes(self) -> Tensor:
        if len(self._parts) > 1:  # joined when first read, so that adding stays cheap
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def append(self, rows: Tensor) -> None:
        """Store rows, which stay the caller's no longer."""
        self._parts.append(rows)
        self._count += len(rows)

    def form(self, points: Tensor) -> Tensor:
        """Rank points."""
        return self.code.rank(points).cpu()

    def points(self, rows: slice | Tensor) -> Tensor:
        """Decode rows."""
        return self.code.unrank(self.codes(rows))

    def codes(self, rows: slice | Tensor) -> Tensor:
        """Return rows as they are."""
        return _chosen(self._codes, rows)

    def keep(self, kept: Tensor) -> None:
        """Drop the rows where a mask (n,) is False."""
        self._parts = [self._codes[kept]]
        self._count = len(self._parts[0])


class Points(Storage):
    """Decoded points, a byte a coordinate, in a flat faiss index."""

    def __init__(self, code: SphericalCode) -> None:
        super().__init__(code)
        self.row_bytes = code.dim
        self.faiss = scalar_quantizer(code)
        self._most = largest(code)

    def __len__(self) -> int:
        return int(self.faiss.ntotal)

    @property
    def _stored(self) -> Tensor:
        """View what faiss holds (n, dim), uint8; valid until rows are added or dropped."""
        if not len(self):
            return torch.empty(0, self.code.dim, dtype=torch.uint8)
        flat = faiss.rev_swig_ptr(self.faiss.codes.data(), len(self) * self.code.dim)
        return torch.from_numpy(flat).view(-1, self.code.dim)

    def append(self, rows: Tensor) -> None:
        """Store points (n, dim), int8."""
        if len(rows):
            self.faiss.add_sa_codes(stored_bytes(self.code, rows))

    def form(self, points: Tensor) -> Tensor:
        """Return points as they are."""
        return points.cpu()

    def points(self, rows: slice | Tensor) -> Tensor:
        """Return rows, shifted back."""
        return (_chosen(self._stored, rows) - self._most).view(torch.int8)

    def codes(self, rows: slice | Tensor) -> Tensor:
        """Rank rows."""
        return self.code.rank(self.points(rows))

    def keep(self, kept: Tensor) -> None:
        """Drop the rows where a mask (n,) is False."""
        self.faiss.remove_ids(np.flatnonzero(~kept.numpy()))


def _chosen(table: Tensor, rows: slice | Tensor) -> Tensor:
    """Return rows of a table; by number with `index_select`, which copies them whole."""
    return table[rows] if isinstance(rows, slice) else table.index_select(0, rows)


def largest(code: SphericalCode) -> int:
    """Return a bound on the size of coordinates."""
    return math.isqrt(code.r2)


def scalar_quantizer(code: SphericalCode) -> Any:
    """Return an empty faiss index of unit vectors c / r, a byte a coordinate."""
    kind = faiss.ScalarQuantizer.QT_8bit_uniform
    return calibrate(faiss.IndexScalarQuantizer(code.dim, kind, faiss.METRIC_INNER_PRODUCT), code)


def calibrate(index: Any, code: SphericalCode) -> Any:
    """Set the range of an index with a uniform scalar quantiser, so that it holds c / r exactly.

    Byte b stands for (b - most) / r. `QT_8bit_direct_signed`, which keeps integers as they are,
    will not do: where its kernels compute in integers, depending on processor, dimension and
    version of faiss (from 1.15 with AVX-512 and dimensions divisible by 32), it cuts the fractions
    off queries.
    """
    r = math.sqrt(code.r2)
    trained = np.array([-(largest(code) + 0.5) / r, 255 / r], dtype=np.float32)
    faiss.copy_array_to_vector(trained, index.sq.trained)
    index.is_trained = True
    return index


def stored_bytes(code: SphericalCode, points: Tensor) -> NDArray[np.uint8]:
    """Return points (n, dim), int8, as faiss stores them (n, dim), uint8."""
    stored: NDArray[np.uint8] = (points.contiguous().view(torch.uint8) + largest(code)).numpy()
    return stored
