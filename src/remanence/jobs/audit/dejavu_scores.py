"""The sets of `remanence audit dejavu` and their scores: from a network and images, or arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from remanence.audit.dejavu import Test, blind_walk, top_margin
from remanence.audit.guard import ImageSet
from remanence.audit.membership.attacks import MAST, References
from remanence.audit.membership.signals import Signals, signals_from_logits
from remanence.errors import InputError
from remanence.jobs.audit.outputs import apply, check_classes, is_array, pixels, read_array
from remanence.kit.evaluate import Normalise
from remanence.kit.images import Images, open_images
from remanence.kit.models import Network
from remanence.kit.progress import track

LABELLED: tuple[Test, ...] = ("mw_loss", "calibrated")
WALKED = 128  # images at a time


@dataclass(frozen=True, eq=False)
class Samples:
    """One of the sets that are compared.

    Attributes:
        role: "candidate", "reference" or "known member".
        source: What the user wrote.
        ids: A name for each sample (N).
        labels: Classes (N,), or None.
        images: The images, or None where arrays were given.
        values: Scores (N,), or logits or features (N, C), float64; None where images were given.
    """

    role: str
    source: str
    ids: tuple[str, ...]
    labels: NDArray[np.int64] | None
    images: Images | None = None
    values: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, rows: NDArray[Any]) -> Samples:
        """Return the samples at `rows`."""
        return replace(
            self,
            ids=tuple(self.ids[row] for row in rows),
            labels=None if self.labels is None else self.labels[rows],
            images=None if self.images is None else self.images.subset(rows),
            values=None if self.values is None else self.values[rows],
        )


def open_samples(
    role: str,
    source: str,
    labels: Path | None,
    *,
    limit: int | None,
    skip_broken: bool,
    show: bool,
) -> Samples:
    """Open images, or arrays of scores (N,) or of logits or features (N, C).

    Raises:
        InputError: The source is missing or broken, an array holds NaN, or labels do not fit.
    """
    if not is_array(source):
        images = open_images(source, skip_broken=skip_broken, limit=limit, show=show)
        return Samples(role, source, images.ids, images.labels, images)
    values = read_array(Path(source))
    if values.ndim not in (1, 2) or values.dtype.kind not in "fiu" or not values.size:
        raise InputError(
            f"{source}: {values.dtype} {values.shape}; give one score a sample (N,), or logits "
            "(N, classes)"
        )
    values = values.astype(np.float64)
    values = values[:, 0] if values.shape[1:] == (1,) else values
    broken = int((~np.isfinite(values.reshape(len(values), -1))).any(1).sum())
    if broken:
        raise InputError(f"{source}: {broken} of {len(values)} rows hold NaN or infinity")
    known = None if labels is None else read_array(labels)
    if known is not None and (known.shape != (len(values),) or known.dtype.kind not in "iu"):
        raise InputError(
            f"{labels}: {known.dtype} {known.shape}; give one integer label for each of the "
            f"{len(values)} rows of {source}"
        )
    ids = tuple(f"{source}:{row}" for row in range(len(values)))
    return Samples(
        role, source, ids, None if known is None else known.astype(np.int64), values=values
    )


def array_set(samples: Samples) -> ImageSet:
    """What arrays tell the guard: labels, and equal rows where no row comes twice by chance."""
    digests, values = None, samples.values
    assert values is not None
    if values.ndim == 2:
        rows = np.array([hashlib.sha256(row.tobytes()).hexdigest() for row in values])
        # Rounded or saturated outputs repeat by chance; equal rows then are no equal images.
        digests = rows if len(np.unique(rows)) == len(rows) else None
    return ImageSet(labels=samples.labels, digests=digests)


@dataclass
class Scorer:
    """Gives each test the scores that it asks for.

    Attributes:
        fabric: Launched Fabric.
        network: The audited network; None where arrays were given.
        references: Networks that saw neither candidates nor references.
        restarts: Noise tensors of each law, for the learned test.
        workers: Image loading processes.
        seed: Of the walks' noise.
    """

    fabric: Fabric
    network: Network | None
    references: Sequence[Network] = ()
    restarts: int = 10
    workers: int = 0
    seed: int = 0
    _kept: dict[tuple[str, Samples], NDArray[Any]] = field(default_factory=dict)

    def scores(self, test: Test, samples: Samples) -> NDArray[np.float64]:
        """Scores (N,) of a test, or features (N, F) for the learned one.

        Raises:
            InputError: The test asks for what is not there: labels, logits, images, references.
        """
        values, source = samples.values, samples.source
        if test == "learned":
            if values is None:
                if ("walks", samples) not in self._kept:
                    self._kept["walks", samples] = self._walks(samples)
                return self._kept["walks", samples]
            if values.ndim == 1:
                raise InputError(f"{source}: one column; the learned test asks for features (N, F)")
            return values
        if values is not None and values.ndim == 1:
            return values
        if test not in LABELLED:
            return top_margin(torch.from_numpy(self._outputs(None, samples)))
        if samples.labels is None:
            raise InputError(f"--test {test}: needs labels; give --{_flag(samples.role)}-labels")
        if test == "mw_loss":
            return self._signals(None, samples).margin[:, 0]
        if not self.references:
            raise InputError(f"{source}: logits cannot be calibrated; give calibrated scores (N,)")
        said = [self._signals(k, samples) for k in range(len(self.references))]
        unseen = np.zeros((len(said), len(samples)), dtype=bool)
        attack = MAST(tau="out", signal="margin")
        return attack.score(self._signals(None, samples), References.stack(said, unseen))

    def _signals(self, which: int | None, samples: Samples) -> Signals:
        return signals_from_logits(self._outputs(which, samples), samples.labels)

    def _outputs(self, which: int | None, samples: Samples) -> NDArray[Any]:
        """Logits of the audited network (None) or of a reference, evaluated once."""
        if samples.values is not None:
            return samples.values
        assert samples.images is not None
        what = f"{samples.role}s" if which is None else f"{samples.role}s, reference {which}"
        if (what, samples) not in self._kept:
            network = self.network if which is None else self.references[which]
            assert network is not None
            logits = apply(
                self.fabric, network, samples.images, network.model, what, workers=self.workers
            )
            self._kept[what, samples] = logits.numpy()
        return self._kept[what, samples]

    def _walks(self, samples: Samples) -> NDArray[np.float64]:
        network, images = self.network, samples.images
        assert network is not None
        assert images is not None
        normalise = Normalise(network.test.mean, network.test.std)
        model = network.model.to(self.fabric.device).eval()
        views = pixels(network, images, samples.source)
        parts = [
            blind_walk(
                lambda x: model(normalise(255 * x)),
                views[start : start + WALKED].to(self.fabric.device).float() / 255,
                restarts=self.restarts,
                seed=self.seed,
            )
            for start in track(range(0, len(views), WALKED), f"walks of {samples.role}s")
        ]
        return np.concatenate(parts)


def check_labels(scorer: Scorer, tests: Sequence[Test], samples: Sequence[Samples]) -> None:
    """Refuse images whose classes are not the networks', where a test reads their labels."""
    if not set(tests).intersection(LABELLED):
        return
    networks = [] if scorer.network is None else [scorer.network, *scorer.references]
    for given in samples:
        for network in networks:
            if given.images is not None:
                check_classes(network, given.images)


def _flag(role: str) -> str:
    return {"known member": "known"}.get(role, role)
