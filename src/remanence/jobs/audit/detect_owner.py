"""What the owner brings: keys, published commitments and manifests, checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remanence.audit import radioactive as ra
from remanence.errors import InputError
from remanence.jobs.audit.mark_key import read_key
from remanence.jobs.audit.mark_manifest import (
    Manifest,
    Public,
    read_manifest,
    read_public,
    verify,
)
from remanence.jobs.audit.mark_network import Marker
from remanence.jobs.audit.outputs import pixel_hashes
from remanence.kit.images import Images


@dataclass(frozen=True)
class Owner:
    """What the owner brings.

    Attributes:
        keys: Recipient -> key; the recipient is None where one key stands for everyone.
        publics: Published commitments; every key is bound by one of them, if there are any.
        manifests: Manifests, each bound by a commitment, if there are any.
    """

    keys: dict[str | None, ra.SecretKey]
    publics: tuple[Public, ...]
    manifests: tuple[Manifest, ...]

    @property
    def committed(self) -> bool | None:
        """Whether the carriers are bound by a commitment; None where there is none."""
        return True if self.publics else None

    @property
    def compared(self) -> bool | None:
        """Whether images can be compared with the marked ones; None where they cannot."""
        return True if self.manifests else None

    def classes(self, images: Images, marker: Marker) -> tuple[str, ...]:
        """Return the class names in the order of the carriers.

        Raises:
            InputError: The records disagree, or belong to another marking network.
        """
        for public in self.publics:
            if public.dim != marker.dim:
                raise InputError(
                    f"{marker.source}: has features of {marker.dim} dimensions, but the carriers "
                    f"of {public.path} have {public.dim}; give the network that marked"
                )
            if public.marker_sha256 != marker.fingerprint:
                raise InputError(
                    f"{marker.source}: is not the network that marked by {public.path}; its "
                    "weights, or --layer, are others"
                )
        told = [p.classes for p in self.publics] + [m.known_classes for m in self.manifests]
        if len(set(told)) > 1:
            raise InputError("the commitments and manifests given are of different classes")
        return told[0] if told else images.classes

    def marked_classes(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Return which classes have a marked image, (K,); all, where nobody knows."""
        if not self.manifests:
            return np.ones(len(names), dtype=bool)
        marked = set().union(*(m.marked_classes for m in self.manifests))
        return np.array([name in marked for name in names])

    def unmarked(self, images: Images) -> NDArray[np.int64]:
        """Return the rows of the images that are not marked ones, by their decoded pixels.

        Raises:
            InputError: All of them are.
        """
        if not self.manifests:
            return np.arange(len(images))
        marked = np.concatenate([m.after[m.marked] for m in self.manifests])
        rows = np.flatnonzero(~np.isin(pixel_hashes(images), marked))
        if not len(rows):
            raise InputError(
                f"{images.source}: every image is a marked one, which would make an innocent "
                "network look guilty; give clean images"
            )
        return rows

    def config(self) -> ra.MarkConfig | None:
        """Return how images were marked, where known."""
        return self.manifests[0].config if self.manifests else None


def open_owner(
    key: Path | None,
    recipient: str | None,
    recipients: Sequence[str] | None,
    public: Sequence[Path] | None,
    manifest: Sequence[Path] | None,
) -> Owner:
    """Read keys, commitments and manifests.

    Args:
        key: The key's file.
        recipient: Who the copy was made for.
        recipients: NAME=KEYFILE of each recipient, in place of `key`.
        public: Commitments.
        manifest: Manifests.

    Raises:
        InputError: A file cannot be read, two recipients share a key, or a key or manifest is not
            the one that was committed to.
    """
    if (key is None) == (not recipients):
        raise InputError("give either --key FILE, or --recipients NAME=FILE for each recipient")
    if recipients and recipient is not None:
        raise InputError(f"--recipient {recipient}: goes with --key, not with --recipients")
    publics = tuple(read_public(path) for path in public or ())
    manifests = tuple(read_manifest(path) for path in manifest or ())
    keys: dict[str | None, ra.SecretKey] = {}
    if key is not None:
        known = {m.recipient for m in manifests}
        if recipient is not None and known - {recipient}:
            raise InputError(
                f"--recipient {recipient}: the manifest was made for "
                f"{', '.join(name or 'no one in particular' for name in known)}"
            )
        if len(known) > 1:
            raise InputError("the manifests are of different recipients; pass --recipients instead")
        keys[next(iter(known), recipient)] = read_key(key)
    else:
        keys.update(_recipient_keys(recipients or ()))
    for name, one in keys.items():
        verify(one, publics, manifests, "the key" if name is None else f"recipient {name}")
    return Owner(keys, publics, manifests)


def _recipient_keys(recipients: Sequence[str]) -> dict[str, ra.SecretKey]:
    keys: dict[str, ra.SecretKey] = {}
    for word in recipients:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise InputError(f"--recipients {word}: give NAME=KEYFILE, for example anna=anna.key")
        if name in keys:
            raise InputError(f"--recipients {word}: {name} is given twice")
        keys[name] = read_key(Path(path))
    ra.recipient_carriers(keys, 1, 2)  # refuses a shared key, before anything long begins
    return keys
