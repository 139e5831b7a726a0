"""Pitch, tempo and speed of waveforms, every clip of a batch by its own amount.

WavAugment's pitch modification (arXiv 2007.00991, Section 3.1): stretch in time by WSOLA, then
resample to the old length. Results agree with the program sox, which the paper's authors call.

Waves are (T,), (C, T) or (B, C, T) floats in [-1, 1]; a result has the wave's number of dimensions,
dtype and device. A parameter is a number or a tensor (B,), best on the CPU: it is read there.
`lengths` are the samples that count of each clip, integers (B,); what lies behind them is ignored,
and zero in the result. `bounds` are the least and the largest value that a parameter may have: with
them sizes inside hang on them and no longer on the values, as `torch.compile` needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from remanence.speech.wavaugment.graph import Bounds, home
from remanence.speech.wavaugment.resampling import Quality, resample_at
from remanence.speech.wavaugment.waves import Waves, as_waves, fits, per_example
from remanence.speech.wavaugment.wsola import Search, stretch

FACTORS = (0.1, 100.0)
CENTS_PER_OCTAVE = 1200
CENTS = (-7972, 3986)  # which those factors allow
# Room for the stretched clip comes in steps of this many cents, so that batches whose largest
# shifts differ still share their shapes.
CENTS_STEP = 300


def pitch_shift(
    wave: Tensor,
    sample_rate: int,
    cents: float | Tensor,
    *,
    quality: Quality = "high",
    search: Search = "full",
    bounds: Bounds | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Raise or lower the pitch and keep the duration (`sox pitch`).

    Shapes inside depend on those of `wave`, the rate, and the largest shift (or bound) rounded up
    to a multiple of 300 cents; the values of `cents` change neither shapes nor cost otherwise.

    Args:
        wave: (T,), (C, T) or (B, C, T) floats. Channels share their splices.
        sample_rate: in Hz, at least 400.
        cents: hundredths of a semitone, -7972 to 3986; a clip with 0 comes back bit for bit.
        quality: of the resampling: `high` (`pitch c rate`), or `quick` (`rate -q`: some aliasing).
        search: for the splices: `full`, or `quick` (`pitch -q`).
        bounds: of `cents`, see above.
        lengths: samples that count of each clip; all by default.

    Returns:
        A tensor of the shape of `wave`. Gradients reach `wave` through the splices chosen.

    Raises:
        InputError: an argument is of the wrong kind or shape, out of range, NaN or infinite.
    """
    waves = as_waves(wave, lengths)
    x, valid = waves.wave, waves.lengths.to(home(waves.wave.device))
    n_samples = x.shape[2]
    shifts = _per_clip("cents", cents, x, bounds or CENTS)
    factors = stretch_factors(shifts)
    highest = shifts.max().item() if bounds is None else bounds[1]
    octaves = max(1, math.ceil(highest / CENTS_STEP)) * CENTS_STEP / CENTS_PER_OCTAVE
    room = math.floor(n_samples * 2**octaves) + 2

    stretched_lengths = _ends(valid, factors)
    stretched = stretch(_working(x), sample_rate, factors, room, search=search)
    stretched = _cut(stretched, stretched_lengths)
    widest = None if bounds is None else 2 ** (highest / CENTS_PER_OCTAVE)
    shifted = resample_at(stretched, 1 / factors, n_samples, quality=quality, widest=widest)
    shifted = _cut(shifted, _ends(stretched_lengths, 1 / factors))
    return waves.restore(_unless_one(factors, x, shifted))


