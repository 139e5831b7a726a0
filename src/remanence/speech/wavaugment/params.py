"""What was drawn for a batch: kept, saved, cut into rows, and replayed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DTYPES = {"bool": torch.bool, "int64": torch.int64, "float64": torch.float64}


@dataclass(frozen=True)
class Params:
    """Drawn parameters, a row an example.

    Attributes:
        values: (B, ...) bool, int64 or float64 tensors by name. `apply` says which rows an effect
            touches; in a chain the names begin with the effect's place, as in `0.cents`.
    """

    values: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, rows: int | slice | Tensor) -> Params:
        """Some rows, in their order; a single one keeps its dimension."""
        if isinstance(rows, int):
            rows = slice(rows, rows + 1 or None)
        return Params({name: value[rows] for name, value in self.values.items()})

    def to(self, device: torch.device | str) -> Params:
        """The same on another device."""
        return Params({name: value.to(device) for name, value in self.values.items()})

    @staticmethod
    def cat(parts: Sequence[Params]) -> Params:
        """Rows of several batches of one chain, one after the other.

        Raises:
            InputError: the parts hold different parameters.
        """
        if not parts or any(part.values.keys() != parts[0].values.keys() for part in parts):
            raise InputError("parameters to concatenate differ in name: draw them from one chain")
        names = parts[0].values
        return Params({name: torch.cat([part.values[name] for part in parts]) for name in names})

    @staticmethod
    def nest(parts: Mapping[str, Params]) -> Params:
        """Parameters of several effects in one, each effect's names after its own prefix."""
        return Params(
            {
                f"{prefix}.{name}": value
                for prefix, part in parts.items()
                for name, value in part.values.items()
            }
        )

    def under(self, prefix: str) -> Params:
        """What `nest` put under a prefix.

        Raises:
            InputError: nothing is there.
        """
        start = f"{prefix}."
        found = {k[len(start) :]: v for k, v in self.values.items() if k.startswith(start)}
        if not found:
            raise InputError(
                f"parameters hold nothing under {prefix!r}: replay them in their chain"
            )
        return Params(found)

    def gated(self, gate: Tensor) -> Params:
        """The same, applied only where `gate` (B,) holds."""
        return Params(
            {
                name: value & gate if name.split(".")[-1] == "apply" else value
                for name, value in self.values.items()
            }
        )

    def to_json(self) -> str:
        """One line of JSON from which `from_json` returns every bit."""
        return json.dumps(
            {
                name: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
                for name, value in self.values.items()
            },
            allow_nan=False,
        )

    @staticmethod
    def from_json(text: str) -> Params:
        """Read what `to_json` wrote.

        Raises:
            InputError: something else is there.
        """
        try:
            return Params(
                {
                    name: torch.tensor(field["values"], dtype=DTYPES[field["dtype"]])
                    for name, field in json.loads(text).items()
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"parameters are not what to_json writes: {error!r}") from error
