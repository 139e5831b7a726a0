"""The names of an index's rows."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.errors import InputError

LARGEST = 2**63 - 2  # the last id, so that the one after it is still an int64


class Ids:
    """Ids by row: 0, 1, 2 ... for free, until others are given or rows dropped; then 8 bytes each.

    Attributes:
        explicit: Ids (n,), int64, or None where they are the row numbers.
        following: The id that comes next where none is given: one above all that ever were.
    """

    def __init__(
        self, count: int = 0, explicit: Tensor | None = None, following: int | None = None
    ) -> None:
        self._count, self.explicit = count, explicit
        self.following = count if following is None else following

    def check(self, ids: Tensor | None, count: int) -> Tensor | None:
        """Return the ids that `count` new rows get, or None where they number on.

        Raises:
            InputError: Shape or type is wrong, an id is negative, too large, or there already.
        """
        if ids is None:
            if self.following + count - 1 > LARGEST:
                raise InputError(f"no ids are left above {self.following - 1}: give ids")
            implicit = self.explicit is None and self.following == self._count
            return None if implicit else torch.arange(self.following, self.following + count)
        if ids.shape != (count,) or ids.dtype != torch.int64:
            raise InputError(
                f"ids {ids.dtype} {tuple(ids.shape)} for {count} vectors: give int64 ({count},)"
            )
        ids = ids.cpu()
        if count and (int(ids.min()) < 0 or int(ids.max()) > LARGEST):
            raise InputError(f"ids from {ids.min()} to {ids.max()}: give 0 to {LARGEST}")
        ordered = ids.sort().values
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(twice):
            twice = ids[self.rows(ids) >= 0]
        if len(twice):
            raise InputError(f"id {int(twice[0])} would be there twice: give each vector its own")
        as_default = self.check(None, count) is None and torch.equal(
            ids, torch.arange(self._count, self._count + count)
        )
        return None if as_default else ids

    def append(self, ids: Tensor | None, count: int) -> None:
        """Name `count` new rows with what `check` returned."""
        if ids is not None:
            self.explicit = torch.cat([self.at(slice(0, self._count)), ids])
            if count:
                self.following = max(self.following, int(ids.max()) + 1)
        else:
            self.following += count
        self._count += count

    def at(self, rows: slice | Tensor) -> Tensor:
        """Return the ids of rows (n,), int64."""
        if self.explicit is not None:
            return self.explicit[rows]
        if isinstance(rows, slice):
            return torch.arange(*rows.indices(self._count))
        return rows.long()

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of ids (n,), int64; -1 for one that is not there."""
        if self.explicit is None:
            return torch.where((ids >= 0) & (ids < self._count), ids, -1)
        if not self._count:
            return torch.full_like(ids, -1)
        ordered, order = self.explicit.sort()
        place = torch.searchsorted(ordered, ids).clamp_max(self._count - 1)
        return torch.where(ordered[place] == ids, order[place], -1)

    def keep(self, kept: Tensor) -> None:
        """Drop the rows where a mask (n,) is False; the others keep their ids."""
        if not bool(kept.all()):
            self.explicit = self.at(slice(0, self._count))[kept]
            self._count = len(self.explicit)
