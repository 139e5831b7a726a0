"""The file of an index: one safetensors file of codes, whatever the storage in memory.

Tensors: `codes`, uint8 (n, nbytes), or a stream of bits (ceil(n bits / 8),) where that is shorter;
`ids`, int64 (n,), where they are not 0, 1, 2 ...; with inverted lists `lists`, uint16 or uint32
(n,), and `centroids`, float32 (nlist, dim). The header, under 2 KB, says what they are, and holds a
checksum of all that.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from remanence.errors import InputError
from remanence.search.lattice.gosset import E8Shell
from remanence.search.lattice.packing import pack, unpack
from remanence.search.lattice.sign import SignCode
from remanence.search.lattice.sphere import SphereLattice

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from remanence.search.index.transform import Transform
    from remanence.search.lattice.code import SphericalCode

KEY = "remanence.search.index"  # of the metadata
VERSION = 1
KINDS: dict[str, type[SphericalCode]] = {
    kind.__name__: kind for kind in (SphereLattice, E8Shell, SignCode)
}


@dataclass(frozen=True)
class Header:
    """What the file says of itself.

    Attributes:
        transform: Digest of the transform.
        in_dim: Dimension of the vectors.
        code: Kind and parameters of the code, as `describe` gives them.
        storage: "codes" or "int8": how to hold it in memory.
        count: Number of vectors.
        bits: Of a code.
        nlist: Number of inverted lists.
        seed: Of their training.
        following: The next id that is given by itself.
    """

    transform: str
    in_dim: int
    code: dict[str, Any]
    storage: str
    count: int
    bits: int
    nlist: int
    seed: int
    following: int


def describe(code: SphericalCode) -> dict[str, Any]:
    """Return kind and parameters of a code, as plain values.

    Raises:
        InputError: It is none of this library's codes.
    """
    name = type(code).__name__
    if KINDS.get(name) is not type(code):
        raise InputError(f"a code of type {name}: give one of {', '.join(KINDS)}")
    return {"kind": name, "dim": code.dim, "r2": code.r2}


def code_from(described: Mapping[str, Any]) -> SphericalCode:
    """Return the code that `describe` described.

    Tables are made for whatever dimension it names: check that first where a file is not trusted.

    Raises:
        InputError: It describes none.
    """
    dim, r2 = described.get("dim"), described.get("r2")
    code: SphericalCode | None = None
    if type(dim) is int and type(r2) is int:
        if described.get("kind") == "SphereLattice":
            code = SphereLattice(dim, r2)
        elif described.get("kind") == "E8Shell":
            code = E8Shell(r2 // 8)
        elif described.get("kind") == "SignCode":
            code = SignCode(dim)
    if code is None or describe(code) != described:
        raise InputError(f"{dict(described)} describes no code: give what `describe` gave")
    return code


def write(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write the file under a temporary name, then rename it.

    Args:
        path: Where to.
        header: What the tensors are.
        tensors: `codes` (n, nbytes), and `ids`, `lists` and `centroids` where there are any.

    Raises:
        InputError: The folder cannot be written to.
    """
    stored = dict(tensors)
    if header.bits % 8:
        stored["codes"] = pack(stored["codes"], header.bits)
    fields = asdict(header) | {"version": VERSION}
    text = json.dumps(fields | {"sha256": _checksum(fields, stored)})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(stored, part, metadata={KEY: text})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written ({error}): give another place") from error
    finally:
        part.unlink(missing_ok=True)


def read(path: Path, transform: Transform) -> tuple[Header, SphericalCode, dict[str, Tensor]]:
    """Read and check the file, but for whether the codes are codes and the ids are all different.

    Args:
        path: The file.
        transform: The transform at hand.

    Returns:
        The header, the code, and the tensors as `write` takes them.

    Raises:
        InputError: It is missing, foreign, damaged, of another version or for another transform.
    """
    if not path.is_file():
        raise InputError(f"there is no index {path}: give a file that `save` wrote")
    try:
        with safe_open(path, "pt") as opened:
            fields = json.loads((opened.metadata() or {})[KEY])
            version, checksum = fields.pop("version"), fields.pop("sha256")
            header = Header(**fields) if version == VERSION else None
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is no index, or damaged: give a file that `save` wrote"
        ) from error
    if header is None:
        raise InputError(
            f"{path} has version {version} and this library reads {VERSION}: update it"
        )
    if header.transform != transform.digest:
        raise InputError(
            f"{path} was made with the transform {str(header.transform)[:12]}, not with "
            f"{transform.digest[:12]}: give the one it was made with"
        )
    if checksum != _checksum(fields | {"version": version}, tensors):
        raise InputError(f"{path} was edited or damaged: copy it again")
    code = _code(path, header, transform)
    _check_tensors(path, header, code, tensors)
    if header.bits % 8:
        tensors["codes"] = unpack(tensors["codes"], header.count, header.bits)
    return header, code, tensors


def _code(path: Path, header: Header, transform: Transform) -> SphericalCode:
    """Build the code that a header names."""
    wrong = InputError(f"{path} does not fit the transform or this library: make it anew")
    numbers = (header.count, header.bits, header.nlist, header.seed, header.following)
    if any(type(number) is not int for number in numbers) or not isinstance(header.code, dict):
        raise wrong
    # The transform bounds the dimension before tables are made for it.
    if header.code.get("dim") != transform.out_dim or header.in_dim != transform.in_dim:
        raise wrong
    try:
        code = code_from(header.code)
    except ValueError as error:
        raise wrong from error
    if header.bits != code.bits or min(numbers) < 0 or header.storage not in {"codes", "int8"}:
        raise wrong
    return code


def _check_tensors(
    path: Path, header: Header, code: SphericalCode, tensors: Mapping[str, Tensor]
) -> None:
    """Refuse tensors that are not as the header says."""
    n, nlist = header.count, header.nlist
    shape = (-(-n * code.bits // 8),) if code.bits % 8 else (n, code.nbytes)
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": (shape, torch.uint8)}
    if "ids" in tensors:
        wanted["ids"] = ((n,), torch.int64)
    if nlist and ("centroids" in tensors or n):  # an index may be saved before it is trained
        wanted["centroids"] = ((nlist, code.dim), torch.float32)
        wanted["lists"] = ((n,), torch.uint16 if nlist <= 2**16 else torch.uint32)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != wanted:
        raise InputError(f"{path} holds other tensors than an index of its kind: make it anew")
    if "centroids" in tensors and not bool(tensors["centroids"].isfinite().all()):
        raise InputError(f"{path}: its centroids hold NaN or infinity: make it anew")
    if "lists" in tensors and n and int(tensors["lists"].numpy().max()) >= nlist:
        raise InputError(f"{path}: a vector is in none of its {nlist} lists: make it anew")


def _checksum(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().ravel().data)
    return digest.hexdigest()
