"""What marking leaves for a later dispute: the manifest, and the commitment to publish.

The manifest says which images are marked and stays with the owner; `public.json` binds it and the
key without telling either, and is published with the images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from remanence.audit import radioactive as ra
from remanence.errors import InputError
from remanence.jobs.audit.mark_network import config_from_json, config_to_json
from remanence.jobs.audit.outputs import pixel_hashes
from remanence.kit.images import Images
from remanence.kit.run import write_json

FORMAT = "remanence radioactive marking 1"

_COLUMNS = pa.schema(
    [
        ("path", pa.string()),
        ("id", pa.string()),
        ("class", pa.string()),
        ("marked", pa.bool_()),
        ("sha256_before", pa.string()),
        ("sha256_after", pa.string()),
        ("psnr", pa.float64()),
        ("linf", pa.int64()),
        ("dot", pa.float64()),
    ]
)
_FACTS = b"remanence"


@dataclass(frozen=True)
class Manifest:
    """Which images were marked, and how.

    Attributes:
        path: Where it was read from.
        sha256: SHA-256 of the file.
        marked: Whether each image is marked, (N,) bool.
        classes: Name of each image's class (N).
        before: SHA-256 of each image's pixels before marking (N).
        after: The same of the image that was given away (N).
        known_classes: Class names in the order of the carriers.
        recipient: Who got this copy, if it was made for one.
        config: How images were marked.
    """

    path: Path
    sha256: str
    marked: NDArray[np.bool_]
    classes: tuple[str, ...]
    before: NDArray[np.str_]
    after: NDArray[np.str_]
    known_classes: tuple[str, ...]
    recipient: str | None
    config: ra.MarkConfig

    @property
    def marked_classes(self) -> set[str]:
        """Classes of which at least one image is marked."""
        return {name for name, marked in zip(self.classes, self.marked, strict=True) if marked}


@dataclass(frozen=True)
class Public:
    """The published commitment.

    Attributes:
        path: Where it was read from.
        commitment: SHA-256(secret || SHA-256 of the manifest), in hexadecimal.
        manifest_sha256: SHA-256 of the manifest's file.
        marker_sha256: SHA-256 of the marking network's weights.
        dim: Length of its features.
        classes: Class names in the order of the carriers.
    """

    path: Path
    commitment: str
    manifest_sha256: str
    marker_sha256: str
    dim: int
    classes: tuple[str, ...]


def write_manifest(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    classes: Sequence[str],
    recipient: str | None,
    config: ra.MarkConfig,
) -> None:
    """Write the manifest; equal input gives the same bytes.

    Args:
        path: File to write.
        rows: One mapping an image, with the columns' names as keys.
        classes: Class names in the order of the carriers.
        recipient: Who gets this copy.
        config: How images were marked.
    """
    facts = {
        "format": FORMAT,
        "classes": list(classes),
        "recipient": recipient,
        "config": config_to_json(config),
    }
    schema = _COLUMNS.with_metadata({_FACTS: json.dumps(facts, sort_keys=True).encode()})
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        InputError: It is missing, damaged, or not a manifest of ours.
    """
    try:
        raw = path.expanduser().read_bytes()
        table = pq.read_table(pa.BufferReader(raw))
        facts = json.loads(table.schema.metadata[_FACTS])
        columns = {name: table.column(name).to_pylist() for name in _COLUMNS.names}
        if facts["format"] != FORMAT or not len(table):
            raise InputError(f"{path}: not a manifest of this format")
        return Manifest(
            path,
            hashlib.sha256(raw).hexdigest(),
            np.array(columns["marked"], dtype=bool),
            tuple(columns["class"]),
            np.array(columns["sha256_before"]),
            np.array(columns["sha256_after"]),
            tuple(facts["classes"]),
            facts["recipient"],
            config_from_json(facts["config"]),
        )
    except OSError as error:
        reason = error.strerror or "not a parquet file"
        raise InputError(f"{path}: manifest cannot be read ({reason})") from error
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not a manifest; give the manifest.parquet that marking wrote"
        ) from error


def write_public(
    path: Path,
    key: ra.SecretKey,
    manifest: Path,
    *,
    marker_sha256: str,
    dim: int,
    classes: Sequence[str],
    config: ra.MarkConfig,
) -> str:
    """Write the commitment and return it."""
    digest = hashlib.sha256(manifest.read_bytes())
    settings = json.dumps(config_to_json(config), sort_keys=True)
    commitment = key.commitment(digest.digest())
    write_json(
        path,
        {
            "format": FORMAT,
            "commitment": commitment,
            "manifest_sha256": digest.hexdigest(),
            "config_sha256": hashlib.sha256(settings.encode()).hexdigest(),
            "marker_sha256": marker_sha256,
            "dim": dim,
            "classes": list(classes),
        },
    )
    return commitment


def read_public(path: Path) -> Public:
    """Read a commitment.

    Raises:
        InputError: It is missing, damaged, or not a commitment of ours.
    """
    try:
        plain = json.loads(path.expanduser().read_text(encoding="utf-8"))
        if plain["format"] != FORMAT:
            raise InputError(f"{path}: not a commitment of this format")
        bytes.fromhex(plain["manifest_sha256"])
        return Public(
            path,
            str(plain["commitment"]),
            plain["manifest_sha256"],
            str(plain["marker_sha256"]),
            int(plain["dim"]),
            tuple(str(name) for name in plain["classes"]),
        )
    except OSError as error:
        raise InputError(f"{path}: commitment cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not a commitment; give the public.json that marking wrote"
        ) from error


def verify(
    key: ra.SecretKey,
    publics: Sequence[Public],
    manifests: Sequence[Manifest],
    whose: str = "the key",
) -> None:
    """Refuse a key, or a manifest, that the published commitments do not bind.

    Args:
        key: The key.
        publics: The commitments; without any there is nothing to verify.
        manifests: The manifests that were given.
        whose: What to call the key in the error.

    Raises:
        InputError: No commitment is that of the key, or the one that is binds another manifest.
    """
    if not publics:
        return
    own = [p for p in publics if key.verify(p.commitment, bytes.fromhex(p.manifest_sha256))]
    if not own:
        raise InputError(
            f"{', '.join(str(p.path) for p in publics)}: the carriers of {whose} do not match the "
            "commitment; give the key that the images were marked with"
        )
    if manifests and not any(m.sha256 == p.manifest_sha256 for m in manifests for p in own):
        raise InputError(
            f"{', '.join(str(m.path) for m in manifests)}: not the manifest that "
            f"{own[0].path} binds; give the file as marking wrote it"
        )


def check_published(images: Images, manifests: Sequence[Manifest]) -> int:
    """Compare published images with the manifests, by their decoded pixels.

    Args:
        images: The images as they were published.
        manifests: The manifests.

    Returns:
        How many of them are marked.

    Raises:
        InputError: Some images are in no manifest, as after re-encoding or resizing.
    """
    hashes = pixel_hashes(images)
    known = np.concatenate([m.after for m in manifests])
    strange = ~np.isin(hashes, known)
    if strange.any():
        example = images.ids[int(np.flatnonzero(strange)[0])]
        raise InputError(
            f"{images.source}: the pixels of {int(strange.sum())} of {len(images)} images are not "
            f"those of the manifest (such as {example}); give the images as marking wrote them"
        )
    return int(np.isin(hashes, np.concatenate([m.after[m.marked] for m in manifests])).sum())
