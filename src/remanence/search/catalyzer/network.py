"""The catalyzer: a small network that spreads vectors on the sphere (arXiv 1806.03198, section 3).

Instead of a quantiser that adapts to the data, data that adapt to the quantiser: neighbours stay
neighbours, and the outputs fill a sphere of few dimensions evenly, where a code needs no training.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from remanence.errors import InputError
from remanence.modes import evaluating, exact_products
from remanence.search.catalyzer.linear import principal_components

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY = "remanence.search.catalyzer"  # of the file's metadata
ROWS = 8192  # vectors embedded at a time
ATTENUATION = 0.25  # power of the variances that the first shortcut divides by: 0 PCA, 1 whitening
RANK = 1e-6  # share of the largest variance below which there is none


class Catalyzer(nn.Module):
    """Linear, batch norm, ReLU, twice, then linear, and to length 1.

    Args:
        in_dim: Dimension of the vectors.
        dims: Dimensions of the outputs, rising. The last is the whole output; a smaller one is a
            prefix of it, normalised by itself, so that one network serves codes of several sizes.
        hidden: Width of both hidden layers.
        shortcut: Add a linear map of the inputs to the output, which begins as their principal
            components; the published network has none, and comes less far in as many epochs.

    Attributes:
        shift: Mean of the training vectors (in_dim,), taken off first; 0 until `initialise`.
        scale: Their standard deviation, one for all coordinates (), divided by; 1 until then.

    Raises:
        InputError: A dimension is out of range.

    Warns:
        UserWarning: The outputs have more dimensions than the vectors: codes gain nothing by it.
    """

    def __init__(
        self, in_dim: int, dims: Sequence[int], *, hidden: int = 1024, shortcut: bool = True
    ) -> None:
        super().__init__()
        if in_dim < 1 or hidden < 1 or not dims or dims[0] < 2:
            raise InputError(
                f"a catalyzer from {in_dim} by {hidden} to {list(dims)}: give at least 1, 1 and 2"
            )
        if any(small >= large for small, large in pairwise(dims)):
            raise InputError(f"output dimensions {list(dims)}: give them rising, each once")
        if dims[-1] > in_dim:
            warnings.warn(
                f"a catalyzer from {in_dim} up to {dims[-1]} dimensions: fewer serve as well",
                stacklevel=2,
            )
        self.in_dim, self.dims, self.hidden = in_dim, tuple(dims), hidden
        self.body = nn.Sequential(
            nn.Linear(in_dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, dims[-1])
        self.shortcut = nn.Linear(in_dim, dims[-1], bias=False) if shortcut else None
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.zeros(in_dim))
        self.register_buffer("scale", torch.ones(()))

    def initialise(self, x: Tensor) -> None:
        """Fix shift and scale from training vectors, and begin from their principal components.

        Shift and scale make any scale of the inputs train alike. The shortcut is set to the
        principal components, attenuated, and the head to 0, so that the untrained map is theirs.
        A network that has been trained stays as it is, to be trained on.

        Args:
            x: Vectors (n, in_dim).

        Raises:
            InputError: The vectors are all the same, or a row is not finite.
        """
        self._check(x)
        for start in range(0, len(x), ROWS):
            _refuse_broken(x[start : start + ROWS], start)
        if self.state_dict()["body.1.num_batches_tracked"] > 0:
            return
        mean, directions, variances = principal_components(x)
        scale = variances.mean().sqrt().to(self.scale.dtype)
        if not 0 < scale < math.inf:
            raise InputError("training vectors are all the same: give some that differ")
        self.shift.copy_(mean)
        self.scale.copy_(scale)
        if self.shortcut is None:
            return
        kept = min(self.dims[-1], self.in_dim)
        shares = (variances[:kept] / variances[0]).clamp(min=RANK)
        weight = directions[:, :kept] * shares ** (-ATTENUATION / 2)
        length = (weight.square().sum(0) * variances[:kept]).sum().sqrt()  # root mean square
        with torch.no_grad():
            self.shortcut.weight.zero_()
            self.shortcut.weight[:kept] = (weight * (scale / length)).T
            self.head.weight.zero_()
            self.head.bias.zero_()

    def standardised(self, x: Tensor) -> Tensor:
        """Return vectors (n, in_dim) less `shift`, over `scale`."""
        return (x.to(self.shift.dtype) - self.shift) / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs before normalisation (n, dims[-1]) of vectors (n, in_dim).

        Under autocast the hidden layers run in the lower precision, the last one does not: the
        distances between neighbours are smaller than bfloat16 can tell.
        """
        self._check(x)
        standardised = self.standardised(x)
        hidden = self.body(standardised)
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.head(hidden.to(self.shift.dtype))
            return out if self.shortcut is None else out + self.shortcut(standardised)

    def outputs(self, x: Tensor) -> Tensor:
        """Return what `forward` does in evaluation mode, without gradient, on x's device.

        Batch norm uses its running statistics and products are exact float32, so that a vector's
        image does not depend on its batch.

        Raises:
            InputError: The shape is wrong, or a row is not finite.
        """
        self._check(x)
        device = self.shift.device
        parts = [x.new_zeros((0, self.dims[-1]), dtype=self.shift.dtype)]
        with evaluating(self), torch.no_grad(), exact_products():
            for start in range(0, len(x), ROWS):
                rows = x[start : start + ROWS]
                _refuse_broken(rows, start)
                parts.append(self(rows.to(device)).to(x.device))
        return torch.cat(parts)

    def unit(self, out: Tensor, dim: int) -> Tensor:
        """Return the unit vectors (n, dim), at least float32, of outputs (n, dims[-1])."""
        return normalize(out[:, :dim].to(torch.promote_types(out.dtype, torch.float32)), dim=1)

    def at(self, dim: int) -> Embedding:
        """Return the finished map to the sphere of one of `dims`.

        Raises:
            InputError: The catalyzer was not made for that dimension.
        """
        if dim not in self.dims:
            known = ", ".join(map(str, self.dims))
            raise InputError(f"dimension {dim} of a catalyzer for {known}: give one of these")
        return Embedding(self, dim)

    def save(self, file: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {name: value.cpu().contiguous() for name, value in self.state_dict().items()}
        shape = {"in_dim": self.in_dim, "dims": self.dims, "hidden": self.hidden}
        shape["shortcut"] = self.shortcut is not None
        save_file(tensors, file, metadata={KEY: json.dumps(shape)})

    @classmethod
    def load(cls, file: str | Path) -> Catalyzer:
        """Read what `save` wrote.

        Raises:
            InputError: It is no catalyzer, or a weight is not finite.
        """
        if not Path(file).is_file():
            raise InputError(f"{file}: there is no such catalyzer; give what `train` wrote")
        try:
            with safe_open(file, "pt") as opened:
                shape = json.loads((opened.metadata() or {})[KEY])
                with (
                    torch.device("meta"),  # a broken file may claim any size: it costs nothing
                    warnings.catch_warnings(action="ignore"),  # it was warned of in training
                ):
                    found = cls(
                        int(shape["in_dim"]),
                        shape["dims"],
                        hidden=int(shape["hidden"]),
                        shortcut=bool(shape["shortcut"]),
                    )
                # Copies, as the file may be written again while the network is in use.
                weights = {name: opened.get_tensor(name).clone() for name in found.state_dict()}
                found.load_state_dict(weights, assign=True)
        except (
            SafetensorError,
            KeyError,
            TypeError,
            ValueError,  # of JSON, and InputError
            RuntimeError,
            OverflowError,
        ) as error:
            raise InputError(
                f"{file} is not a catalyzer: give a file that `train` wrote"
            ) from error
        if not all(bool(value.isfinite().all()) for value in found.state_dict().values()):
            raise InputError(f"{file} holds a weight that is NaN or infinite: train it again")
        return found.float().eval()

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.in_dim:
            raise InputError(
                f"vectors of shape {tuple(x.shape)} for a catalyzer of dimension {self.in_dim}: "
                f"give (n, {self.in_dim})"
            )


class Embedding:
    """The map of a trained catalyzer to the sphere of one dimension.

    Attributes:
        in_dim: Dimension of vectors.
        out_dim: Dimension of the sphere's space.
    """

    def __init__(self, catalyzer: Catalyzer, dim: int) -> None:
        self.catalyzer, self.in_dim, self.out_dim = catalyzer, catalyzer.in_dim, dim

    @property
    def digest(self) -> str:
        """SHA-256 of the present weights and of `out_dim`, hexadecimal.

        An index names it, so that its codes are never read with other weights.
        """
        digest = hashlib.sha256(str(self.out_dim).encode())
        for name, value in sorted(self.catalyzer.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def embed(self, x: Tensor) -> Tensor:
        """Return unit vectors (n, out_dim), float32, on x's device, of vectors (n, in_dim).

        They are `Catalyzer.outputs`, a vector's image not depending on its batch.

        Raises:
            InputError: The shape is wrong, or a row is not finite.
        """
        return self.catalyzer.unit(self.catalyzer.outputs(x), self.out_dim).float()


def _refuse_broken(rows: Tensor, start: int) -> None:
    broken = ~rows.isfinite().all(1)
    if bool(broken.any()):
        raise InputError(f"row {start + int(broken.int().argmax())} holds NaN or infinity")
