"""Whitening of descriptors, learned from running moments (arXiv 1811.11147).

Raw descriptors share a large mean and have a steep spectrum. A whitening takes the mean off,
projects on D' directions and scales to length 1: y = (d - m) W. What differs is W. For eigenvalues
l_i of the covariance, descending and over the largest, and their eigenvectors v_i:

    pca     v_i, then sign(y) |y|^0.5
    pcaw    v_i l_i^(-1/2)                  full whitening
    pcawt   v_i l_i^(-t/2)                  attenuated
    pcaws   v_i ((1 - a) l_i + a)^(-1/2)    shrinkage, a = l[keval]

and two from matching pairs (q, p), for S = E[(q - p)(q - p)^T] = L L^T: with A = L^-1 and U the
eigenvectors of the scatter of A (d - m),

    lw      A^T U
    lws     the same with (1 - b) S / s_1 + b I for S, where b = s[keval] / s_1
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from remanence.errors import InputError
from remanence.modes import exact_products
from remanence.search.kernel_descriptor.spectrum import RANK, shrinkage, spectrum
from remanence.search.kernel_descriptor.supervised import supervised_projection

if TYPE_CHECKING:
    from remanence.search.kernel_descriptor.moments import Moments

Kind = Literal["pca", "pcaw", "pcawt", "pcaws", "lw", "lws"]
KINDS: tuple[Kind, ...] = get_args(Kind)
KEY = "remanence.search.whitening"  # of the file's metadata


@dataclass(frozen=True, eq=False)
class Whitening:
    """A mean and a projection; call it with descriptors.

    Attributes:
        kind: How the projection was made.
        mean: m (E,), float64.
        projection: W (E, D'), float64.
        t: Attenuation of pcawt, 0 (rotation only) to 1 (full).
        keval: Zero-based index of the eigenvalue that sets the shrinkage of pcaws and lws.
        count: Vectors that it was learned from, without those of the pairs.
        pairs: Matching pairs that it was learned from.
        convention: What the descriptors are, as `KernelDescriptor.convention` says it.
    """

    kind: Kind
    mean: Tensor
    projection: Tensor
    t: float = 0.7
    keval: int = 40
    count: int = 0
    pairs: int = 0
    convention: str = ""

    @classmethod
    def fit(
        cls,
        moments: Moments,
        kind: Kind = "pcaws",
        *,
        dim: int = 128,
        t: float = 0.7,
        keval: int = 40,
        convention: str = "",
    ) -> Whitening:
        """Learn a whitening.

        Args:
            moments: Of single vectors for the first four kinds. For lw and lws, of pairs: mean and
                scatter come from the single vectors where there are any; otherwise they are the
                mean of the first vectors of the pairs and the scatter of all of them.
            kind: One of six; see the module.
            dim: Length D' of whitened vectors, at most E.
            t: Attenuation of pcawt, 0 to 1.
            keval: Zero-based index of the eigenvalue that sets the shrinkage of pcaws and lws, in
                the full spectrum.
            convention: What the descriptors are, to be kept.

        Returns:
            The whitening. Directions are unique up to sign: compare distances, not coordinates.

        Raises:
            InputError: A setting is out of range, or there is too little to learn from.
        """
        _check(kind, moments.dim, dim, t, keval)
        if kind == "lw" or kind == "lws":  # noqa: PLR1714 - mypy narrows no tuple
            mean, projection = supervised_projection(moments, kind, keval)
            found = cls(kind, mean, projection[:, :dim].contiguous())
        else:
            if moments.count == 0:
                raise InputError(
                    "no vectors to learn a whitening from: give descriptors that are not flat"
                )
            mean = moments.total / moments.count
            values, vectors = spectrum(moments.scatter(mean))
            found = cls.from_eigen(mean, vectors, values, kind, dim=dim, t=t, keval=keval)
        return replace(
            found,
            mean=found.mean.cpu(),
            projection=found.projection.cpu(),
            t=t,
            keval=keval,
            count=moments.count,
            pairs=moments.pairs if kind in ("lw", "lws") else 0,
            convention=convention,
        )

    @classmethod
    def from_eigen(
        cls,
        mean: Tensor,
        vectors: Tensor,
        values: Tensor,
        kind: Kind = "pcaws",
        *,
        dim: int = 128,
        t: float = 0.7,
        keval: int = 40,
        convention: str = "",
    ) -> Whitening:
        """Make a whitening from an eigendecomposition, such as the published models hold.

        Args:
            mean: m (E,).
            vectors: Eigenvectors as columns (E, E), by descending eigenvalue; for lw the projection
                itself.
            values: Eigenvalues (E,), descending, of any scale; not read for lw.
            kind: Any but lws.
            dim: As for `fit`, like all that follow.
            t: Attenuation.
            keval: Index.
            convention: What the descriptors are.

        Returns:
            The whitening.

        Raises:
            InputError: A setting is out of range, shapes differ, or an eigenvalue that is divided
                by is 0.
        """
        length = len(mean)
        _check(kind, length, dim, t, keval)
        if vectors.shape != (length, length) or values.shape != (length,):
            raise InputError(
                f"eigenvectors {tuple(vectors.shape)} and eigenvalues {tuple(values.shape)} for a "
                f"mean of length {length}: give ({length}, {length}) and ({length},)"
            )
        if kind == "lws":
            raise InputError("lws has no eigendecomposition to start from: fit it on pairs")
        scale = torch.ones_like(values, dtype=torch.float64)
        if kind != "lw":
            values = values.double() / values[0]
            rank = int((values > RANK).sum())
            if kind == "pcaws":
                level = shrinkage(values, keval)
                scale = ((1 - level) * values.clamp_min(0) + level) ** -0.5
            elif kind == "pcaw" or (kind == "pcawt" and t > 0):
                if rank < dim:
                    raise InputError(
                        f"{kind} to {dim} dimensions of vectors that span {rank}: give more "
                        f"vectors, a dim of at most {rank}, or the kind pcaws"
                    )
                scale = values.clamp_min(RANK) ** (-0.5 if kind == "pcaw" else -t / 2)
        projection = (vectors.double() * scale)[:, :dim].contiguous()
        return cls(kind, mean.double(), projection, t, keval, convention=convention)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Whiten descriptors.

        Args:
            vectors: (N, E), any floating type.

        Returns:
            Vectors of length 1 (N, D'), float32, or float64 where the vectors were, on their
            device. Zero vectors, which flat patches have, stay 0.

        Raises:
            InputError: The vectors are of another length.
        """
        length = len(self.mean)
        if vectors.ndim != 2 or vectors.shape[1] != length:
            raise InputError(
                f"vectors of shape {tuple(vectors.shape)} for a whitening of length {length}: "
                f"give (N, {length}), as it was learned"
            )
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        with exact_products():
            y = (vectors - self.mean.to(vectors)) @ self.projection.to(vectors)
        if self.kind == "pca":
            y = y.sign() * y.abs().sqrt()
        return torch.where(vectors.any(dim=1, keepdim=True), normalize(y, dim=1), 0)

    def save(self, file: str | Path) -> None:
        """Write one safetensors file.

        Args:
            file: Where to.
        """
        fields = {k: v for k, v in asdict(self).items() if not isinstance(v, Tensor)}
        tensors = {"mean": self.mean, "projection": self.projection}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, file, metadata={KEY: json.dumps(fields)})

    @classmethod
    def load(cls, file: str | Path, convention: str | None = None) -> Whitening:
        """Read what `save` wrote.

        Args:
            file: The file.
            convention: Refuse a whitening of other descriptors than this says; None takes any.

        Returns:
            The whitening.

        Raises:
            InputError: It is not a whitening, or of other descriptors.
        """
        if not Path(file).is_file():
            raise InputError(f"there is no whitening {file}: give a file that `save` wrote")
        try:
            with safe_open(file, "pt") as opened:
                fields = json.loads(opened.metadata()[KEY])
                mean, projection = (opened.get_tensor(n) for n in ("mean", "projection"))
            found = cls(mean=mean, projection=projection, **fields)
            _check(found.kind, len(mean), projection.shape[1], found.t, found.keval)
            wanted = (*(mean.shape), projection.shape[1])
            whole = all(isinstance(n, int) for n in (found.keval, found.count, found.pairs))
            finite = bool(mean.isfinite().all() and projection.isfinite().all())
            sound = projection.shape == wanted and whole and finite
        except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"{file} is not a whitening: give a file that `save` wrote") from error
        if not sound or not isinstance(found.convention, str):
            raise InputError(f"{file} is not a whitening: give a file that `save` wrote")
        if convention is not None and found.convention != convention:
            raise InputError(
                f"{file} was learned on descriptors [{found.convention}], not on [{convention}]: "
                "describe with the same settings, or learn a whitening with these"
            )
        return found


def _check(kind: str, length: int, dim: int, t: float, keval: int) -> None:
    if kind not in KINDS:
        raise InputError(f"a whitening {kind!r}: give one of {', '.join(KINDS)}")
    if not 1 <= dim <= length:
        raise InputError(f"dim {dim} of whitened vectors: give 1 to {length}")
    if not 0 <= t <= 1:
        raise InputError(f"attenuation t {t}: give 0 (rotation only) to 1 (full whitening)")
    if kind in ("pcaws", "lws") and not 0 <= keval < length:
        raise InputError(f"keval {keval} for vectors of length {length}: give 0 to {length - 1}")
