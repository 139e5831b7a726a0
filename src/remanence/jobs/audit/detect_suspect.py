"""The suspect, seen beside the marking network on clean images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from remanence.audit import radioactive as ra
from remanence.errors import InputError
from remanence.jobs.audit.mark_network import Marker
from remanence.jobs.audit.outputs import evaluation_transform, is_array, read_outputs
from remanence.kit.evaluate import Normalise, evaluate
from remanence.kit.images import Images
from remanence.kit.models import Network, open_network

# Features of so many images are held at once.
CHUNK = 4096


@dataclass(frozen=True)
class Suspect:
    """A network in question, or a clean one to compare with.

    Attributes:
        source: What the user wrote.
        network: The network; None where only outputs were given.
        extractor: Its features, where it ends in a linear layer.
        logits: The outputs, float32 (N, C), where only these were given.
    """

    source: str
    network: Network | None = None
    extractor: ra.FeatureExtractor | None = None
    logits: NDArray[np.float32] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Its class names, where known."""
        return () if self.network is None else self.network.classes

    @property
    def weight(self) -> Tensor | None:
        """(C, t) its last linear layer, where it can be seen."""
        head = None if self.extractor is None else self.extractor.head
        return None if head is None else head.weight.detach()

    def subset(self, rows: NDArray[np.int64]) -> Suspect:
        """Return the same with the outputs for the images at `rows` only."""
        return self if self.logits is None else replace(self, logits=self.logits[rows])

    def view(self, fabric: Fabric) -> tuple[Callable[[Tensor], Tensor], Callable[..., Any]]:
        """Return what gives features and logits (B, t + C) side by side, and the transform.

        Of a network without a linear last layer, logits alone.
        """
        assert self.network is not None
        extractor = self.extractor
        module: nn.Module = self.network.model if extractor is None else extractor
        module = module.to(fabric.device).eval()
        normalise = Normalise(self.network.test.mean, self.network.test.std)

        def both(images: Tensor) -> Tensor:
            if extractor is None:
                logits: Tensor = module(normalise(images))
                return logits.flatten(1)
            features, logits = extractor.features_and_logits(normalise(images))
            return torch.cat([features, logits.float()], dim=1)

        return both, evaluation_transform(self.network.test)


def open_suspect(source: str, count: int, images: str) -> Suspect:
    """Open a model folder, or outputs in a `.npy` file.

    Args:
        source: What the user wrote.
        count: Number of images that outputs must be for.
        images: What to call them.

    Raises:
        InputError: It cannot be opened, or has not one row for each image.
    """
    if is_array(source):
        logits = read_outputs(source, None).logits
        if len(logits) != count:
            raise InputError(
                f"{source}: {len(logits)} rows for the {count} images of {images}; give one row "
                "for each image, in the same order"
            )
        return Suspect(source, logits=_logarithms(logits))
    network = open_network(source)
    size = network.test.size
    try:
        extractor = ra.FeatureExtractor(network.model, input_size=(3, size, size))
    except InputError:
        return Suspect(source, network)  # it is known by its outputs then
    return Suspect(source, network, extractor)


def _logarithms(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logarithms where rows are probabilities, which are linear in nothing."""
    total_one = np.abs(logits.sum(axis=1) - 1) < 1e-3
    if logits.shape[1] < 2 or not (total_one & (logits >= 0).all(axis=1)).all():
        return logits
    return np.asarray(np.log(np.maximum(logits, logits[logits > 0].min())), dtype=np.float32)


@dataclass
class Seen:
    """What the networks said of the images.

    Attributes:
        features: Sums that align the marker's features with the suspect's; None without weights.
        logits: The same with the suspect's logits.
        references: The same with the logits of each reference.
        outputs: The suspect's logits, float32 (N, C).
        same_features: Whether suspect and marker have the same features, as the same network has.
    """

    features: ra.AlignmentSums | None
    logits: ra.AlignmentSums
    references: list[ra.AlignmentSums]
    outputs: Tensor
    same_features: bool


def look(
    fabric: Fabric, marker: Marker, suspect: Suspect, references: Sequence[Suspect], images: Images
) -> Seen:
    """Run every network over the images, each image decoded once, and keep sums of products.

    Raises:
        InputError: A network gives NaN or infinity.
    """
    everyone = [suspect, *references]
    pre = marker.network.test
    normalise = Normalise(pre.mean, pre.std)
    functions: dict[Any, Callable[[Tensor], Tensor]] = {
        "marker": lambda x: marker.extractor(normalise(x))
    }
    transforms: dict[Any, Callable[[Image.Image], Any]] = {"marker": marker.transform}
    marker.extractor.to(fabric.device)
    for number, one in enumerate(everyone):
        if one.network is not None:
            functions[number], transforms[number] = one.view(fabric)
    sums: dict[str, ra.AlignmentSums] = {}
    outputs, same = [], True

    def add(name: str, features: Tensor, targets: Tensor) -> None:
        part = ra.AlignmentSums.of(features, targets)
        sums[name] = sums[name] + part if name in sums else part

    for start in range(0, len(images), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(images)))
        part = images.subset(rows)
        found = evaluate(fabric, functions, transforms, part, what="features")
        phi0 = _finite(found["marker"], marker.source, part)
        for number, one in enumerate(everyone):
            name = f"logits {number}"
            if one.logits is not None:
                logits = torch.from_numpy(one.logits[rows])
            else:
                both = _finite(found[number], one.source, part)
                t = 0 if one.extractor is None else one.extractor.dim
                features, logits = both[:, :t], both[:, t:]
                if number == 0 and t:
                    add("features", phi0, features)
                    same = same and features.shape == phi0.shape and bool(features.equal(phi0))
            add(name, phi0, logits)
            if number == 0:
                outputs.append(logits)
    features_seen = "features" in sums
    return Seen(
        sums.get("features"),
        sums["logits 0"],
        [sums[f"logits {number}"] for number in range(1, len(everyone))],
        torch.cat(outputs),
        same and features_seen,
    )


def _finite(values: Tensor, source: str, images: Images) -> Tensor:
    broken = ~values.isfinite().all(dim=1)
    if bool(broken.any()):
        image_id = images.ids[int(broken.int().argmax())]
        raise InputError(
            f"{source}: its features are NaN or infinite for {image_id}; check the network, and "
            "mean and std in its configuration"
        )
    return values
