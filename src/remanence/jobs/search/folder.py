"""The folders of `search`: what `train` leaves behind, and what `index` makes of it.

Both hold `catalyzer.safetensors` and `codes.json`, the codes by their bytes a vector; an index has
`index.safetensors` beside them, and so serves queries by itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from remanence.errors import InputError
from remanence.kit.run import write_json
from remanence.kit.vectors import Vectors, open_ids
from remanence.search.catalyzer.network import Catalyzer, Embedding
from remanence.search.index import file
from remanence.search.index.spread import SpreadIndex
from remanence.search.lattice.code import SphericalCode

CATALYZER, CODES, INDEX = "catalyzer.safetensors", "codes.json", "index.safetensors"


@dataclass(frozen=True)
class Model:
    """What `search train` leaves behind, or an index has of it.

    Attributes:
        folder: Where it lies.
        catalyzer: The network.
        codes: Its codes by bytes a vector, rising.
    """

    folder: Path
    catalyzer: Catalyzer
    codes: Mapping[int, SphericalCode]

    def choose(self, nbytes: int | None) -> tuple[Embedding, SphericalCode]:
        """Return the map to the sphere and the code of so many bytes.

        Args:
            nbytes: Bytes a vector; None is 8 where there is such a code, or the only one.

        Raises:
            InputError: There is no such code, or no saying which.
        """
        known = " and ".join(map(str, self.codes))
        if nbytes is None:
            nbytes = next(iter(self.codes)) if len(self.codes) == 1 else 8
        if nbytes not in self.codes:
            raise InputError(
                f"--nbytes {nbytes}: {self.folder} has codes of {known} bytes a vector; give one "
                "of these, or train with this number"
            )
        code = self.codes[nbytes]
        return self.catalyzer.at(code.dim), code


def open_model(folder: Path, device: torch.device) -> Model:
    """Open a catalyzer and its codes.

    Raises:
        InputError: A file is missing or damaged.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one that `search train` wrote")
    catalyzer = Catalyzer.load(folder / CATALYZER)
    path = folder / CODES
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; give a folder that `search train` wrote")
    damaged = InputError(f"{path}: damaged; copy it again from what `search train` wrote")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        codes = {}
        for nbytes in sorted(entries, key=int):
            entry = entries[nbytes]
            if entry["dim"] not in catalyzer.dims:  # bounds it, before tables are made
                raise damaged
            codes[int(nbytes)] = file.code_from(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    if not codes or any(code.nbytes != nbytes for nbytes, code in codes.items()):
        raise damaged
    return Model(folder, catalyzer.to(device), codes)


def trained_on(folder: Path) -> int | None:
    """Return how many vectors a model was trained on, by its own `results.json`; None if unsaid."""
    try:
        count = json.loads((folder / "results.json").read_text(encoding="utf-8"))["n_train"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return count if type(count) is int else None


def trained_in(folder: Path) -> float | None:
    """Return how many seconds a model's run took, by its own `run.json`; None if unsaid."""
    try:
        seconds = json.loads((folder / "run.json").read_text(encoding="utf-8"))["seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(seconds) if isinstance(seconds, int | float) else None


def open_index(folder: Path, device: torch.device, model: Model | None = None) -> SpreadIndex:
    """Open what `search index` wrote.

    Args:
        folder: The run folder.
        device: Where queries are embedded.
        model: The model it must have been made with; the folder's own where None.

    Raises:
        InputError: A file is missing or damaged, or the model is another.
    """
    folder = folder.expanduser()
    path = folder / INDEX
    if not path.is_file():
        raise InputError(f"{path}: there is no such index; give a folder that `search index` wrote")
    model = model or open_model(folder, device)
    try:
        with safe_open(path, "pt") as opened:
            dim = json.loads((opened.metadata() or {})[file.KEY])["code"]["dim"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: no index, or damaged; make it again") from error
    if dim not in model.catalyzer.dims:
        raise InputError(
            f"{path}: of dimension {dim}, which {model.folder} has no map to; give the model that "
            "it was made with"
        )
    return SpreadIndex.load(path, model.catalyzer.at(dim))


def save_index(folder: Path, index: SpreadIndex, model: Model) -> None:
    """Write all that queries need."""
    index.save(folder / INDEX)
    shutil.copyfile(model.folder / CATALYZER, folder / CATALYZER)
    write_json(folder / CODES, {str(n): file.describe(code) for n, code in model.codes.items()})


@dataclass(frozen=True)
class Stored:
    """Bytes of an index file.

    Attributes:
        total: All of them.
        header: What says what the rest is.
        parts: Bytes of each tensor.
    """

    total: int
    header: int
    parts: Mapping[str, int]

    def a_vector(self, count: int) -> float:
        """Return the bytes a vector takes, without header and centroids; 0 of none."""
        taken = sum(size for name, size in self.parts.items() if name != "centroids")
        return taken / count if count else 0.0


def stored_bytes(path: Path) -> Stored:
    """Count what a safetensors file of ours holds, from its own header."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries: dict[str, Any] = json.loads(stream.read(length))
    spans = {
        name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"
    }
    parts = {name: stop - start for name, (start, stop) in spans.items()}
    return Stored(path.stat().st_size, 8 + length, parts)


def check_dimension(vectors: Vectors, wanted: int, of: Path) -> None:
    """Refuse vectors that a model does not take.

    Raises:
        InputError: Says both dimensions.
    """
    if vectors.shape[1] != wanted:
        raise InputError(
            f"{vectors.source}: vectors of dimension {vectors.shape[1]}, but {of} takes {wanted}; "
            "give vectors of the kind that it was trained on"
        )


def read_ids(source: Path, count: int | None = None) -> NDArray[np.int64]:
    """Read names of vectors.

    Args:
        source: `.npy` of whole numbers (n,) or (n, 1), another table of one column such as
            `.ivecs`, or `.txt`, a number a line.
        count: How many there must be.

    Returns:
        (n,), int64, none negative.

    Raises:
        InputError: The file is missing or damaged, or holds anything else.
    """
    source = source.expanduser()
    if not source.is_file():
        raise InputError(f"{source}: no such file; give ids, a number a vector")
    if source.suffix == ".txt":
        lines = source.read_text(encoding="utf-8", errors="replace").split()
        wrong = next((i for i, word in enumerate(lines) if not _is_id(word)), None)
        if wrong is not None:
            raise InputError(f"{source}: entry {wrong} is {lines[wrong]!r}; give numbers from 0 on")
        ids = np.array(lines, np.int64)
    elif source.suffix == ".npy" and (flat := _flat(source)) is not None:
        ids = flat
    else:
        table = open_ids(str(source))
        if table.shape[1] != 1:
            raise InputError(f"{source}: has {table.shape[1]} columns; give one id a vector")
        ids = table[:, 0]
    if count is not None and len(ids) != count:
        raise InputError(f"{source}: {len(ids)} ids for {count} vectors; give one for each")
    return ids


def _flat(source: Path) -> NDArray[np.int64] | None:
    """Return a .npy of one dimension; None of another one, or one that is damaged."""
    try:
        values = np.load(source, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return None
    if values.ndim != 1:
        return None
    if values.dtype.kind not in "iu" or (len(values) and int(values.max()) >= 2**63 - 1):
        raise InputError(f"{source}: holds {values.dtype}; give whole numbers below 2^63 - 1")
    if len(values) and values.min() < 0:
        raise InputError(f"{source}: entry {values.argmin()} is negative; give numbers from 0 on")
    return np.asarray(values, np.int64)


def _is_id(word: str) -> bool:
    return word.isascii() and word.isdecimal() and int(word) < 2**63 - 1
