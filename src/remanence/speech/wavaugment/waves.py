"""What the effects share: one batched shape, one value an example, valid lengths, long filters."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.nn import functional

from remanence.errors import InputError
from remanence.speech.wavaugment.graph import found, numbers
from remanence.speech.wavaugment.trust import trusted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Of samples to a filter's taps in a block: more costs cache, fewer costs overlap.
BLOCK_TAPS = 12
# Values of a chunk: on a CPU it should stay in cache, on a GPU it should fill the machine.
CHUNK_VALUES = {"cpu": 2**17, "cuda": 2**24}


@dataclass(frozen=True)
class Waves:
    """A checked batch.

    Attributes:
        wave: (B, C, T) floats, zero past each row's length.
        lengths: (B,) int64 on the wave's device, T where none were given.
        shape: what came in, (T,), (C, T) or (B, C, T).
        ragged: whether lengths were given.
    """

    wave: Tensor
    lengths: Tensor
    shape: tuple[int, ...]
    ragged: bool

    def valid(self) -> Tensor:
        """Which samples count: (B, 1, T) bool."""
        time = torch.arange(self.wave.shape[-1], device=self.wave.device)
        return (time < self.lengths[:, None])[:, None]

    def restore(self, out: Tensor) -> Tensor:
        """An effect's output (B, C, T), zeroed past the lengths, in the shape and dtype given."""
        if self.ragged:
            out = out.masked_fill(~self.valid(), 0)
        return out.reshape(self.shape).to(self.wave.dtype)


