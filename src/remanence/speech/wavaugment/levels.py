"""Levels and channels: gain, peak normalisation, dither, mixing channels."""

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.wavaugment.waves import as_waves, per_example

# The largest value of sox's 32-bit samples.
FULL_SCALE = 1 - 2.0**-31


def saturate(wave: Tensor) -> Tensor:
    """Cut a wave off at full scale, -1 to 1 - 2^-31, as sox does after each effect."""
    return wave.clamp(-1, FULL_SCALE)


def gain(wave: Tensor, db: float | Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """Multiply each example by 10^(db/20).

    Args:
        wave: floats (T,), (C, T) or (B, C, T).
        db: dB; a number or (B,).
        lengths: valid samples of each row, (B,).

    Returns:
        The wave's shape, dtype and device.

    Raises:
        InputError: a wave or level that does not fit.
    """
    waves = as_waves(wave, lengths)
    level = per_example("db", db, len(waves.wave), wave.device)
    return waves.restore(waves.wave * 10 ** (level / 20)[:, None, None])


def normalise_peak(
    wave: Tensor, db: float | Tensor = 0.0, *, lengths: Tensor | None = None
) -> Tensor:
    """Bring each example's largest absolute sample to 10^(db/20); silence stays silent.

    Takes, returns and raises what `gain` does.
    """
    waves = as_waves(wave, lengths)
    level = per_example("db", db, len(waves.wave), wave.device)
    peak = waves.wave.abs().amax((1, 2), keepdim=True).double()
    scale = 10 ** (level / 20)[:, None, None] / torch.where(peak > 0, peak, 1)
    return waves.restore(waves.wave * scale)


def dither(wave: Tensor, *, bits: int = 16, generator: torch.Generator | None = None) -> Tensor:
    """Round a wave to whole steps of 2^(1-bits), after triangular noise of up to one step.

    sox dithers only where the precision falls; a wave in floats loses something by it.

    Args:
        wave: floats of any shape.
        bits: precision, 1..24.
        generator: for the noise, on any device.

    Returns:
        The same shape, dtype and device, within -1..1 - 2^(1-bits).

    Raises:
        InputError: bits out of range.
    """
    where = wave.device if generator is None else generator.device
    draws = torch.rand(2, *wave.shape, generator=generator, device=where).to(wave.device)
    return round_to_bits(wave, draws.double().sum(0) - 1, bits)


def round_to_bits(wave: Tensor, noise: Tensor, bits: int) -> Tensor:
    """Add noise, in steps of 2^(1-bits) and of the wave's shape, and round to whole steps.

    Raises:
        InputError: bits outside 1..24.
    """
    check_bits(bits)
    steps = 2.0 ** (bits - 1)
    noisy = (wave.double() * steps + noise + 0.5).floor()
    return (noisy.clamp(-steps, steps - 1) / steps).to(wave.dtype)


def check_bits(bits: int) -> None:
    """Raise InputError unless dither can round to so many bits."""
    if not 1 <= bits <= 24:
        raise InputError(f"bits {bits} lies outside 1..24")


def to_channels(wave: Tensor, count: int) -> Tensor:
    """Mix to another number of channels: the average to one, copies from one.

    Args:
        wave: floats (C, T) or (B, C, T).
        count: channels out; from or to one, or as many as there are.

    Returns:
        (count, T) or (B, count, T).

    Raises:
        InputError: another pair of numbers.
    """
    channels = wave.shape[-2] if wave.ndim > 1 else 0
    if count == channels:
        return wave
    if count == 1 and channels:
        return wave.mean(-2, keepdim=True)
    if channels == 1 and count > 1:
        return wave.expand(*wave.shape[:-2], count, -1)
    raise InputError(
        f"wave has {channels} channels and {count} are asked for: mix from one or to one"
    )
