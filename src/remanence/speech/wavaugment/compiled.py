"""Reverberation, splices, resampling and mixing on the processor, compiled, for float32 waves.

What torch does in many passes over a batch is one pass over a clip here, which stays in cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from remanence.kernels import fused_kernel, in_threads, kernel, reordered_kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from remanence.speech.wavaugment.reverb import Loops
    from remanence.speech.wavaugment.wsola import Sizes

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Integers = NDArray[np.int64]

SHARE = 2**17  # samples that are worth a thread
REACH = 4  # samples that interpolation looks at to either side
PHASES = 1024  # places between two of them that it has weights for


def echoes(wave: Tensor, loops: Loops, ears: int, dry: Tensor | None) -> Tensor:
    """Run the recursions of `remanence.speech.wavaugment.reverb`.

    Args:
        wave: (B, T) float32.
        loops: the filters' lengths, all of them at least 1, and coefficients.
        ears: 2, or 1 for their mean.
        dry: (B, 1 or 2, T) float32, to be added.

    Returns:
        (B, ears, T) float32.
    """
    out = np.empty((len(wave), ears, wave.shape[1]), np.float32)
    under = None if dry is None else dry.detach().numpy()
    given: list[Any] = [x.contiguous().numpy() for x in (wave.detach(), *loops)]

    def run(start: int, stop: int) -> None:
        out[start:stop] = 0 if under is None else under[start:stop]
        own: list[Any] = [*(x[start:stop] for x in given), out[start:stop]]
        _echoes(*own)

    in_threads(run, len(wave), wave.numel() // SHARE)
    return torch.from_numpy(out)


def spliced(
    padded: Tensor, reads: Tensor, size: Sizes, n_out: int, tie: float, *, quick: bool
) -> Tensor:
    """Search and cross-fade as `remanence.speech.wavaugment.wsola.stretch` does.

    Args:
        padded: (B, C, T) float32, as long as the last read needs.
        reads: (B, S) int64, where each segment's window begins.
        size: of a segment and its parts.
        n_out: samples to return.
        tie: share of the scores below which two offsets fit equally well.
        quick: try about 30 offsets instead of all.

    Returns:
        (B, C, n_out) float32.
    """
    out = np.empty((*padded.shape[:2], n_out), np.float32)
    given: list[Any] = [x.contiguous().numpy() for x in (padded.detach(), reads)]

    def run(start: int, stop: int) -> None:
        own: list[Any] = [x[start:stop] for x in given]
        own += [tuple(size), tie, quick, out[start:stop]]
        _splice(*own)

    in_threads(run, len(out), padded.numel() // SHARE)
    return torch.from_numpy(out)


def interpolate(wave: Floats, first: int, step: float, phases: Floats, out: Floats) -> None:
    """Read a wave between its samples.

    Args:
        wave: (C, T); where it has ended, `out` is 0.
        first: where to begin, at least REACH - 1.
        step: between two samples of `out`, in samples of `wave`.
        phases: (PHASES + 1, 2 REACH), the weights of the samples around each place; a line is taken
            from place to place.
        out: (C, N), to be written.
    """
    _interpolate(wave, first, step, phases, out)


def mixed(
    wave: Tensor, ends: Tensor, noise: Tensor, places: tuple[Tensor, Tensor, Tensor], ratio: Tensor
) -> Tensor:
    """Mix as `remanence.speech.wavaugment.noise.add_noise` does under `rms`.

    Args:
        wave: (B, C, T) float32, zero past the lengths.
        ends: (B,) int64, the lengths.
        noise: (N,) float32, all clips of noise one after another.
        places: (B,) int64 each: where a row's clip begins, its size, and the sample within it to
            start from; it starts over at its end.
        ratio: (B,) float64, of the noise's RMS to the wave's.

    Returns:
        (B, C, T) float32.
    """
    out = np.empty(wave.shape, np.float32)
    bank = noise.detach().contiguous().numpy()
    given: list[Any] = [x.contiguous().numpy() for x in (wave.detach(), ends, *places, ratio)]

    def run(start: int, stop: int) -> None:
        own: list[Any] = [bank, *(x[start:stop] for x in given), out[start:stop]]
        _mix(*own)

    in_threads(run, len(out), wave.numel() // (16 * SHARE))
    return torch.from_numpy(out)


@fused_kernel
def _four_combs(
    x: Floats, lengths: Integers, feedback: float, d: float, lines: Doubles, total: Doubles
) -> None:
    """Add four combs of (T,) to a total; together, as one alone waits on its own last sample."""
    lines[:] = 0
    out0, out1, out2, out3 = lines[0], lines[1], lines[2], lines[3]
    # Slices, as an index that cannot be negative needs no test.
    in0, in1 = out0[lengths[0] :], out1[lengths[1] :]
    in2, in3 = out2[lengths[2] :], out3[lengths[3] :]
    s0 = s1 = s2 = s3 = 0.0
    for n in range(len(x)):
        # What leaves a line is low-passed and goes in again.
        y0, y1, y2, y3 = out0[n], out1[n], out2[n], out3[n]
        s0 = (1 - d) * y0 + d * s0
        s1 = (1 - d) * y1 + d * s1
        s2 = (1 - d) * y2 + d * s2
        s3 = (1 - d) * y3 + d * s3
        in0[n] = x[n] + feedback * s0
        in1[n] = x[n] + feedback * s1
        in2[n] = x[n] + feedback * s2
        in3[n] = x[n] + feedback * s3
        total[n] += (y0 + y1) + (y2 + y3)


@fused_kernel
def _add_scaled(left: Doubles, right: Doubles, factor: float, out: Doubles) -> None:
    for i in range(len(out)):
        out[i] = left[i] + factor * right[i]


@fused_kernel
def _allpass(signal: Doubles, length: int, line: Doubles) -> None:
    """Filter in place: w[n] = x[n] + w[n - E] / 2, y[n] = 3 w[n - E] / 2 - w[n]."""
    time = len(signal)
    line[:length] = 0
    # Within a stretch of E samples nothing depends on itself.
    for start in range(0, time, length):
        stop = min(start + length, time)
        now, then = line[start + length : stop + length], line[start:stop]
        _add_scaled(signal[start:stop], then, 0.5, now)
    now = line[length:]
    for n in range(time):
        signal[n] = 1.5 * line[n] - now[n]


@fused_kernel
def _echoes(
    waves: Floats,
    combs: Integers,
    allpasses: Integers,
    delays: Integers,
    feedbacks: Doubles,
    dampings: Doubles,
    gains: Doubles,
    out: Floats,
) -> None:
    rows, ears, time = out.shape
    lines = np.empty((4, time + max(combs.max(), allpasses.max())))
    sums = np.empty(time)
    for row in range(rows):
        late = min(delays[row], time)
        heard, total = waves[row, : time - late], sums[: time - late]
        gain = gains[row] * ears / 2
        for ear in range(2):
            total[:] = 0
            for half in (0, 4):
                own = combs[row, ear, half : half + 4]
                _four_combs(heard, own, feedbacks[row], dampings[row], lines, total)
            for length in allpasses[row, ear]:
                _allpass(total, length, lines[0])
            echo = out[row, ear % ears, late:]
            for n in range(len(total)):
                echo[n] += gain * total[n]


@fused_kernel
def _add_squares(window: Doubles, tail: Doubles, scores: Doubles) -> None:
    """Add the squared differences from a tail at every offset; its length divides by four."""
    for i in range(0, len(tail), 4):
        t0, t1, t2, t3 = tail[i], tail[i + 1], tail[i + 2], tail[i + 3]
        w0, w1, w2, w3 = window[i:], window[i + 1 :], window[i + 2 :], window[i + 3 :]
        for j in range(len(scores)):
            d0, d1, d2, d3 = w0[j] - t0, w1[j] - t1, w2[j] - t2, w3[j] - t3
            scores[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)


@kernel
def _first_minimum(scores: Doubles, tie: float) -> int:
    lowest = scores.min() + tie * scores.max()
    for j in range(len(scores)):
        if scores[j] <= lowest:
            return j
    return 0


@reordered_kernel
def _difference(window: Doubles, tail: Doubles) -> float:
    total = 0.0
    for i in range(len(tail)):
        total += (window[i] - tail[i]) ** 2
    return total


@kernel
def _quick_minimum(windows: Doubles, tails: Doubles, span: int, tie: float) -> int:
    """Coarse to fine: steps of 64, then 16, 4 and 1 samples to either side of the best so far."""
    best = (span + 1) // 2
    tried = np.empty(7 + 2 * (span // 64), np.int64)
    found = np.empty(len(tried))
    for step in (64, 16, 4, 1):
        reach = span // step if step == 64 else 3
        count = 0
        for turn in range(2 * reach + 1):
            move = turn if turn == 0 else (-turn if turn <= reach else turn - reach)
            offset = best + step * move
            if 0 <= offset < span:
                tried[count], found[count] = offset, 0
                for c in range(len(tails)):
                    found[count] += _difference(windows[c, offset:], tails[c])
                count += 1
        best = tried[_first_minimum(found[:count], tie)]
    return best


@kernel
def _splice(
    waves: Floats,
    reads: Integers,
    size: tuple[int, int, int, int],
    tie: float,
    quick: bool,
    out: Floats,
) -> None:
    _, span, overlap, hop = size
    rows, channels, n_out = out.shape
    windows = np.empty((channels, span + overlap))
    tails = np.empty((channels, overlap))
    scores = np.empty(span)
    # Multiplied, not divided: as sox rounds it.
    fade = np.arange(overlap).astype(np.float32) * np.float32(1 / overlap)
    one = np.float32(1)
    for row in range(rows):
        start = reads[row, 0] + span // 2
        for s in range(reads.shape[1]):
            left_off = start + hop
            if s:
                at = reads[row, s]
                for c in range(channels):
                    windows[c] = waves[row, c, at : at + span + overlap]
                    tails[c] = waves[row, c, left_off : left_off + overlap]
                if quick:
                    start = at + _quick_minimum(windows, tails, span, tie)
                else:
                    scores[:] = 0
                    for c in range(channels):
                        _add_squares(windows[c], tails[c], scores)
                    start = at + _first_minimum(scores, tie)
            count = min(hop, n_out - s * hop)
            for c in range(channels):
                head = out[row, c, s * hop : s * hop + count]
                head[:] = waves[row, c, start : start + count]
                if s:
                    old = waves[row, c, left_off : left_off + overlap]
                    for i in range(min(overlap, count)):
                        head[i] = old[i] * (one - fade[i]) + head[i] * fade[i]


@reordered_kernel
def _energy(signal: Floats) -> float:
    total = 0.0
    for i in range(len(signal)):
        total += np.float64(signal[i]) * np.float64(signal[i])
    return total


@fused_kernel
def _add_loud(wave: Floats, noise: Floats, gain: np.float32, out: Floats) -> None:
    for i in range(len(out)):
        out[i] = wave[i] + gain * noise[i]


@kernel
def _mix(
    bank: Floats,
    waves: Floats,
    ends: Integers,
    firsts: Integers,
    sizes: Integers,
    starts: Integers,
    ratios: Doubles,
    out: Floats,
) -> None:
    channels = waves.shape[1]
    for row in range(len(waves)):
        clip, end = bank[firsts[row] : firsts[row] + sizes[row]], ends[row]
        energy = 0.0
        for c in range(channels):
            energy += _energy(waves[row, c, :end]) / channels
        # Over the noise's pieces: once for its energy, once to add it.
        gain, loud = np.float32(0), 0.0
        for adding in (False, True):
            at, place = 0, starts[row] % len(clip)
            while at < end:
                count = min(len(clip) - place, end - at)
                piece = clip[place : place + count]
                if adding:
                    for c in range(channels):
                        then = slice(at, at + count)
                        _add_loud(waves[row, c, then], piece, gain, out[row, c, then])
                else:
                    loud += _energy(piece)
                at, place = at + count, 0
            if loud > 0:
                gain = np.float32(ratios[row] * np.sqrt(energy / loud))
        out[row, :, end:] = 0


@fused_kernel
def _weighted(samples: Floats, lower: Floats, upper: Floats, share: np.float32) -> np.float32:
    even = odd = np.float32(0)
    # Two sums, as one waits for itself; a number of steps that is known is unrolled.
    for i in range(0, 2 * REACH, 2):
        even += samples[i] * (lower[i] + share * (upper[i] - lower[i]))
        odd += samples[i + 1] * (lower[i + 1] + share * (upper[i + 1] - lower[i + 1]))
    return even + odd


@kernel
def _interpolate(waves: Floats, first: int, step: float, phases: Floats, out: Floats) -> None:
    channels, time = waves.shape
    n_read = min(out.shape[1], int((time - REACH - 1 - first) / step) + 1)
    for c in range(channels):
        wave = waves[c]
        for n in range(n_read):
            place = (first - REACH + 1 + n * step) * PHASES
            tick = int(place)
            k = tick // PHASES
            p = tick - k * PHASES
            share = np.float32(place - tick)
            out[c, n] = _weighted(wave[k:], phases[p], phases[p + 1], share)
        out[c, n_read:] = 0
