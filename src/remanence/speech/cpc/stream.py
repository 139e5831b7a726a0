"""Features of a recording that arrives piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.modes import evaluating

if TYPE_CHECKING:
    from remanence.speech.cpc.model import CPC, Layer, State


class FeatureStream:
    """Frames as soon as the samples that they depend on are there, however these are cut.

    All frames together equal those of one pass over the whole, up to rounding. `flush` ends a
    recording; the next `push` begins another, of which nothing is known. The model is put in eval
    mode for each call, and no gradient is taken.

    Args:
        model: The network; samples are moved to its device and type.
        layer: As of `CPC.features`.

    Raises:
        InputError: The model has no such layer.
    """

    def __init__(self, model: CPC, layer: Layer = "context") -> None:
        self.model = model
        self.layers = model.layers_of(layer)
        self._restart()

    def _restart(self) -> None:
        self._pieces: list[Tensor] = []
        self._start = 0  # frame at whose first sample the pieces begin
        self._done = 0  # frames given
        self._seen = 0  # samples
        self._state: State | None = None

    def push(self, samples: Tensor) -> Tensor:
        """Take further samples and return the frames that they complete.

        Args:
            samples: (n,), n at least 0; or (B, n), for B recordings of one length.

        Returns:
            Frames (m, H), or (B, m, H); m may be 0.

        Raises:
            InputError: The shape is another, or not that of the samples before.
        """
        if samples.ndim not in (1, 2) or (
            self._pieces and samples.shape[:-1] != self._pieces[0].shape[:-1]
        ):
            raise InputError(f"samples {tuple(samples.shape)}: give (n,), or (B, n) every time")
        weight = next(self.model.parameters())
        self._pieces.append(samples.to(weight))
        self._seen += samples.shape[-1]
        encoder = self.model.encoder
        return self._frames((self._seen - encoder.after - 1) // encoder.stride + 1)

    def flush(self) -> Tensor:
        """Return the last frames, which look beyond the end, and forget the recording.

        Returns:
            Frames (m, H), or (B, m, H); none where the recording was too short for one.
        """
        if not self._pieces:
            self._pieces = [next(self.model.parameters()).new_zeros(0)]
        frames = self._frames(self.model.encoder.frames(self._seen))
        self._restart()
        return frames

    @torch.no_grad()
    def _frames(self, until: int) -> Tensor:
        """Return frames from the first not given to `until`, exclusive."""
        encoder, first = self.model.encoder, self._pieces[0]
        if until <= self._done:
            return first.new_zeros(*first.shape[:-1], 0, encoder.hidden)
        samples = torch.cat(self._pieces, dim=-1)
        with evaluating(self.model):
            z: Tensor = encoder(samples.reshape(-1, samples.shape[-1]))
            z = z[:, self._done - self._start : until - self._start]
            if self.layers:
                z, self._state = self.model.context(z, self._state, layers=self.layers)
        # Of what begins at a frame's first sample only that first frame sees the cut.
        self._done, begin = until, (until - 1 - self._start) * encoder.stride
        self._pieces, self._start = [samples[..., begin:]], until - 1
        return z.reshape(*first.shape[:-1], *z.shape[1:])
