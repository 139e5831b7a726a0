"""Contrastive predictive coding: encoder, context network and predictor (arXiv 2007.00991)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from remanence.errors import InputError
from remanence.modes import evaluating
from remanence.speech.cpc.encoder import Encoder
from remanence.speech.cpc.predictor import (
    LinearPredictor,
    MultiheadPredictor,
    Positions,
    SeparatePredictors,
)
from remanence.speech.cpc.presets import PRESETS
from remanence.speech.cpc.seq_norm import standardise
from remanence.speech.cpc.stream import FeatureStream

if TYPE_CHECKING:
    from collections.abc import Mapping

Predictor = Literal["multihead", "separate", "linear"]
Layer = Literal["context", "encoder"] | int
State = tuple[Tensor, Tensor]
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MOST_LAYERS = 64
PIECE = 1024  # frames encoded at a time; at 16 kHz and H = 256 the first layer takes 34 MB


class CPC(nn.Module):
    """An encoder of 100 frames a second, an LSTM over its frames, a predictor of the next frames.

    Args:
        hidden: Width H of everything.
        context_layers: Layers of the LSTM.
        steps: Frames K that are predicted.
        predictor: `multihead` (CPC2), `separate` (CPC) or `linear`.
        heads: Heads of the predictor's attention; they divide H.
        ffn: Width of the predictor's feed-forward part.
        dropout: Rate inside the predictor.
        positions: `relative` (learned) or `rotary`.
        window: Frames S of a training window: S - K distances are learned. Sequences of any length
            can be predicted from; distances beyond use the furthest learned one.
        sample_rate: 16000 or 8000 Hz.

    Attributes:
        config: The arguments: `CPC(**config)` is alike.
        presets: Arguments of known networks, by name.

    Raises:
        InputError: An argument is out of range.
    """

    presets: Mapping[str, Mapping[str, Any]] = PRESETS

    def __init__(
        self,
        *,
        hidden: int = 256,
        context_layers: int = 2,
        steps: int = 12,
        predictor: Predictor = "multihead",
        heads: int = 8,
        ffn: int = 2048,
        dropout: float = 0.1,
        positions: Positions = "relative",
        window: int = 128,
        sample_rate: int = 16_000,
    ) -> None:
        super().__init__()
        if not 1 <= context_layers <= MOST_LAYERS:
            raise InputError(f"context_layers {context_layers}: give 1 to {MOST_LAYERS}")
        if not 1 <= steps < window:
            raise InputError(f"steps {steps} of a window of {window} frames: give 1 to window - 1")
        if predictor not in get_args(Predictor):
            raise InputError(f"predictor {predictor!r}: give one of {get_args(Predictor)}")
        if ffn < 1 or not 0 <= dropout < 1:
            raise InputError(f"ffn {ffn}, dropout {dropout}: give at least 1, and 0 to below 1")
        self.config: dict[str, Any] = {
            "hidden": hidden,
            "context_layers": context_layers,
            "steps": steps,
            "predictor": predictor,
            "heads": heads,
            "ffn": ffn,
            "dropout": dropout,
            "positions": positions,
            "window": window,
            "sample_rate": sample_rate,
        }
        self.encoder = Encoder(hidden, sample_rate)
        self.lstm = nn.LSTM(hidden, hidden, context_layers, batch_first=True)
        self.predictor: nn.Module
        if predictor == "linear":
            self.predictor = LinearPredictor(hidden, steps)
        else:
            kind = MultiheadPredictor if predictor == "multihead" else SeparatePredictors
            self.predictor = kind(
                hidden,
                steps,
                heads=heads,
                ffn=ffn,
                rate=dropout,
                positions=positions,
                distances=window - steps,
            )

    def encode(self, wave: Tensor) -> Tensor:
        """Return frames z (B, S, H), at least 0, of waveforms (B, T): see `Encoder`.

        Raises:
            InputError: It has another shape, or is too short for one frame.
        """
        frames: Tensor = self.encoder(wave)
        return frames

    def context(
        self, z: Tensor, state: State | None = None, *, layers: int | None = None
    ) -> tuple[Tensor, State]:
        """Run the LSTM, in float32 inside autocast too.

        Args:
            z: Frames (B, S, H).
            state: What an earlier call returned, to go on from; None starts at 0.
            layers: Stop after that many layers; None runs all.

        Returns:
            c: Contexts (B, S, H); c_t has seen z_0 to z_t.
            state: Hidden and cell state, (layers, B, H) each.
        """
        layers = layers or self.lstm.num_layers
        weights: list[Tensor] = list(self.lstm.parameters())
        z = z.to(weights[0].dtype)
        if state is None:
            zeros = z.new_zeros(layers, len(z), z.shape[2])
            state = (zeros, zeros)
        with torch.autocast(z.device.type, enabled=False):
            c, hidden, cell = torch.lstm(
                z, state, weights[: 4 * layers], True, layers, 0.0, self.training, False, True
            )
        return c, (hidden, cell)

    def predict(self, c: Tensor) -> Tensor:
        """Return predictions (B, W, K, H) from contexts (B, W, H).

        Entry (b, t, k) predicts frame t + k + 1, counted from 0, and has seen contexts 0 to t.
        """
        predictions: Tensor = self.predictor(c)
        return predictions

    def features(
        self,
        wave: Tensor,
        layer: Layer = "context",
        *,
        chunk: int | None = None,
        strict: bool = False,
        seq_norm: bool = False,
    ) -> Tensor:
        """Return features of whole recordings, in eval mode, without gradient.

        By default as in one pass over the whole, in bounded memory. With `chunk`, as the code
        released with arXiv 2002.02848 did (there 64000 samples): the encoder sees each chunk alone,
        between zeros; the LSTM goes on from one to the next.

        Args:
            wave: Samples (B, T), or (T,), mono, at the model's rate.
            layer: `context`, the LSTM's last layer; `encoder`; or a number, 0 for the encoder, n
                for the LSTM's n-th layer.
            chunk: Samples of a chunk, a multiple of the encoder's stride.
            strict: Let the last chunk be the recording's last `chunk` samples, of which only the
                frames not yet known are kept.
            seq_norm: Subtract the mean over time and divide by the unbiased standard deviation, in
                each chunk or the whole; a chunk of one frame becomes 0.

        Returns:
            Features (B, S, H), or (S, H). S is that of `encode`, without chunks. With chunks, a
            tail too short for a frame has none; `strict` counts its frames as samples // stride.

        Raises:
            InputError: The recording is too short for a frame, or an argument is out of range.
        """
        layers = self.layers_of(layer)
        if wave.ndim == 1:
            return self.features(
                wave.unsqueeze(0), layer, chunk=chunk, strict=strict, seq_norm=seq_norm
            ).squeeze(0)
        stride, samples = self.encoder.stride, wave.shape[-1]
        if wave.ndim != 2 or samples < stride - 1:
            raise InputError(
                f"a wave {tuple(wave.shape)}: give (B, T), of at least {stride - 1} samples"
            )
        if chunk is None:
            if strict:
                raise InputError("strict is about chunks: give chunk, such as 64000")
            stream = FeatureStream(self, layer)
            pieces = [stream.push(piece) for piece in torch.split(wave, PIECE * stride, dim=1)]
            frames = torch.cat([*pieces, stream.flush()], dim=1)
            return standardise(frames) if seq_norm else frames
        if chunk < stride or chunk % stride:
            raise InputError(f"chunk {chunk}: give a multiple of {stride} samples")
        return self._in_chunks(wave, layers, chunk, strict=strict, seq_norm=seq_norm)

    @torch.no_grad()
    def _in_chunks(
        self, wave: Tensor, layers: int, chunk: int, *, strict: bool, seq_norm: bool
    ) -> Tensor:
        weight = next(self.parameters())
        known = wave.shape[1] // chunk * chunk if strict else wave.shape[1]
        parts: list[tuple[Tensor, int | None]] = [
            (wave[:, start : start + chunk], None) for start in range(0, known, chunk)
        ]
        rest = (wave.shape[1] - known) // self.encoder.stride
        if rest:
            parts.append((wave[:, -chunk:], rest))
        state, found = None, []
        with evaluating(self):
            for part, kept in parts:
                if not self.encoder.frames(part.shape[1]):
                    continue
                frames = self.encode(part.to(weight))
                if layers:
                    frames, state = self.context(frames, state, layers=layers)
                if seq_norm:
                    frames = standardise(frames)
                found.append(frames if kept is None else frames[:, -kept:])
        return torch.cat(found, dim=1)

    def layers_of(self, layer: Layer) -> int:
        """Return how many layers of the LSTM a layer's name stands for; 0 is the encoder.

        Raises:
            InputError: There is no such layer.
        """
        most = self.lstm.num_layers
        number = {"encoder": 0, "context": most}.get(layer) if isinstance(layer, str) else layer
        if number is None or not 0 <= number <= most:
            raise InputError(f"layer {layer!r}: give 'context', 'encoder', or 0 to {most}")
        return number

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder, made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"architecture": "cpc", **self.config}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # Copies: on a GPU, cuDNN keeps the LSTM's weights in one piece of memory.
        weights = {name: value.cpu().clone() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: str | Path) -> CPC:
        """Read what `save` wrote; in eval mode, float32, on the processor.

        Raises:
            InputError: The folder holds no CPC network, or a damaged one.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{folder}: holds no readable {CONFIG}; give the folder of a CPC network"
            ) from error
        if not isinstance(config, dict) or config.pop("architecture", None) != "cpc":
            raise InputError(f"{folder / CONFIG}: its 'architecture' is not 'cpc'; give another")
        try:
            with torch.device("meta"):  # a broken file may claim any size: it costs nothing
                model = cls(**config)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(
                f"{folder / CONFIG}: no arguments of a CPC network ({_first_line(error)})"
            ) from error
        try:
            with safe_open(folder / WEIGHTS, "pt") as opened:
                names = opened.keys()
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
                expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
                if shapes != expected:
                    raise InputError(
                        f"{folder / WEIGHTS}: its tensors are not those of {CONFIG}; give a whole "
                        "folder"
                    )
                weights = {name: opened.get_tensor(name).float().clone() for name in expected}
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(
                f"{folder / WEIGHTS}: missing or damaged ({_first_line(error)})"
            ) from error
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise InputError(f"{folder / WEIGHTS}: holds NaN or infinity; train it again")
        model.load_state_dict(weights, assign=True)
        return model.eval()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
