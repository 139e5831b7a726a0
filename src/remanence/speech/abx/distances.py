"""Distances between frames.

Products are taken in float64 and the results rounded to float32. The product of two frames then
does not depend on where in a matrix they lie, and equal frames have equal distances: ties stay
ties.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Distance = Literal["angular", "cosine", "euclidean", "kl", "kl_symmetric", "identical"]

ANGLES = frozenset({"angular", "cosine"})
SYMMETRIC = frozenset({"angular", "cosine", "euclidean", "kl_symmetric", "identical"})
EPSILON = 1e-6  # within the logarithms of kl
PIECE = 2**20  # entries of frames that are taken in float64 at a time
NOTHING = 1e-14  # what float64 leaves of a difference that is 0, for each unit of its terms


def frame_distances(
    x: Tensor,
    y: Tensor,
    distance: Distance = "angular",
    norms: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the distances of all frames x to all frames y.

    - `angular`: the angle between them over pi, from 0 to 1; the official codes call it cosine.
      A zero vector is 1 from all others and 0 from another zero vector.
    - `cosine`: 1 - cos of the angle, from 0 to 2; zero vectors as above.
    - `euclidean`.
    - `kl`: sum of x log((x + 1e-6) / (y + 1e-6)), for rows of probabilities.
    - `kl_symmetric`: the mean of both directions.
    - `identical`: 0 where all entries are equal, else 1, for ids of units.

    Args:
        x: Frames (N, D).
        y: Frames (M, D).
        distance: Which; see above.
        norms: What `frame_norms` gives for x and y, where it is known.

    Returns:
        Distances (N, M), float32.
    """
    if distance == "identical":
        different = torch.zeros(len(x), len(y), dtype=torch.bool, device=x.device)
        for a, b in zip(x.unbind(1), y.unbind(1), strict=True):
            different |= a.unsqueeze(1) != b
        return different.float()
    same = x is y
    x = x.double()
    y = x if same else y.double()
    if distance == "euclidean":
        sizes = x.square().sum(1, keepdim=True) + y.square().sum(1)
        squared = torch.addmm(sizes, x, y.T, alpha=-2)
        return squared.masked_fill_(squared <= NOTHING * sizes, 0).sqrt_().float()
    if distance == "kl":
        return _kl(x, y).float()
    if distance == "kl_symmetric":
        return ((_kl(x, y) + _kl(y, x).T) / 2).float()
    norm_x, norm_y = norms or (frame_norms(x), frame_norms(y))
    # Rounded before the angle is taken: acos of 1 - 1e-16 is not 0.
    unit_x = x / norm_x.unsqueeze(1)
    unit_y = unit_x if y is x else y / norm_y.unsqueeze(1)
    cosine = (unit_x @ unit_y.T).float().clamp_(-1, 1)
    result = cosine.acos_().mul_(1 / math.pi) if distance == "angular" else 1 - cosine
    # The product with a zero vector is NaN.
    zero_x, zero_y = norm_x == 0, norm_y == 0
    if zero_x.any() or zero_y.any():
        result.masked_fill_(zero_x.unsqueeze(1) | zero_y, 1)
        result.masked_fill_(zero_x.unsqueeze(1) & zero_y, 0)
    return result


def frame_norms(frames: Tensor) -> Tensor:
    """Return the Euclidean norms (N,) of frames (N, D), float64, 0 for zero vectors alone."""
    norms = frames.new_empty(len(frames), dtype=torch.float64)
    size = max(PIECE // frames.shape[1], 1)
    for start in range(0, len(frames), size):
        piece = slice(start, start + size)
        norms[piece] = torch.linalg.vector_norm(frames[piece], dim=1, dtype=torch.float64)
    odd = (norms == 0) | norms.isinf()
    if odd.any():
        # Zero vectors; or float64 beyond 1e+-154, whose squares are 0 or infinite.
        values = frames[odd].double()
        most = values.abs().amax(1)
        scaled = torch.linalg.vector_norm(values / most.unsqueeze(1), dim=1) * most
        norms[odd] = scaled.nan_to_num(0)  # from 0 / 0
    return norms


def check_features(features: Mapping[str, Tensor], distance: Distance) -> None:
    """Refuse features that a distance has no meaning for.

    Args:
        features: Features (T, D) of each file.
        distance: The distance.

    Raises:
        InputError: The distance is unknown, or features are no matrix, hold NaN or infinities, are
            integers where a distance needs floats, or no probabilities where it needs those.
    """
    if distance not in get_args(Distance):
        raise InputError(f"distance {distance!r} is unknown: give one of {get_args(Distance)}")
    for name, frames in features.items():
        if frames.ndim != 2 or not frames.shape[1]:
            raise InputError(
                f"features of {name!r} are {tuple(frames.shape)}: give (frames, dimension)"
            )
        if distance != "identical" and not frames.is_floating_point():
            raise InputError(
                f"features of {name!r} are {frames.dtype}: give floats, or use distance 'identical'"
            )
        # A sum is NaN or infinite where a term is, and costs less than to look at each term.
        if frames.is_floating_point() and not math.isfinite(frames.sum()):
            _check_finite(frames, name)
        if distance.startswith("kl") and len(frames):
            sums = frames.double().sum(1)
            if bool((frames < 0).any()) or bool(((sums - 1).abs() > 1e-3).any()):
                raise InputError(
                    f"features of {name!r} are no probabilities: put them through softmax"
                )


def _check_finite(frames: Tensor, name: str) -> None:
    if not bool(frames.isfinite().all()):
        raise InputError(f"features of {name!r} hold NaN or infinity: check the encoder")


def _kl(x: Tensor, y: Tensor) -> Tensor:
    entropy = (x * (x + EPSILON).log()).sum(1, keepdim=True)
    result = torch.addmm(entropy, x, (y + EPSILON).log().T, alpha=-1)
    return result.masked_fill_(result.abs() < NOTHING * 100, 0)
