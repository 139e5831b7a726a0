"""The position kernels on any feature map (Mukundan et al., arXiv 1904.07190).

A convolutional network's activations take the place of gradient directions: a map's encoding is
the sum over its places of the activation vector times the embedding of the position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from remanence.errors import InputError
from remanence.search.kernel_descriptor.embedding import pixel_grid, position_features
from remanence.search.kernel_descriptor.von_mises import von_mises_coefficients

if TYPE_CHECKING:
    from torch import Tensor


class ExplicitSpatialEncoding(nn.Module):
    """Encode feature maps of any size as vectors that know where things are.

    It has no parameters. The inner product of two encodings is the sum over all pairs of places of
    the activations' inner product times the position kernels; scale them to length 1 to compare.
    """

    def __init__(
        self,
        channels: int,
        kind: Literal["concat", "polar", "cartesian"] = "concat",
        *,
        polar: tuple[float, int] = (8.0, 2),
        cartesian: tuple[float, int] = (1.0, 1),
        centrality: float | None = 1.0,
    ) -> None:
        """Make the layer.

        Args:
            channels: C of the feature maps.
            kind: Polar positions, Cartesian ones, or both.
            polar: Kappa and number of frequencies of the kernels on phi and on pi rho.
            cartesian: The same of the kernels on pi x / 2 and on pi y / 2.
            centrality: Sigma of a place's weight exp(-rho^2 / sigma^2); None weighs all alike.

        Raises:
            InputError: A setting is out of range.
        """
        super().__init__()
        if kind not in ("concat", "polar", "cartesian"):
            raise InputError(f"kind {kind!r}: give concat, polar or cartesian")
        if centrality is not None and not centrality > 0:
            raise InputError(f"centrality {centrality}: give a sigma above 0, or None")
        settings = {"polar": polar, "cartesian": cartesian}
        self.channels = channels
        self.centrality = centrality
        self.kernels = {
            name: von_mises_coefficients(*setting)
            for name, setting in settings.items()
            if kind in ("concat", name)
        }
        self.positions = sum((2 * len(c) - 1) ** 2 for c in self.kernels.values())
        self.features = channels * self.positions  # length of an encoding

    def forward(self, maps: Tensor) -> Tensor:
        """Encode.

        Args:
            maps: (B, C, h, w), floating. The outermost places are at -1 and 1.

        Returns:
            (B, C P), for P = 25 polar positions (phi, rho), then 9 Cartesian ones (x, y), the last
            fastest, in the type of the maps.

        Raises:
            InputError: The shape is another one.
        """
        if maps.ndim != 4 or maps.shape[1] != self.channels:
            raise InputError(
                f"feature maps of shape {tuple(maps.shape)}: give (B, {self.channels}, h, w)"
            )
        x, y = pixel_grid(*maps.shape[2:])
        embedding = torch.cat(
            [
                position_features(x, y, kind, coefficients, self.centrality)
                for kind, coefficients in self.kernels.items()
            ]
        )
        return (maps.flatten(2) @ embedding.to(maps).mT).flatten(1)
