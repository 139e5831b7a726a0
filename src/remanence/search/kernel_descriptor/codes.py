"""Short codes for millions of whitened descriptors, and what they cost.

Codes are faiss's own: `PQ16x8` cuts a vector into 16 parts of one byte each (Jegou et al., "Product
quantization for nearest neighbor search", 2011); `ITQ128,LSH` keeps the sign of 128 rotated
coordinates (Gong and Lazebnik, "Iterative quantization", 2011).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from remanence.errors import InputError
from remanence.search.kernel_descriptor.evaluation import fpr95, matching_map

if TYPE_CHECKING:
    from collections.abc import Sequence

FLOAT = "float"
KEYS = ("PQ32x8", "PQ16x8", "PQ8x8", "ITQ128,LSH")


@dataclass(frozen=True)
class CodeLoss:
    """What one code keeps.

    Attributes:
        key: Of `faiss.index_factory`; `float` for no code.
        bytes: A vector takes.
        matching_map: Average precision of matching, 0 to 1.
        fpr95: False positive rate at 95 % recall, 0 to 1.
    """

    key: str
    bytes: int
    matching_map: float
    fpr95: float


def code_loss(
    train: Tensor, first: Tensor, second: Tensor, keys: Sequence[str] = KEYS, seed: int = 0
) -> list[CodeLoss]:
    """Measure what codes lose in matching two images.

    The second vectors are stored as codes. A product quantiser compares the first ones as they are
    with what the codes stand for, as faiss's search does; signs are compared with signs.

    Args:
        train: Descriptors to learn the codes from (T, D), of other images; at least 256.
        first: (N, D).
        second: (N, D): row i matches row i of the first.
        keys: What `faiss.index_factory` makes of length D; with `LSH` for signs.
        seed: For the pairs that do not match: each first vector and another second one.

    Returns:
        A row for the descriptors as they are, then one a key. All are scaled to length 1 first.

    Raises:
        InputError: The shapes do not fit, there is too little to learn from, or faiss does not know
            a key.
    """
    if first.shape != second.shape or first.ndim != 2 or len(first) < 2:
        raise InputError(
            f"descriptors of shapes {tuple(first.shape)} and {tuple(second.shape)}: give two of "
            "(N, D), N at least 2, whose rows match"
        )
    if train.ndim != 2 or train.shape[1] != first.shape[1] or len(train) < 256:
        raise InputError(
            f"{tuple(train.shape)} to learn codes from: give at least 256 descriptors of length "
            f"{first.shape[1]}"
        )
    x, a, b = (normalize(v.detach().float().cpu(), dim=1).numpy() for v in (train, first, second))
    rows = [_row(FLOAT, 4 * a.shape[1], torch.from_numpy(a), torch.from_numpy(b), seed)]
    for key in keys:
        coder = _coder(key, x)
        codes = coder.sa_encode(b)
        if "LSH" in key:
            ours, theirs = (_bits(c) for c in (coder.sa_encode(a), codes))
        else:
            ours, theirs = torch.from_numpy(a), torch.from_numpy(coder.sa_decode(codes))
        rows.append(_row(key, coder.sa_code_size(), ours, theirs, seed))
    return rows


def _coder(key: str, train: np.ndarray) -> Any:
    """A trained index of faiss."""
    try:
        coder = faiss.index_factory(train.shape[1], key)
        if hasattr(coder, "do_polysemous_training"):
            # It renumbers codewords for a filter that is not used, and takes a minute.
            coder.do_polysemous_training = False
        coder.train(train)
        coder.sa_code_size()
    except RuntimeError as error:
        raise InputError(
            f"faiss makes no code {key!r} of {len(train)} vectors of length {train.shape[1]}: give "
            "one such as PQ16x8, whose parts divide the length"
        ) from error
    return coder


def _bits(codes: np.ndarray) -> Tensor:
    """Codes as vectors of 0 and 1, whose squared distance is Hamming's."""
    return torch.from_numpy(np.unpackbits(codes, axis=1)).float()


def _row(key: str, size: int, ours: Tensor, theirs: Tensor, seed: int) -> CodeLoss:
    count = len(ours)
    shift = torch.randint(1, count, (count,), generator=torch.Generator().manual_seed(seed))
    strangers = theirs[(torch.arange(count) + shift) % count]
    distance = torch.cat([(ours - other).norm(dim=1) for other in (theirs, strangers)])
    label = torch.arange(2 * count) < count
    return CodeLoss(key, size, matching_map(ours, theirs), fpr95(-distance, label))
