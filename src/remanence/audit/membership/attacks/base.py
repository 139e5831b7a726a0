"""What every attack is: a name, a source, what it needs, and a score."""

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np

from remanence.audit.membership.attacks.reference_signals import References
from remanence.audit.membership.signals import FloatArray, Signals
from remanence.errors import InputError

Need = Literal["references", "in", "out", "population", "labels"]


class Attack(ABC):
    """A score of membership, higher for what looks more like a member."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name, as in `ATTACKS`."""

    @property
    @abstractmethod
    def paper(self) -> str:
        """Source and threat model, in one line."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """What `score` has to be given.

        "references" are models trained alike, "in" ("out") that each sample has one trained with
        (without) it, "labels" the true labels, "population" other samples.
        """

    @abstractmethod
    def _score(self, target: Signals, references: References) -> FloatArray:
        """Scores of every query, (N, Q)."""

    def score(self, target: Signals, references: References | None = None) -> FloatArray:
        """Score the samples, (N,) float64, averaged over queries.

        Args:
            target: signals of the audited model on N samples.
            references: signals of the references on the same samples, where `needs` names them.

        Raises:
            InputError: something that `needs` names is missing, target and references do not
                speak of the same samples, or a score is not finite.
        """
        if "labels" in self.needs and target.predicted:
            raise InputError(f"{self.name} needs true labels: predicted ones are always correct")
        if "references" in self.needs:
            self._check(target, references)
        # An attack whose needs do not name references never reads them.
        scores: FloatArray = self._score(target, references).mean(axis=1)  # type: ignore[arg-type]
        if not np.isfinite(scores).all():
            n_bad = int((~np.isfinite(scores)).sum())
            raise InputError(
                f"{self.name} is undefined for {n_bad} of {len(scores)} samples: "
                "the signals it reads are missing"
            )
        return scores

    def _check(self, target: Signals, references: References | None) -> None:
        if references is None:
            raise InputError(f"{self.name} needs reference models: give their signals")
        if references.loss.shape[1:] != target.loss.shape:
            raise InputError(
                f"references cover (samples, queries) {references.loss.shape[1:]}, "
                f"the target {target.loss.shape}: score the same samples with the same queries"
            )
        if references.labels is not None and (references.labels != target.labels).any():
            raise InputError("references scored other labels than the target: give them the same")
        if "in" in self.needs:
            references.require("in")
        if "out" in self.needs:
            references.require("out")
