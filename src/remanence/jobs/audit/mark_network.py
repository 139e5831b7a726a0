"""The marking network: its features, and what marking with it looks like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from remanence.audit import radioactive as ra
from remanence.errors import InputError
from remanence.jobs.audit.outputs import evaluation_transform
from remanence.kit.images import Images
from remanence.kit.models import Network, open_network
from remanence.learn.fixres import EvalTransform, hash_state

# Larger inputs are seen through random boxes of the image, as photographs usually are.
_SMALL_INPUT = 64

_AUGMENTATIONS: dict[str, Callable[..., ra.Augmentation]] = {
    kind.__name__: kind for kind in (ra.PadCropFlip, ra.RandomResizedCropFlip)
}


@dataclass(frozen=True)
class Marker:
    """A network whose features carry the marks.

    Attributes:
        source: What the user wrote.
        network: The network and its preprocessing.
        extractor: Its features.
        fingerprint: SHA-256 of its weights.
    """

    source: str
    network: Network
    extractor: ra.FeatureExtractor
    fingerprint: str

    @property
    def dim(self) -> int:
        """Length d of a feature."""
        return self.extractor.dim

    @property
    def transform(self) -> EvalTransform:
        """Its evaluation transform."""
        return evaluation_transform(self.network.test)


def open_marker(source: str, layer: str = "penultimate") -> Marker:
    """Open a network as a marker.

    Raises:
        InputError: It cannot be opened, or ends in no linear layer and `layer` names none.
    """
    network = open_network(source)
    size = network.test.size
    try:
        extractor = ra.FeatureExtractor(network.model, layer, input_size=(3, size, size))
    except InputError as error:
        raise InputError(f"{source}: {str(error).replace('layer=', '--layer ')}") from error
    weights = json.dumps(hash_state(network.model), sort_keys=True) + layer
    return Marker(source, network, extractor, hashlib.sha256(weights.encode()).hexdigest())


def choose_preset(preset: ra.Preset | None, marker: Marker, images: Images) -> ra.Preset:
    """Return the preset that was asked for, or the one that fits the sizes."""
    if preset is not None:
        return preset
    size = marker.network.test.size
    shorter = float(np.median(images.sizes(200).min(axis=1)))
    return "small" if size <= _SMALL_INPUT and shorter <= 1.5 * size else "fast"


def marking_config(preset: ra.Preset, marker: Marker, **changes: object) -> ra.MarkConfig:
    """Return a preset's values for a marker, with `changes` that are not None."""
    size, crop_pct = marker.network.test.size, marker.network.test.crop_pct
    augment = (
        ra.PadCropFlip(size, 2)
        if preset == "small"
        else ra.RandomResizedCropFlip(size, resize=max(size, round(size / crop_pct)))
    )
    given = {name: value for name, value in changes.items() if value is not None}
    return ra.MarkConfig.preset(preset, augment=augment, **given)


def config_to_json(config: ra.MarkConfig) -> dict[str, Any]:
    """Return plain values from which `config_from_json` makes the same configuration."""
    plain = asdict(config)
    plain["augment"]["kind"] = type(config.augment).__name__
    return plain


def config_from_json(plain: Mapping[str, Any]) -> ra.MarkConfig:
    """Make a configuration of what `config_to_json` wrote.

    Raises:
        KeyError: A field is missing.
        TypeError: A field is unknown.
        InputError: A value is out of range.
    """
    values = dict(plain)
    augment: dict[str, Any] = dict(values["augment"])
    kind = _AUGMENTATIONS[augment.pop("kind")]
    # JSON knows no tuples.
    values["augment"] = kind(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in augment.items()}
    )
    return ra.MarkConfig(**values)
