"""Time stretching by WSOLA: waveform similarity overlap-add, a batch at a time.

The output is laid out in segments of `hop` samples. Segment s is read near position
floor(f s hop + 1/2) of the input, at the place within `search` samples that continues best what
the segment before it left off, and the two are cross-faded over `overlap` samples. Sizes and rules
are those of the program sox (`tempo`), which WavAugment (arXiv 2007.00991, Section 3.1) calls for
its pitch modification. They depend on the sample rate alone, so every clip of a batch may have its
own factor f.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch.nn import functional

from remanence.errors import InputError
from remanence.speech.wavaugment.waves import fits, next_fast

if TYPE_CHECKING:
    from torch import Tensor

Search = Literal["full", "quick"]
MIN_SAMPLE_RATE = 400
# Two offsets that fit equally well differ by less than this share of the scores: the first wins.
TIE = 1e-12


class Sizes(NamedTuple):
    """Sizes in samples: of a segment, the range searched, the cross-fade and the step."""

    segment: int
    search: int
    overlap: int
    hop: int


def sizes(sample_rate: int) -> Sizes:
    """Sizes at a sample rate: 82 ms segments, 14.7 ms of search, 12 ms of cross-fade.

    Raises:
        InputError: the rate is below 400 Hz, too low to hold a segment.
    """
    if sample_rate < MIN_SAMPLE_RATE:
        raise InputError(
            f"sample_rate {sample_rate} is too low: give at least {MIN_SAMPLE_RATE} Hz"
        )
    segment = int(sample_rate * 82 / 1000 + 0.5)
    search = int(sample_rate * (82 / 5.587) / 1000 + 0.5)
    overlap = int(max(sample_rate * (82 / 6.833) / 1000 + 4.5, 16)) // 8 * 8
    return Sizes(segment, search, overlap, segment - overlap)


def check_search(search: str) -> None:
    """Raise InputError unless a search is one that `stretch` knows."""
    if search not in get_args(Search):
        raise InputError(f"search {search!r} is unknown: give one of {get_args(Search)}")


def stretch(
    wave: Tensor,
    sample_rate: int,
    factors: Tensor,
    n_out: int,
    *,
    search: Search = "full",
    exact: bool = False,
) -> Tensor:
    """Play each clip `factors` times as fast without a change of pitch.

    Args:
        wave: (B, C, T) float32 or float64. Channels share their splices.
        sample_rate: in Hz.
        factors: (B,) float64 at `home`, positive; above 1 shortens.
        n_out: samples to return; a clip's own end lies at floor(T / f + 1/2).
        search: `full` tries every offset, `quick` about 30 of them, as `sox tempo -q`.
        exact: sum squared differences one by one in torch, where it would be done through a
            Fourier transform, or compiled (float32 on the processor): slow, for checks.

    Returns:
        (B, C, n_out), what `wave` holds followed by zeros. Gradients reach `wave` through the
        splices that were chosen.

    Raises:
        InputError: the rate is too low or `search` is unknown.
    """
    check_search(search)
    size = sizes(sample_rate)
    batch, channels, n_samples = wave.shape
    n_segments = max(1, -(-n_out // size.hop))
    lead = size.search // 2
    # From lead + n_samples on there are only zeros: later segments may all read there.
    steps = torch.arange(n_segments, dtype=torch.float64, device=factors.device) * size.hop
    reads = torch.floor(factors[:, None] * steps + 0.5).clamp(max=lead + n_samples)  # (B, S)
    around = lead, lead + size.segment + size.search
    reads = reads.long().to(wave.device)
    if fits(wave) and not exact:
        from remanence.speech.wavaugment.compiled import spliced  # numba takes time to import

        # NumPy's, as threads of torch's that had padded would spin in the way of the kernel's.
        filled = np.pad(wave.detach().numpy(), ((0, 0), (0, 0), around))
        quick = search == "quick"
        return spliced(torch.from_numpy(filled), reads, size, n_out, TIE, quick=quick)
    padded = functional.pad(wave, around)
    with torch.no_grad():
        starts = _starts(padded, reads, size, search, exact=exact)

    # Output (s, i) reads starts[s] + i, and over a cross-fade also starts[s - 1] + hop + i.
    offsets = torch.arange(size.hop, device=wave.device)
    index = (starts[:, :, None] + offsets).view(batch, 1, -1)
    out = padded.gather(2, index.expand(batch, channels, -1))
    out = out.view(batch, channels, n_segments, size.hop)
    left_off = starts[:, :-1, None] + size.hop + offsets[: size.overlap]
    index = left_off.reshape(batch, 1, -1).expand(batch, channels, -1)
    tails = padded.gather(2, index).view(batch, channels, n_segments - 1, size.overlap)
    # Multiplied, not divided: as sox rounds it.
    fade = torch.arange(size.overlap, device=wave.device, dtype=wave.dtype) * (1 / size.overlap)
    faded = tails * (1 - fade) + out[:, :, 1:, : size.overlap] * fade
    later = torch.cat([faded, out[:, :, 1:, size.overlap :]], dim=3)
    return torch.cat([out[:, :, :1], later], dim=2).flatten(2)[..., :n_out]


def _starts(padded: Tensor, reads: Tensor, size: Sizes, search: Search, *, exact: bool) -> Tensor:
    """Where each segment is read, (B, S) positions in the padded waves."""
    batch, n_segments = reads.shape
    rows = torch.arange(batch, device=padded.device)
    span = size.search + size.overlap - 1
    tails = padded.unfold(2, size.overlap, 1)  # a view: every stretch of `overlap` samples
    windows = padded.unfold(2, span, 1)[rows[:, None], :, reads].double()  # (B, S, C, span)
    if not exact:
        n_fft = next_fast(span, real=True)
        energy = _sliding_energy(windows, size.overlap)  # (B, S, search)
        spectra = torch.fft.rfft(windows, n_fft)

    choose = _first_minimum if search == "full" else _quick_minimum
    starts = [reads[:, 0] + size.search // 2]
    for s in range(1, n_segments):
        tail = tails[rows, :, starts[-1] + size.hop].double()  # (B, C, overlap)
        if exact:
            candidates = windows[:, s].unfold(2, size.overlap, 1)  # (B, C, search, overlap)
            scores = (candidates - tail[:, :, None]).square().sum(dim=(1, 3))
        else:
            product = (spectra[:, s] * torch.fft.rfft(tail, n_fft).conj()).sum(dim=1)
            scores = energy[:, s] - 2 * torch.fft.irfft(product, n_fft)[:, : size.search]
        starts.append(reads[:, s] + choose(scores, scores.abs().amax(dim=1, keepdim=True) * TIE))
    return torch.stack(starts, dim=1)


def _sliding_energy(windows: Tensor, length: int) -> Tensor:
    """Energy of every stretch of `length` samples of (B, S, C, span), channels summed."""
    # Summed window by window: over a whole clip the rounding would drown its quiet parts.
    total = functional.pad(windows.square().sum(dim=2).cumsum(dim=2), (1, 0))
    return total[..., length:] - total[..., :-length]


def _first_minimum(scores: Tensor, tie: Tensor) -> Tensor:
    lowest = scores.amin(dim=1, keepdim=True)
    return (scores <= lowest + tie).byte().argmax(dim=1)


def _quick_minimum(scores: Tensor, tie: Tensor) -> Tensor:
    """Coarse to fine: steps of 64, then 16, 4 and 1 samples to either side of the best so far."""
    n_offsets = scores.shape[1]
    best = scores.new_full((len(scores), 1), (n_offsets + 1) // 2, dtype=torch.long)
    for step in (64, 16, 4, 1):
        reach = n_offsets // step if step == 64 else 3
        turns = torch.arange(2 * reach + 1, device=scores.device)
        tried = best + step * torch.where(turns <= reach, -turns, turns - reach)
        inside = (tried >= 0) & (tried < n_offsets)
        found = scores.gather(1, tried.clamp(0, n_offsets - 1)).where(inside, torch.inf)
        best = tried.gather(1, _first_minimum(found, tie)[:, None])
    return best[:, 0]
