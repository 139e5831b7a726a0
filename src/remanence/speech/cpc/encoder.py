"""The encoder of CPC: a waveform in, a vector every 10 ms out (arXiv 2002.02848, Section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, pad

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

EPS = 1e-5  # of the variance
# (kernel, stride, zeros at either end); each kernel is two strides long. At 8 kHz the last is left
# out, so that a frame lasts 10 ms at either rate.
LAYERS = ((10, 5, 3), (8, 4, 2), (4, 2, 1), (4, 2, 1), (4, 2, 1))
DEPTHS = {16_000: 5, 8_000: 4}


class ChannelNorm(nn.Module):
    """Normalise each frame over its channels, by the unbiased variance; frames never mix.

    `(x - mean) / sqrt(var + 1e-5) * weight + bias`, where var divides by the channels less one.

    Args:
        channels: Channels H, at least 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise frames (..., H)."""
        # A layer norm, whose variance divides by H: var + eps = (biased + eps * share) / share.
        channels = len(self.weight)
        share = (channels - 1) / channels
        return layer_norm(x, (channels,), self.weight * share**0.5, self.bias, EPS * share)


class Encoder(nn.Module):
    """Strided convolutions, each followed by channel norm and ReLU.

    At 16 kHz, frame t depends exactly on the samples [160 t - 153, 160 t + 311], so that its time
    is (t + 1/2) * 10 ms, and T samples give (T + 1) // 160 frames. At 8 kHz the last convolution is
    left out: [80 t - 73, 80 t + 151], (T + 1) // 80 frames.

    Args:
        hidden: Channels H of every layer.
        sample_rate: 16000 or 8000 Hz.

    Attributes:
        stride: Samples between frames.
        before: Samples that frame t sees before sample `stride * t`.
        after: Samples that it sees after that one.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(self, hidden: int = 256, sample_rate: int = 16_000) -> None:
        super().__init__()
        if sample_rate not in DEPTHS:
            raise InputError(f"sample_rate {sample_rate}: give 16000 or 8000, and resample to it")
        if hidden < 2:
            raise InputError(f"hidden {hidden}: give at least 2 channels")
        layers = LAYERS[: DEPTHS[sample_rate]]
        inputs = [1] + [hidden] * (len(layers) - 1)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(channels, hidden, kernel, stride, zeros)
            for channels, (kernel, stride, zeros) in zip(inputs, layers, strict=True)
        )
        self.norms = nn.ModuleList(ChannelNorm(hidden) for _ in layers)
        self.hidden = hidden
        self.stride, self.before, self.after = 1, 0, 0
        for kernel, stride, zeros in layers:
            self.before += zeros * self.stride
            self.after += (kernel - 1 - zeros) * self.stride
            self.stride *= stride

    def frames(self, samples: int) -> int:
        """Return how many frames that many samples give."""
        return (samples + 1) // self.stride

    def forward(self, wave: Tensor) -> Tensor:
        """Encode waveforms.

        Args:
            wave: Samples (B, T), mono, at the encoder's rate.

        Returns:
            Frames (B, S, H), at least 0.

        Raises:
            InputError: It has another shape, holds integers, or is too short for one frame.
        """
        if wave.ndim != 2 or not wave.is_floating_point():
            raise InputError(f"a wave of {wave.dtype} {tuple(wave.shape)}: give floats (B, T)")
        if not self.frames(wave.shape[1]):
            raise InputError(
                f"a wave of {wave.shape[1]} samples: give at least {self.stride - 1}, for one frame"
            )
        x = wave.unsqueeze(2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            assert isinstance(convolution, nn.Conv1d)
            x = norm(_convolve(x, convolution)).relu()
        return x


def _convolve(x: Tensor, convolution: nn.Conv1d) -> Tensor:
    """Convolve (B, T, C) to (B, T', H), where the kernel is two strides long.

    Two neighbouring blocks of a stride make an output: one matrix product over channels that lie
    next to each other, where the norm wants them, twice as fast as Conv1d on a processor.
    """
    (stride,), (zeros,) = convolution.stride, _ends(convolution.padding)
    batch, samples, channels = x.shape
    blocks = (samples + 2 * zeros) // stride
    x = pad(x, (0, 0, zeros, blocks * stride - samples - zeros))
    x = x.reshape(batch, blocks, stride * channels)
    pairs = torch.cat([x[:, :-1], x[:, 1:]], dim=2)
    return linear(pairs, convolution.weight.transpose(1, 2).flatten(1), convolution.bias)


def _ends(padding: str | Sequence[int]) -> Sequence[int]:
    assert not isinstance(padding, str)
    return padding