def as_waves(wave: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Waves:
    """Check a wave of any of the three shapes and batch it.

    Args:
        wave: float tensor (T,), (C, T) of one or two channels, or (B, C, T), full scale 1.
        lengths: valid samples of each row, (B,) integers; all T where None. Samples past a row's
            length take no part in any effect and come back as 0.

    Returns:
        The batch (B, C, T).

    Raises:
        InputError: no tensor, another dtype or shape, NaN or infinity, lengths that do not fit.
    """
    if not isinstance(wave, Tensor):
        raise InputError(f"wave is {type(wave).__name__}: give a tensor, as torch.as_tensor makes")
    if not wave.is_floating_point():
        raise InputError(
            f"wave holds {wave.dtype}: give floats, full scale 1 (16-bit samples divided by 32768)"
        )
    if not 1 <= wave.ndim <= 3 or wave.numel() == 0:
        raise InputError(
            f"wave has shape {tuple(wave.shape)}: give (T,), (C, T) or (B, C, T), nothing empty"
        )
    if wave.ndim == 2 and len(wave) > 2:
        raise InputError(
            f"wave {tuple(wave.shape)} would be one wave of {len(wave)} channels: give a batch as "
            "(B, 1, T), wave.unsqueeze(1), and many channels as (1, C, T)"
        )
    rows = wave.reshape(-1, *wave.shape[-2:]) if wave.ndim > 1 else wave.reshape(1, 1, -1)
    # Plain numbers, where torch.compile would put symbols: sizes inside hang on them.
    batch, time = operator.index(rows.shape[0]), operator.index(rows.shape[-1])
    whole = torch.full((batch,), time, device=wave.device)
    ends = whole if lengths is None else _checked_lengths(lengths, batch, time).to(wave.device)
    waves = Waves(rows, ends, tuple(wave.shape), lengths is not None)
    if waves.ragged:
        waves = Waves(rows.masked_fill(~waves.valid(), 0), ends, waves.shape, ragged=True)
    if not trusted() and not _finite(waves.wave):
        raise InputError("wave holds NaN or infinity: drop or repair those samples")
    return waves


def mono_clips(name: str, source: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Check a bank of mono clips.

    Args:
        name: of the bank, for errors.
        source: (M, T') or a sequence of (T',) floats.

    Returns:
        The clips, (1, 1, T') each.

    Raises:
        InputError: no clip, or one that is no mono wave.
    """
    wrong = InputError(f"{name} is empty or not mono: give (M, T'), or a list of (T',) clips")
    if isinstance(source, Tensor) and source.ndim < 2:
        raise wrong
    clips = []
    for place, clip in enumerate(source):
        try:
            clips.append(as_waves(clip).wave)
        except InputError as error:
            raise InputError(f"{name}, clip {place}: {error}") from error
    if not clips or any(clip.shape[:2] != (1, 1) for clip in clips):
        raise wrong
    return clips


def _finite(wave: Tensor) -> bool:
    """Whether all samples are numbers."""
    # A sum is finite only if all are, unless it overflows: a hundred times as quick to ask. NumPy's
    # leaves no thread of torch's spinning, which would be in the way of those of the kernels.
    with np.errstate(over="ignore", invalid="ignore"):
        total = wave.detach().numpy().sum() if fits(wave) else wave.detach().sum()
    return math.isfinite(total) or bool(wave.isfinite().all())


def _checked_lengths(lengths: Tensor | Sequence[int], batch: int, time: int) -> Tensor:
    ends = torch.as_tensor(lengths)
    if ends.is_floating_point() or ends.dtype == torch.bool or ends.shape != (batch,):
        raise InputError(
            f"lengths are {ends.dtype} of shape {tuple(ends.shape)}: give {batch} integers"
        )
    if found((ends < 0) | (ends > time)):
        raise InputError(f"lengths lie outside 0..{time}: give each row's number of valid samples")
    return ends.long()


def per_example(
    name: str,
    value: float | Tensor,
    batch: int,
    device: torch.device,
    *,
    low: float = float("-inf"),
    high: float = float("inf"),
) -> Tensor:
    """One finite value an example.

    Args:
        name: of the parameter, for errors.
        value: a number, or (B,) numbers.
        batch: B.
        device: of the result.
        low: least allowed.
        high: largest allowed.

    Returns:
        (B,) float64.

    Raises:
        InputError: a wrong number of values, or one that is not finite or out of range.
    """
    values = numbers(value, device, torch.float64)
    if values.ndim and values.shape != (batch,):
        raise InputError(
            f"{name} has shape {tuple(values.shape)}: give one number, or one for each of the"
            f" {batch} examples"
        )
    if found(~(values.isfinite() & (values >= low) & (values <= high))):
        raise InputError(f"{name} lies outside {low:g}..{high:g}: give finite values within")
    return values.to(device).expand(batch)


def check_rate(sample_rate: float) -> None:
    """Raise InputError unless a sample rate is a positive number."""
    if not isinstance(sample_rate, Real) or not 0 < sample_rate < float("inf"):
        raise InputError(f"sample_rate {sample_rate!r} is not a rate: give samples a second")


def check_generator(generator: torch.Generator | None) -> None:
    """Raise InputError unless a generator is None or one on the CPU."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator is {generator!r}: give torch.Generator().manual_seed(0)")
    if generator is not None and generator.device.type != "cpu":
        raise InputError(f"generator is on {generator.device}: give one on the CPU")


def fits(wave: Tensor) -> bool:
    """Whether numba's code may take a wave: float32, on the processor, and no gradient wanted.

    Not under torch.compile, which would look into numba and fail there.
    """
    if torch.compiler.is_compiling():
        return False
    wanted = wave.requires_grad and torch.is_grad_enabled()
    return wave.device.type == "cpu" and wave.dtype == torch.float32 and not wanted


def fast_length(time: int) -> int:
    """The least length from `time` on whose FFT is fast; even."""
    length = next_fast(time, real=True)
    return length if length % 2 == 0 else fast_length(length + 1)


def next_fast(time: int, *, real: bool) -> int:
    """The least length from `time` on whose FFT is fast, of real or complex numbers."""
    length: int = _next_fast(operator.index(time), real)
    return length


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def _next_fast(time: int, real: bool) -> int:
    return int(next_fast_len(time, real=real))


def in_chunks(rows: int, values_a_row: int, device: torch.device) -> list[slice]:
    """Slices over `rows` that bound a chunk's values on `device`, at least one row each."""
    # A compiled graph holds each chunk's code: few and large ones.
    kind = "cuda" if torch.compiler.is_compiling() else device.type
    step = max(1, CHUNK_VALUES.get(kind, CHUNK_VALUES["cpu"]) // max(values_a_row, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def chunked(
    rows: int, values_a_row: int, device: torch.device, of: Callable[[slice], Tensor]
) -> Tensor:
    """Concatenate `of(slice)` over such slices."""
    return torch.cat([of(part) for part in in_chunks(rows, values_a_row, device)])


def fir(wave: Tensor, taps: Tensor, delay: Tensor | int) -> Tensor:
    """Filter rows by their own taps and take the filters' delays out again.

    Args:
        wave: (B, C, T) floats.
        taps: (B or 1, C or 1, K) float64.
        delay: samples by which the output is moved back, 0..K-1; a number or (B,).

    Returns:
        (B, C, T) float32 for a float32 wave, else float64: sum over k of taps[k]
        wave[t + delay - k]. Differentiable in both.
    """
    batch, channels, time = wave.shape
    n_taps = taps.shape[-1]
    wave = wave if wave.dtype == torch.float32 else wave.double()
    taps = taps.to(wave.dtype)
    # Short transforms of overlapping blocks stay in cache, and round less than one long one.
    blocks = max(1, time // (BLOCK_TAPS * n_taps))
    hop = -(-time // blocks)
    length = fast_length(hop + n_taps - 1)
    span = (blocks - 1) * hop + length
    padded = functional.pad(wave, (n_taps - 1, span - time))
    fixed = isinstance(delay, int)
    delays = numbers(delay, wave.device).to(wave.device).expand(batch)
    steps = torch.arange(span, device=wave.device)

    def filtered(part: slice) -> Tensor:
        own = taps if len(taps) == 1 else taps[part]
        if fixed:
            rows = padded[part, :, delay:]
        else:
            index = (steps + delays[part, None])[:, None].expand(-1, channels, -1)
            rows = padded[part].gather(-1, index)
        framed = rows.unfold(-1, length, hop)[:, :, :blocks]  # (B, C, blocks, N)
        spectrum = torch.fft.rfft(framed) * torch.fft.rfft(own, length)[:, :, None]
        # A block's first K - 1 samples have folded back; after them come `hop` good ones.
        whole = torch.fft.irfft(spectrum, length)[..., n_taps - 1 : n_taps - 1 + hop]
        out: Tensor = whole.flatten(2)[..., :time]
        return out

    return chunked(batch, channels * length * blocks, wave.device, filtered)
