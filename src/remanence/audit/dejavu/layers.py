"""Membership from lower layers: does a backbone without its head reveal its training images?

arXiv 1809.06396. The network is h(g(x)) and only g, up to some layer, can be used. Three protocols:

- head: a new classifier on g, trained on public labelled images; members lie better in their
  class, so they get the greater margin.
- classifier: some members and non-members are known; a linear classifier of their class-centred
  features, and of those times the mean of the class: only their product tells a linear classifier
  that an image lies further towards its own class than others do.
- transfer: a shadow network whose members are known; a ridge map carries the features of the
  network under audit into the shadow's, where the shadow's member classifier answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn

from remanence.audit.dejavu.depth_profile import DepthProfile, Protocol, profile
from remanence.audit.dejavu.features import DepthReader, Pool, Preprocess
from remanence.audit.dejavu.heads import Head, Standard, class_means, fit_head, ridge_map
from remanence.audit.dejavu.intervals import Scores
from remanence.audit.dejavu.pixels import Labelled, check_sides
from remanence.errors import InputError

MEMBER_L2 = 1e-2  # penalty of the member classifiers, which few images train
RIDGE = 0.1  # of the map from target to shadow features


@dataclass(frozen=True)
class Shadow:
    """A network of the auditor's own, with known members.

    Attributes:
        backbone: in eval mode, as many depths as the network under audit.
        members: what it was trained on.
        nonmembers: of the same distribution, not trained on.
        layers: names, or "auto".
    """

    backbone: nn.Module
    members: Labelled
    nonmembers: Labelled
    layers: Literal["auto"] | Sequence[str] = "auto"


class LayerProbe:
    """Measures membership at every depth of a network, from one forward pass a batch.

    The network is left as it was: it must be in eval mode, its hooks are removed, its state is
    unchanged.

    Args:
        backbone: any module in eval mode, on the device to compute on.
        layers: names of modules, or "auto": each block with weights together with the
            normalisations and activations behind it.
        pool: "avgmax" or "grid2", see `DepthReader`.
        protocol: "head", "classifier" or "transfer".
        shadow: for "transfer".
        l2: penalty of the new heads.
        iterations: of L-BFGS.
        folds: of the "classifier" protocol.
        batch_size: images a forward pass.
        preprocess: of each batch, on the network's device.
        dtype: of the stored features, float32 or float16.
        scratch: folder in which the features are memory-mapped while `run` lasts; None keeps them
            in memory, (public + members + non-members) times the sum of the layers' dims.
        seed: of the folds.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: Literal["auto"] | Sequence[str] = "auto",
        pool: Pool = "avgmax",
        protocol: Protocol = "head",
        *,
        shadow: Shadow | None = None,
        l2: float = 1e-3,
        iterations: int = 60,
        folds: int = 5,
        batch_size: int = 256,
        preprocess: Preprocess | None = None,
        dtype: torch.dtype = torch.float32,
        scratch: Path | None = None,
        seed: int = 0,
    ) -> None:
        if protocol not in get_args(Protocol):
            raise InputError(f"protocol {protocol!r} is unknown: give one of {get_args(Protocol)}")
        if (protocol == "transfer") != (shadow is not None):
            raise InputError("protocol 'transfer' and a shadow network go together: give both")
        if dtype not in (torch.float32, torch.float16):
            raise InputError(f"features cannot be kept as {dtype}: give float32 or float16")
        if scratch is not None and not scratch.is_dir():
            raise InputError(f"scratch {str(scratch)!r} is no folder: make it first")
        self.backbone, self.layers, self.pool = backbone, layers, pool
        self.protocol, self.shadow = protocol, shadow
        self.l2, self.iterations, self.folds = l2, iterations, folds
        self.batch_size, self.preprocess, self.dtype = batch_size, preprocess, dtype
        self.scratch, self.seed = scratch, seed

    def run(
        self,
        public: Labelled,
        members: Labelled,
        nonmembers: Labelled,
        groups: Tensor | None = None,
    ) -> DepthProfile:
        """Measure every depth.

        Args:
            public: images that the network was not trained on, of the members' distribution; they
                train the heads and set mean and scale of the features.
            members: candidates from the training set.
            nonmembers: candidates that were not trained on.
            groups: (M + K,) int64 for "classifier": candidates that may not stand in different
                folds, members first. Equal pixels always share a fold.

        Returns:
            The profile.

        Raises:
            InputError: an input has the wrong form, a public image is also a candidate, a member
                is also a non-member, or the network or a layer cannot be read.
        """
        names, dims, scores = self.scores(public, members, nonmembers, groups)
        m = len(members[0])
        return profile(
            self.protocol, names, dims, scores[:, :m], scores[:, m:], public=len(public[0])
        )

    def scores(
        self,
        public: Labelled,
        members: Labelled,
        nonmembers: Labelled,
        groups: Tensor | None = None,
    ) -> tuple[tuple[str, ...], tuple[int, ...], Scores]:
        """Scores of every candidate at every depth; arguments and errors as in `run`.

        Returns:
            Names (L + 1) and dims (L + 1) of the depths, scores (L + 1, M + K) float64, members
            first, higher for a member.
        """
        hashes = check_sides(self._sides(public, members, nonmembers))
        reader = self._reader(self.backbone, self.layers, public[0])
        labels = torch.cat((members[1], nonmembers[1])).cpu()
        public_labels = public[1].cpu()
        n_classes = int(public_labels.max()) + 1
        is_member = torch.arange(len(labels)) < len(members[0])
        with TemporaryDirectory(dir=self.scratch) as folder:
            sides = self._extract(reader, folder, "target", public[0], members[0], nonmembers[0])
            if self.shadow is not None:
                theirs = self._shadow_features(self.shadow, reader, folder, public[0])
            folds: list[tuple[Tensor, Tensor]] = []
            if self.protocol == "classifier":
                folds = self._folds(
                    is_member,
                    np.concatenate((hashes["members"], hashes["nonmembers"]))
                    if groups is None
                    else groups.cpu().numpy(),
                )
            rows = []
            for depth, (known, inside, outside) in enumerate(zip(*sides, strict=True)):
                x = torch.cat((inside, outside))
                standard = Standard.of(known)
                if self.protocol == "head":
                    head = fit_head(
                        known,
                        public_labels,
                        n_classes,
                        standard,
                        l2=self.l2,
                        iterations=self.iterations,
                        device=reader.device,
                    )
                    rows.append(head.margin(standard(x), labels))
                    continue
                means = class_means(known, public_labels, n_classes, standard)
                centred = standard(x) - means[labels]
                if self.shadow is None:
                    aligned = _aligned(centred, means[labels])
                    rows.append(self._cross_fitted(aligned, is_member, folds, reader.device))
                else:
                    own = [side[depth] for side in theirs]
                    carry, judge = self._judge(
                        self.shadow, known, own, public_labels, standard, reader.device
                    )
                    rows.append(
                        _log_odds(judge, _aligned(centred @ carry, (means @ carry)[labels]))
                    )
        return reader.names, tuple(x.shape[1] for x in sides[0]), torch.stack(rows).numpy()

    def _sides(
        self, public: Labelled, members: Labelled, nonmembers: Labelled
    ) -> dict[str, Labelled]:
        sides = {"public": public, "members": members, "nonmembers": nonmembers}
        if self.shadow is not None:
            sides["shadow members"] = self.shadow.members
            sides["shadow nonmembers"] = self.shadow.nonmembers
        return sides

    def _reader(
        self, backbone: nn.Module, layers: Literal["auto"] | Sequence[str], example: Tensor
    ) -> DepthReader:
        return DepthReader(backbone, layers, self.pool, example[:2], self.preprocess)

    def _extract(
        self, reader: DepthReader, folder: str, name: str, *sides: Tensor
    ) -> list[list[Tensor]]:
        places = [
            None if self.scratch is None else Path(folder, f"{name}{i}") for i in range(len(sides))
        ]
        return [
            reader.extract(images, self.batch_size, self.dtype, place)
            for images, place in zip(sides, places, strict=True)
        ]

    def _member_classifier(
        self, features: Tensor, is_member: Tensor, standard: Standard, device: torch.device
    ) -> Head:
        return fit_head(
            features,
            is_member.long(),
            2,
            standard,
            l2=MEMBER_L2,
            iterations=self.iterations,
            device=device,
        )

    def _folds(
        self, is_member: Tensor, groups: npt.NDArray[np.generic]
    ) -> list[tuple[Tensor, Tensor]]:
        splitter = StratifiedGroupKFold(self.folds, shuffle=True, random_state=self.seed)
        empty = np.zeros((len(is_member), 1))
        try:
            pairs = list(splitter.split(empty, is_member.numpy(), groups))
        except ValueError as error:
            raise InputError(f"the candidates make no {self.folds} folds: {error}") from error
        return [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs]

    def _cross_fitted(
        self,
        features: Tensor,
        is_member: Tensor,
        folds: list[tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> Tensor:
        scores = torch.empty(len(features), dtype=torch.float64)
        for fit, held in folds:
            standard = Standard.of(features[fit])
            head = self._member_classifier(features[fit], is_member[fit], standard, device)
            fold = _log_odds(head, standard(features[held]))
            # Each fold has its own classifier: only the order within a fold is comparable.
            scores[held] = (fold - fold.mean()) / fold.std().clamp(min=1e-12)
        return scores

    def _shadow_features(
        self, shadow: Shadow, reader: DepthReader, folder: str, public: Tensor
    ) -> list[list[Tensor]]:
        other = self._reader(shadow.backbone, shadow.layers, public)
        if len(other.names) != len(reader.names):
            raise InputError(
                f"the shadow has {len(other.layers)} layers and the backbone "
                f"{len(reader.layers)}: name as many of each"
            )
        return self._extract(
            other, folder, "shadow", public, shadow.members[0], shadow.nonmembers[0]
        )

    def _judge(
        self,
        shadow: Shadow,
        known: Tensor,
        theirs: list[Tensor],
        public_labels: Tensor,
        standard: Standard,
        device: torch.device,
    ) -> tuple[Tensor, Head]:
        """The map into the shadow's features and the shadow's member classifier there."""
        public, members, nonmembers = theirs
        scale = Standard.of(public)
        carry = ridge_map(known, public, standard, scale, RIDGE)
        means = class_means(public, public_labels, int(public_labels.max()) + 1, scale)
        labels = torch.cat((shadow.members[1], shadow.nonmembers[1])).cpu()
        centred = scale(torch.cat((members, nonmembers))) - means[labels]
        is_member = torch.arange(len(labels)) < len(members)
        features = _aligned(centred, means[labels])
        # Unscaled: the mapped features of the target must mean the same to this classifier.
        still = Standard(torch.zeros(features.shape[1]), torch.ones(features.shape[1]))
        return carry, self._member_classifier(features, is_member, still, device)


def _aligned(centred: Tensor, means: Tensor) -> Tensor:
    """Class-centred features and their products with the class's means, (N, 2 D)."""
    return torch.cat((centred, centred * means), dim=1)


def _log_odds(head: Head, x: Tensor) -> Tensor:
    logits = head.logits(x).double().cpu()
    return logits[:, 1] - logits[:, 0]
