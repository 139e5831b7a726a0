"""Pieces of a wave put elsewhere: chunks that change places, stretches that are cut out."""

import torch
from torch import Tensor
from torch.nn import functional

from remanence.errors import InputError
from remanence.speech.wavaugment.graph import found
from remanence.speech.wavaugment.time_drop import whole_samples
from remanence.speech.wavaugment.waves import as_waves


def chunk_swap(
    wave: Tensor,
    starts: Tensor,
    sizes: Tensor | int,
    order: Tensor,
    *,
    lengths: Tensor | None = None,
) -> Tensor:
    """Let K chunks of an example change places: chunk k is filled from chunk order[k].

    Args:
        wave: floats (T,), (C, T) or (B, C, T).
        starts: (B, K) first samples of chunks that do not overlap.
        sizes: samples of an example's chunks, a number or (B,).
        order: (B, K), each row a permutation of 0..K-1.
        lengths: valid samples of each row, (B,).

    Returns:
        The wave's shape, dtype and device.

    Raises:
        InputError: starts, sizes or order of another shape, or no permutation.
    """
    waves = as_waves(wave, lengths)
    batch, channels, time = waves.wave.shape
    first = whole_samples("starts", starts, batch)
    size = whole_samples("sizes", sizes, batch)
    places = whole_samples("order", order, batch)
    numbered = torch.arange(first.shape[1], device=places.device)
    if places.shape != first.shape or found(places.sort(1)[0] != numbered):
        raise InputError(f"order must permute 0..{first.shape[1] - 1} in each row")
    clock = torch.arange(time, device=wave.device).expand(batch, time)
    size, first, source = (v.to(wave.device) for v in (size, first, first.gather(1, places)))
    index = clock
    for begin, taken in zip(first.T, source.T, strict=True):
        into = clock - begin[:, None]
        index = torch.where((into >= 0) & (into < size), taken[:, None] + into, index)
    return waves.restore(_read(waves.wave, index.clamp(max=time - 1), channels))


def splice_out(
    wave: Tensor,
    starts: Tensor | int,
    durations: Tensor | int,
    *,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cut stretches out and close the gaps (arXiv 2110.00046), in all channels together.

    Args:
        wave: floats (T,), (C, T) or (B, C, T).
        starts: first samples that go: a number, (B,), or (B, K) for K stretches, which may overlap.
        durations: samples that go, of the same shape.
        lengths: valid samples of each row, (B,).

    Returns:
        The wave with zeros behind what is left, in its shape, dtype and device, and the samples
        left, (B,) int64 on its device. Differentiable in the wave.

    Raises:
        InputError: starts or durations that are negative, fractional or of another shape.
    """
    waves = as_waves(wave, lengths)
    _, channels, time = waves.wave.shape
    kept = kept_samples(starts, durations, waves.lengths, time)
    # A stable sort brings what is kept to the front, in order.
    index = (~kept).byte().argsort(dim=1, stable=True)
    left = kept.sum(1)
    clock = torch.arange(time, device=wave.device)
    out = _read(waves.wave, index, channels).where((clock < left[:, None])[:, None], 0)
    return waves.restore(out), left


def kept_samples(
    starts: Tensor | int, durations: Tensor | int, lengths: Tensor, time: int
) -> Tensor:
    """Which of the valid samples no stretch takes: (B, T) bool on the lengths' device."""
    first, count = _stretches(starts, durations, len(lengths), lengths.device)
    clock = torch.arange(time, device=lengths.device)
    kept = clock < lengths[:, None]
    for begin, span in zip(first.T, count.T, strict=True):
        kept = kept & ((clock < begin[:, None]) | (clock >= (begin + span)[:, None]))
    return kept


def samples_left(starts: Tensor | int, durations: Tensor | int, lengths: Tensor) -> Tensor:
    """How many of the valid samples no stretch takes: (B,) int64 on the lengths' device."""
    first, count = _stretches(starts, durations, len(lengths), lengths.device)
    first, order = first.sort(1)
    stop = (first + count.gather(1, order)).minimum(lengths[:, None])
    # In order, a stretch takes only what lies past all those before it.
    past = functional.pad(stop.cummax(1)[0][:, :-1], (1, 0))
    return lengths - (stop - torch.maximum(first, past)).clamp(min=0).sum(1)


def _stretches(
    starts: Tensor | int, durations: Tensor | int, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    first, count = (
        whole_samples(name, value, batch).to(device)
        for name, value in (("starts", starts), ("durations", durations))
    )
    if first.shape != count.shape:
        raise InputError(
            f"starts are {tuple(first.shape)} and durations {tuple(count.shape)}: give one of each"
        )
    return first, count


def _read(rows: Tensor, index: Tensor, channels: int) -> Tensor:
    return rows.gather(-1, index[:, None].expand(-1, channels, -1))
