"""Duplicates and near duplicates among images, and the clusters that they form."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional

from remanence.errors import InputError

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

MIN_PIXELS = 24  # of the shorter side: smaller images have too little structure to hash
FLAT = 2.0  # grey levels: images with less spread are noise or blank


def perceptual_hash(images: Tensor) -> Hashes:
    """64-bit DCT hash: nearly equal for a picture resized, recompressed, brightened or blurred.

    pHash (Zauner 2010): grey, 32 x 32 pixels, the cosine coefficients 1 to 8 of rows and columns,
    one bit each for those above their median. 32 bits are set; flips and crops change the hash.

    Args:
        images: (N, 3, h, w) uint8, any device.

    Returns:
        (N,) uint64; 0 for images that cannot be hashed, which match nothing: those whose shorter
        side is under 24 pixels, and those whose grey levels spread by less than 2 (blank images
        would all hash alike, or by their noise). Equal files are found by their digests.

    Raises:
        InputError: `images` has another shape or dtype.
    """
    check_thumbnails(images)
    hashes = np.zeros(len(images), dtype=np.uint64)
    if min(images.shape[2:]) < MIN_PIXELS:
        return hashes
    grid = torch.arange(32, dtype=torch.float64)
    cosines = torch.cos(math.pi / 32 * (grid + 0.5) * torch.arange(1, 9)[:, None])  # (8, 32)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    for start in range(0, len(images), 1024):
        batch = images[start : start + 1024].double()
        grey = torch.einsum("nchw,c->nhw", batch, weights.to(batch.device))[:, None]
        small = functional.interpolate(grey, (32, 32), mode="bilinear", antialias=True)[:, 0].cpu()
        coefficients = (cosines @ small @ cosines.T).flatten(1)
        bits = (coefficients > coefficients.median(1, keepdim=True).values).numpy()
        packed = np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)
        flat = small.flatten(1).std(1, correction=0).numpy() < FLAT
        hashes[start : start + 1024] = np.where(flat, np.uint64(0), packed)
    return hashes


def duplicates(hash_a: ArrayLike, hash_b: ArrayLike, radius: int = 4) -> Ints:
    """Pairs of items whose hashes differ in at most `radius` bits.

    Args:
        hash_a: (N,) uint64 from `perceptual_hash`; 0 matches nothing.
        hash_b: (M,) uint64.
        radius: Hamming distance, 0 to 63; 4 for pictures that a person calls the same.

    Returns:
        (P, 2) int64 indices into `hash_a` and `hash_b`, sorted. Memory is O(N + M + P).

    Raises:
        InputError: Hashes are no (N,) uint64, or the radius is out of range.
    """
    a, b = _hashes(hash_a), _hashes(hash_b)
    values, ids = np.unique(np.concatenate([a, b]), return_inverse=True)
    i, j = _neighbours(values, radius).T
    same = np.flatnonzero(values)
    near = _relation(np.r_[i, j, same], np.r_[j, i, same], len(values), len(values))
    has_a = _relation(np.arange(len(a)), ids[: len(a)], len(a), len(values))
    has_b = _relation(np.arange(len(b)), ids[len(a) :], len(b), len(values))
    pairs = np.stack((has_a @ near @ has_b.T).nonzero(), axis=1).astype(np.int64)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def clusters(hashes: ArrayLike, radius: int = 4, same: Sequence[ArrayLike] = ()) -> Ints:
    """Cluster ids of near duplicates, so that clusters rather than items can be permuted.

    Items join when their hashes differ in at most `radius` bits, or when they are equal in any of
    the `same` arrays; joins chain.

    Args:
        hashes: (N,) uint64 from `perceptual_hash`; 0 matches nothing.
        radius: Hamming distance, 0 to 63.
        same: Arrays (N,) of further labels that bind, such as file digests or persons.

    Returns:
        (N,) int64 ids from 0, in order of first appearance.

    Raises:
        InputError: Hashes are no (N,) uint64, lengths differ, or the radius is out of range.
    """
    h = _hashes(hashes)
    values, ids = np.unique(h, return_inverse=True)
    near = _neighbours(values, radius)
    n, nodes = len(h), len(h) + len(values)
    items = np.flatnonzero(h)
    edges = [np.stack([items, n + ids[items]], 1), n + near]
    for labels in same:
        names, label_ids = np.unique(item_column(labels, n, "same"), return_inverse=True)
        edges.append(np.stack([np.arange(n), nodes + label_ids], 1))
        nodes += len(names)
    i, j = np.concatenate(edges).T
    found = connected_components(_relation(i, j, nodes, nodes), directed=False)[1][:n]
    _, first, ids = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[ids].astype(np.int64)


def _relation(i: Ints, j: Ints, rows: int, columns: int) -> Any:
    """Sparse (rows, columns) matrix with ones at (i, j)."""
    return sparse.csr_matrix((np.ones(len(i), dtype=np.int32), (i, j)), shape=(rows, columns))


def _neighbours(values: Hashes, radius: int) -> Ints:
    """Index pairs (P, 2) of distinct hashes, rising and without 0, at most `radius` bits apart.

    Two hashes that differ in `radius` bits agree in one of `radius` + 1 bands of their bits, so
    that only hashes that share a band are compared. Memory is O(U + P) whatever the hashes.
    """
    if not 0 <= radius < 64:
        raise InputError(f"radius {radius} is out of range: give a number of bits from 0 to 63")
    edges = np.linspace(0, 64, radius + 2).astype(int)
    found = [np.zeros((0, 2), dtype=np.int64)]
    for low, high in itertools.pairwise(edges.tolist()):
        band = (values >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(band, kind="stable")
        order = order[values[order] != 0]
        band, ordered = band[order], values[order]
        at, step = np.arange(len(order)), 1
        while len(at):
            at = at[at + step < len(order)]
            at = at[band[at] == band[at + step]]
            close = at[_popcount(ordered[at] ^ ordered[at + step]) <= radius]
            found.append(np.stack([order[close], order[close + step]], 1))
            step += 1
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _popcount(bits: Hashes) -> Ints:
    return np.asarray(_BITS[bits.view(np.uint16).reshape(-1, 4)].sum(1))


_BITS = np.array([word.bit_count() for word in range(1 << 16)], dtype=np.int64)


def _hashes(hashes: ArrayLike) -> Hashes:
    h = np.asarray(hashes)
    if h.dtype != np.uint64 or h.ndim != 1:
        raise InputError(f"hashes are {h.dtype} {h.shape}: give (N,) uint64 of perceptual_hash")
    return h


def item_column(values: ArrayLike, n: int, name: str) -> NDArray[Any]:
    """Return one value an item as an array, or refuse another shape."""
    column = np.asarray(values)
    if column.shape != (n,):
        raise InputError(f"{name} has shape {column.shape}: give one value for each of {n} items")
    return column


def check_thumbnails(images: Tensor) -> None:
    """Refuse what is no batch of colour thumbnails."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise InputError(
            f"images are {images.dtype} {tuple(images.shape)}: give (N, 3, h, w) uint8 thumbnails"
        )
    if min(images.shape[2:]) < 8:
        raise InputError(f"images of {images.shape[3]}x{images.shape[2]} pixels: give 8x8 or more")