def tempo(
    wave: Tensor,
    sample_rate: int,
    factor: float | Tensor,
    *,
    search: Search = "full",
    bounds: Bounds | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Play faster or slower and keep the pitch (`sox tempo`).

    Args:
        wave: (T,), (C, T) or (B, C, T) floats. Channels share their splices.
        sample_rate: in Hz, at least 400.
        factor: 0.1 to 100; above 1 is faster. A clip with 1 comes back bit for bit.
        search: for the splices: `full`, or `quick` (`tempo -q`).
        bounds: of `factor`, see above.
        lengths: samples that count of each clip; all by default.

    Returns:
        The wave, as long as the longest result, or that of the least of `bounds`, and the results'
        lengths floor(length / factor + 1/2), (B,) int64 on the wave's device.

    Raises:
        InputError: an argument is of the wrong kind or shape, out of range, NaN or infinite.
    """
    waves = as_waves(wave, lengths)
    factors = _per_clip("factor", factor, waves.wave, bounds or FACTORS)
    ends = _ends(waves.lengths.to(factors.device), factors)
    n_out = _longest(waves, ends, bounds)
    out = stretch(_working(waves.wave), sample_rate, factors, n_out, search=search)
    return _finish(waves, out, factors, ends)


def speed(
    wave: Tensor,
    factor: float | Tensor,
    *,
    quality: Quality = "high",
    bounds: Bounds | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Play faster or slower, pitch and all (`sox speed`).

    Args:
        wave: (T,), (C, T) or (B, C, T) floats.
        factor: 0.1 to 100; above 1 is faster and higher. A clip with 1 comes back bit for bit.
        quality: of the resampling.
        bounds: of `factor`, see above.
        lengths: samples that count of each clip; all by default.

    Returns:
        The wave and the results' lengths, as `tempo` does.

    Raises:
        InputError: an argument is of the wrong kind or shape, out of range, NaN or infinite.
    """
    waves = as_waves(wave, lengths)
    factors = _per_clip("factor", factor, waves.wave, bounds or FACTORS)
    return _resampled(waves, factors, quality, bounds)


def resample(
    wave: Tensor,
    ratio: float | Tensor,
    quality: Quality = "high",
    *,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Change the sample rate to `ratio` times the old one (`sox rate`).

    Args:
        wave: (T,), (C, T) or (B, C, T) floats.
        ratio: new rate over old rate, 0.01 to 10.
        quality: `high` or `quick`.
        lengths: samples that count of each clip; all by default.

    Returns:
        The wave and the results' lengths, as `tempo` does.

    Raises:
        InputError: an argument is of the wrong kind or shape, out of range, NaN or infinite.
    """
    waves = as_waves(wave, lengths)
    ratios = _per_clip("ratio", ratio, waves.wave, (1 / FACTORS[1], 1 / FACTORS[0]))
    return _resampled(waves, 1 / ratios, quality, None)


def remap_times(
    times: Tensor, factor: float | Tensor, *, durations: float | Tensor | None = None
) -> Tensor:
    """Where moments of a recording lie after `tempo` or `speed`: t / factor.

    Exact for `speed`. A splice of `tempo` may sit half its search range, 7.3 ms, to either side.
    `pitch_shift` leaves times as they are.

    Args:
        times: (...) for one clip, (B, ...) for a factor (B,): seconds or samples, say the ends of
            an alignment's phones.
        factor: what `tempo` or `speed` was given.
        durations: a number or (B,), the clips' old durations in the unit of `times`, if results
            shall not pass the new end.

    Returns:
        Floats of the shape of `times`: its own dtype, float64 where it holds integers.

    Raises:
        InputError: an argument is out of range or does not fit the batch.
    """
    n_clips = len(times) if times.ndim else 1

    def per_clip(name: str, value: float | Tensor, low: float, high: float) -> Tensor:
        values = per_example(name, value, n_clips, times.device, low=low, high=high)
        return values.view(times.shape[:1] + (1,) * (times.ndim - 1))

    factors = per_clip("factor", factor, *FACTORS)
    mapped = times.double() / factors
    if durations is not None:
        mapped = mapped.minimum(per_clip("durations", durations, 0, math.inf) / factors)
    return mapped.to(times.dtype) if times.is_floating_point() else mapped


def _per_clip(name: str, value: float | Tensor, x: Tensor, bounds: Bounds) -> Tensor:
    """(B,) float64 at `home`, where shapes are decided."""
    low, high = bounds
    return per_example(name, value, len(x), home(x.device), low=low, high=high).detach()


def stretch_factors(cents: Tensor) -> Tensor:
    """Factors of the stretch, to the six digits that sox passes on from `pitch` to `tempo`."""
    factors = 2 ** (-cents / CENTS_PER_OCTAVE)  # 0.1 to 100
    # Both numbers of the quotient are exact, so that it is the float nearest to those digits.
    unit = torch.where(factors < 1, 1e6, torch.where(factors < 10, 1e5, 1e4)).double()
    return (factors * unit).round() / unit


def _ends(lengths: Tensor, factors: Tensor) -> Tensor:
    return torch.floor(lengths / factors + 0.5).long()


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cut(x: Tensor, lengths: Tensor) -> Tensor:
    """Zeros behind each clip's length, in a result that nobody else holds."""
    if fits(x):
        # In place: new memory costs more than what is done in it.
        for clip, length in zip(x.detach().numpy(), lengths.tolist(), strict=True):
            clip[:, length:] = 0
        return x
    inside = torch.arange(x.shape[2], device=x.device) < lengths.to(x.device)[:, None]
    return x.where(inside[:, None], 0)


def _unless_one(factors: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """What was done to clips with a factor of 1 is undone, to the bit."""
    if fits(out) and fits(x):
        same, n_samples = factors.numpy() == 1, min(x.shape[2], out.shape[2])
        out.numpy()[same, :, :n_samples] = x.detach().numpy()[same, :, :n_samples]
        return out
    fitted = functional.pad(x, (0, out.shape[2] - x.shape[2]))  # a negative pad crops
    kept = (factors == 1).to(x.device)[:, None, None]
    return fitted.where(kept, out.to(x.dtype))


def _longest(waves: Waves, ends: Tensor, bounds: Bounds | None) -> int:
    """Samples of the longest result."""
    if bounds is None:
        return int(ends.max())
    return math.floor(waves.wave.shape[2] / bounds[0] + 0.5)


def _resampled(
    waves: Waves, steps: Tensor, quality: Quality, bounds: Bounds | None
) -> tuple[Tensor, Tensor]:
    ends = _ends(waves.lengths.to(steps.device), steps)
    n_out = _longest(waves, ends, bounds)
    widest = None if bounds is None else bounds[1]
    out = resample_at(_working(waves.wave), steps, n_out, quality=quality, widest=widest)
    return _finish(waves, out, steps, ends)


def _finish(waves: Waves, out: Tensor, factors: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    out = _unless_one(factors, waves.wave, _cut(out, ends))
    return out.reshape(*waves.shape[:-1], -1), ends.to(out.device)
