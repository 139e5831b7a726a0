"""Noise that is a function of a row's seed and the sample's place.

Nothing is drawn in sequence, so a row gets the same noise on every device, in every batch and in
every replay. A place's counter goes through a 32-bit integer hash (multiply, xor, shift: the
construction of counter-based generators, doi 10.1145/2063384.2063405, in its smallest form): good
enough for noise, not for cryptography.
"""

import math

import torch
from torch import Tensor

BITS = 0xFFFFFFFF


def uniform_noise(seeds: Tensor, *shape: int) -> Tensor:
    """Even in (0, 1).

    Args:
        seeds: (B,) int64, 0 or more.
        shape: of a row's noise, samples last. A sample's noise is the same however many follow.

    Returns:
        (B, *shape) float64 on the seeds' device.
    """
    *inner, time = shape
    places = torch.arange(math.prod(shape), device=seeds.device)
    keys = _hash(_hash(seeds & BITS) ^ (seeds >> 32) & BITS)
    mixed = _hash(_hash(places) ^ keys[:, None])
    return ((mixed.double() + 0.5) / 2**32).view(len(seeds), time, *inner).movedim(1, -1)


def normal_noise(seeds: Tensor, *shape: int) -> Tensor:
    """Gaussian, of mean 0 and variance 1; takes and returns what `uniform_noise` does."""
    radius, turn = uniform_noise(seeds, 2, *shape).unbind(1)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * turn).cos()


def _hash(x: Tensor) -> Tensor:
    """Mix the 32 low bits of int64s; products wrap, and their low bits are right all the same."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & BITS
    return x ^ (x >> 16)
