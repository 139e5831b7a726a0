"""The map that is not learned with the code in mind: PCA, then to length 1.

The control of arXiv 1806.03198: a lattice on its outputs shows what the catalyzer adds.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import normalize

from remanence.errors import InputError
from remanence.modes import exact_products

if TYPE_CHECKING:
    from torch import Tensor

KEY = "remanence.search.pca"  # of the file's metadata
ROWS = 65_536  # vectors at a time


class PcaTransform:
    """Take the mean off, project on the directions of largest variance, scale to length 1.

    Args:
        mean: (in_dim,).
        projection: Orthonormal columns (in_dim, out_dim), by falling variance.

    Attributes:
        in_dim: Dimension of the vectors.
        out_dim: Dimension of the sphere's space.
        digest: SHA-256 of mean and projection, hexadecimal: an index names it, so that its codes
            are never read with another map.

    Raises:
        InputError: Shapes do not match, or a value is not finite.
    """

    def __init__(self, mean: Tensor, projection: Tensor) -> None:
        if projection.ndim != 2 or mean.shape != projection.shape[:1]:
            raise InputError(
                f"a mean {tuple(mean.shape)} and a projection {tuple(projection.shape)}: give "
                "(in_dim,) and (in_dim, out_dim)"
            )
        self.mean, self.projection = mean.float().cpu(), projection.float().cpu().contiguous()
        if not bool(self.mean.isfinite().all() and self.projection.isfinite().all()):
            raise InputError("a PCA that holds NaN or infinity: fit it again")
        self.in_dim, self.out_dim = self.projection.shape
        digest = hashlib.sha256(f"pca {self.in_dim} {self.out_dim}".encode())
        for tensor in (self.mean, self.projection):
            digest.update(tensor.numpy().tobytes())
        self.digest = digest.hexdigest()

    @classmethod
    def fit(cls, x: Tensor, out_dim: int) -> PcaTransform:
        """Learn mean and directions from training vectors.

        Args:
            x: (n, in_dim), any real type; sums are taken in float64.
            out_dim: Directions to keep, 1 to in_dim.

        Returns:
            The map. Of each direction and its opposite, it has the one whose largest coordinate is
            positive.

        Raises:
            InputError: out_dim is out of range, or the vectors are all the same or not finite.
        """
        if x.ndim != 2 or not 1 <= out_dim <= x.shape[1]:
            raise InputError(
                f"{out_dim} directions of vectors {tuple(x.shape)}: give at most as many as they "
                "have dimensions"
            )
        mean, directions, _ = principal_components(x)
        return cls(mean, directions[:, :out_dim])

    def embed(self, x: Tensor) -> Tensor:
        """Return unit vectors (n, out_dim), float32, on x's device, of vectors (n, in_dim).

        A vector that has no part in the directions, such as the mean itself, stays 0.

        Raises:
            InputError: The shape is wrong, or a row is not finite.
        """
        if x.ndim != 2 or x.shape[1] != self.in_dim:
            raise InputError(
                f"vectors of shape {tuple(x.shape)} for a PCA of dimension {self.in_dim}: give "
                f"(n, {self.in_dim})"
            )
        mean, projection = self.mean.to(x.device), self.projection.to(x.device)
        parts = [x.new_zeros((0, self.out_dim), dtype=torch.float32)]
        with torch.no_grad(), exact_products():
            for start in range(0, len(x), ROWS):
                rows = x[start : start + ROWS].float()
                broken = ~rows.isfinite().all(1)
                if bool(broken.any()):
                    number = start + int(broken.int().argmax())
                    raise InputError(f"row {number} holds NaN or infinity: leave it out")
                parts.append(normalize((rows - mean) @ projection, dim=1))
        return torch.cat(parts)

    def save(self, file: str | Path) -> None:
        """Write one safetensors file."""
        save_file({"mean": self.mean, "projection": self.projection}, file, metadata={KEY: "1"})

    @classmethod
    def load(cls, file: str | Path) -> PcaTransform:
        """Read what `save` wrote.

        Raises:
            InputError: It is no such file.
        """
        if not Path(file).is_file():
            raise InputError(f"{file}: there is no such PCA; give what `save` wrote")
        try:
            with safe_open(file, "pt") as opened:
                known = KEY in (opened.metadata() or {})
                found = cls(opened.get_tensor("mean"), opened.get_tensor("projection"))
        except (SafetensorError, InputError) as error:
            raise InputError(f"{file} is not a PCA: give a file that `save` wrote") from error
        if not known:
            raise InputError(f"{file} is not a PCA: give a file that `save` wrote")
        return found


def principal_components(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, directions and variances of vectors, in float64.

    Args:
        x: (n, d), any real type, at least two rows.

    Returns:
        Mean (d,); orthonormal columns (d, d), by falling variance, of each direction and its
        opposite the one whose largest coordinate is positive; variances (d,).

    Raises:
        InputError: There are fewer than two vectors, all are the same, or one is not finite.
    """
    if x.ndim != 2 or len(x) < 2:
        raise InputError(f"vectors {tuple(x.shape)}: give at least 2, (n, d)")
    mean = torch.stack([part.double().sum(0) for part in torch.split(x, ROWS)]).sum(0) / len(x)
    scatter = x.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float64)
    for part in torch.split(x, ROWS):
        centred = part.double() - mean
        scatter += centred.T @ centred
    # Equal float64 numbers may be a rounding error away from their mean.
    apart = (scatter.diagonal() / len(x)).sqrt() > 1e-12 * mean.abs()
    if not bool(scatter.isfinite().all()) or not bool(apart.any()):
        raise InputError("training vectors are all the same, or hold NaN: give some that differ")
    variances, directions = torch.linalg.eigh(scatter / len(x))
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return mean, directions * largest.sign(), variances
