"""What turns recordings into features of frames: MFCC, a CPC run, or the user's own module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from remanence.errors import InputError
from remanence.kit.audio import mfcc
from remanence.kit.checkpoints import one_line
from remanence.modes import evaluating
from remanence.speech.cpc.seq_norm import standardise

if TYPE_CHECKING:
    from remanence.speech.cpc.model import CPC, Layer

RATE = 100.0  # frames a second, where nobody says
SAMPLE_RATE = 16_000  # of the user's own modules, where nobody says
LONG = 60  # seconds from which a recording is not put into a batch with others
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Encoder:
    """Turns waves into features.

    Attributes:
        name: What it is, in words.
        rate: Frames a second.
        sample_rate: Of the waves it takes; None where it takes any.
        encode: From waves (T,) and their sample rate to features (S, D), all float32 on the CPU.
            A wave's features do not depend on the others.
        together: Whether it pays to give it several waves of similar length.
        least: Samples that give a frame.
    """

    name: str
    rate: float
    sample_rate: int | None
    encode: Callable[[Sequence[Tensor], int], list[Tensor]]
    together: bool = False
    least: int = 1


def is_network(source: str) -> bool:
    """Tell whether features come from recordings: a name, a network's code, or a CPC run."""
    return source == "mfcc" or _code(source) or cpc_folder(source) is not None


def cpc_folder(source: str) -> Path | None:
    """Return the folder of a CPC network: the one given, or `model` inside a run; or None."""
    path = Path(source).expanduser()
    folders = (path, path / "model")
    return next((folder for folder in folders if (folder / WEIGHTS).is_file()), None)


def open_encoder(
    source: str,
    *,
    layer: str = "context",
    chunk: float | None = None,
    strict: bool = False,
    seq_norm: bool = False,
    frame_rate: float | None = None,
    sample_rate: int | None = None,
    device: torch.device | str = "cpu",
) -> Encoder:
    """Open what turns recordings into features.

    Args:
        source: `mfcc`; a folder that `remanence speech cpc` wrote; or FILE.py:FUNCTION, which
            returns a torch module from waves (B, T) to features (B, S, D).
        layer: Of a CPC network: `context`, `encoder`, or the number of a context layer.
        chunk: Seconds that a CPC network sees at a time, the state carried on, as the official
            scripts do (4); None for one pass over the whole recording.
        strict: With `chunk`, the last chunk is as long as the others and overlaps the one before.
        seq_norm: Take the mean over time out and divide by the deviation; for each chunk.
        frame_rate: Frames a second of FILE.py:FUNCTION; 100 if None. The others have their own.
        sample_rate: Of the waves that FILE.py:FUNCTION takes, 16000 if None; MFCC take any.
        device: Where the network runs.

    Raises:
        InputError: It cannot be opened, or an option does not go with it.
    """
    wanted = _layer(layer)
    folder = cpc_folder(source)
    if folder is None and (layer != "context" or chunk is not None or strict):
        raise InputError(f"--layer, --chunk, --strict: are for CPC networks, not for {source}")
    if frame_rate is not None and not _code(source):
        raise InputError(f"--frame-rate: {source} has its own; leave it out")
    if strict and chunk is None:
        raise InputError("--strict: says how chunks end; give --chunk as well, 4 is usual")
    if chunk is not None and not 0.1 <= chunk <= 86_400:  # NaN is in no range
        raise InputError(f"--chunk {chunk:g}: give 0.1 to 86400 seconds; 4 is usual")
    if source == "mfcc":
        encode = partial(_mfcc, seq_norm=seq_norm)
        return Encoder("mfcc", RATE, sample_rate, encode)
    if folder is not None:
        from remanence.speech.cpc.model import CPC

        model = CPC.load(folder).to(device).eval()
        own = int(model.config["sample_rate"])
        if sample_rate not in (None, own):
            raise InputError(f"--sample-rate {sample_rate}: {source} takes {own}; leave it out")
        stride = model.encoder.stride
        samples = None if chunk is None else max(1, round(chunk * own / stride)) * stride
        reads = _Cpc(model, wanted, samples, strict=strict, seq_norm=seq_norm)
        name = f"{source}, {layer}"
        return Encoder(name, own / stride, own, reads, together=True, least=stride - 1)
    if not _code(source):
        raise InputError(
            f"{source}: neither mfcc nor a CPC run (a folder with {WEIGHTS}) nor FILE.py:FUNCTION"
        )
    check_frame_rate(frame_rate)
    from remanence.jobs.compress.subject import open_subject  # slow to import

    module = open_subject(source).model.to(device)
    takes = sample_rate or SAMPLE_RATE
    return Encoder(source, frame_rate or RATE, takes, partial(_own, module, source, seq_norm))


def check_frame_rate(frame_rate: float | None) -> None:
    """Refuse a frame rate that cannot be meant."""
    if frame_rate is not None and not 0.1 <= frame_rate <= 100_000:  # NaN is in no range
        raise InputError(f"--frame-rate {frame_rate:g}: give frames a second, 0.1 to 100000")


def _code(source: str) -> bool:
    path, colon, _ = source.rpartition(":")
    return bool(colon) and path.endswith(".py")


def _layer(layer: str) -> Layer:
    if layer in ("context", "encoder"):
        return "context" if layer == "context" else "encoder"
    if not layer.isdigit():
        raise InputError(f"--layer {layer}: give context, encoder, or a context layer's number")
    return int(layer)


def _mfcc(waves: Sequence[Tensor], sample_rate: int, seq_norm: bool) -> list[Tensor]:
    frames = [mfcc(wave, sample_rate) for wave in waves]
    return [standardise(f) for f in frames] if seq_norm else frames


def _own(
    module: nn.Module, name: str, seq_norm: bool, waves: Sequence[Tensor], _: int
) -> list[Tensor]:
    # One at a time: padding would change what a network that looks ahead says.
    place = next(module.parameters(), torch.empty(0)).device
    found = []
    for wave in waves:
        try:
            with torch.no_grad(), evaluating(module):
                frames = module(wave.unsqueeze(0).to(place))
        except Exception as error:  # the user's own code
            raise InputError(
                f"{name}: failed on {len(wave):,} samples ({type(error).__name__}: "
                f"{one_line(error)})"
            ) from error
        if not isinstance(frames, Tensor) or frames.ndim != 3 or len(frames) != 1:
            shape = tuple(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
            raise InputError(f"{name}: gave {shape} for waves (1, T); it must give (1, S, D)")
        frames = frames[0].float().cpu()
        found.append(standardise(frames) if seq_norm else frames)
    return found


class _Cpc:
    def __init__(
        self, model: CPC, layer: Layer, chunk: int | None, *, strict: bool, seq_norm: bool
    ) -> None:
        self.model, self.layers = model, model.layers_of(layer)
        self.chunk, self.strict, self.seq_norm = chunk, strict, seq_norm

    @torch.no_grad()
    def __call__(self, waves: Sequence[Tensor], sample_rate: int) -> list[Tensor]:
        if self.chunk is not None:
            return [self._alone(wave) for wave in waves]
        short = [i for i, wave in enumerate(waves) if len(wave) <= LONG * sample_rate]
        together = self._together([waves[i] for i in short])
        found = dict(zip(short, together, strict=True))
        return [found[i] if i in found else self._alone(wave) for i, wave in enumerate(waves)]

    def _alone(self, wave: Tensor) -> Tensor:
        return self.model.features(
            wave, self.layers, chunk=self.chunk, strict=self.strict, seq_norm=self.seq_norm
        ).cpu()

    def _together(self, waves: Sequence[Tensor]) -> list[Tensor]:
        """Features of several recordings at once.

        Only the context network, which never looks ahead, sees them padded: a padded wave would
        change the last frames of the encoder.
        """
        frames = [self.model.features(wave, "encoder") for wave in waves]
        if self.layers and waves:
            with evaluating(self.model):
                c, _ = self.model.context(
                    pad_sequence(frames, batch_first=True), layers=self.layers
                )
            frames = [row[: len(z)] for row, z in zip(c, frames, strict=True)]
        return [(standardise(f) if self.seq_norm else f).cpu() for f in frames]
