"""Augmenting in batches, each written whole: a killed run goes on, and processes share the work."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.jobs.speech.augment_noise import Built, Chains
from remanence.jobs.speech.augment_plan import Batch, Output, cut
from remanence.jobs.speech.augment_steps import apply, join
from remanence.kit.audio import FULL_SCALE, read_audio, write_wav
from remanence.kit.recordings import Recording
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.trust import trusting

FLOATS = frozenset({"FLOAT", "DOUBLE"})


@dataclass(frozen=True)
class Piece:
    """A stretch of an output, and what was drawn for it."""

    start: int
    stop: int
    params: Params


@dataclass(frozen=True, eq=False)
class Augmenting:
    """How batches are worked on.

    Attributes:
        folder: The folder that is being written.
        chains: Builds chains.
        device: Where they work.
        suffix: Of the files, `.wav` or `.flac`.
        subtype: libsndfile's name of the sample format.
        lower: Whether a wave beyond full scale is made quieter as a whole.
        piece_seconds: Length from which recordings are cut.
        seed: Seed of the draws.
        skip_broken: Leave out recordings whose samples cannot be read.
        resume: Take up the batches that are there.
    """

    folder: Path
    chains: Chains
    device: torch.device
    suffix: str
    subtype: str
    lower: bool
    piece_seconds: float
    seed: int
    skip_broken: bool
    resume: bool

    def run(self, batches: Sequence[Batch]) -> Iterable[int]:
        """Work on batches, one after the other; yields how many outputs each has.

        The next batch is read while one is augmented.
        """
        with ThreadPoolExecutor(2) as readers:
            left = [batch for batch in batches if not (self.resume and self._done(batch))]
            yield sum(len(b.outputs) for b in batches) - sum(len(b.outputs) for b in left)
            reading = [readers.submit(self._read, batch) for batch in left[:1]]
            for number, batch in enumerate(left):
                started = time.perf_counter()
                waves = reading.pop().result()
                reading += [readers.submit(self._read, b) for b in left[number + 1 : number + 2]]
                self._do(batch, waves, started)
                yield len(batch.outputs)

    def rows(self, batch: Batch) -> list[dict[str, Any]]:
        """The lines of a batch that was done; of what was left out, `broken` says why.

        Raises:
            InputError: The file is damaged, or of other recordings.
        """
        state = self._state(batch)
        try:
            rows: list[dict[str, Any]] = json.loads(state.read_text(encoding="utf-8"))["rows"]
            names = [row["output"] for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{state}: damaged; delete it and pass --resume again") from error
        if names != [self._file(output) for output in batch.outputs]:
            raise InputError(
                f"{self.folder}: was begun with other recordings; give those, or remove the folder"
            )
        return rows

    def seconds(self, batch: Batch) -> float:
        """How long a batch that was done took."""
        found = json.loads(self._state(batch).read_text(encoding="utf-8"))
        return float(found["seconds"])

    def _state(self, batch: Batch) -> Path:
        return self.folder / f"batch-{batch.number:06d}.ckpt"

    def _done(self, batch: Batch) -> bool:
        if not self._state(batch).exists():
            return False
        return all(
            "broken" in row or (self.folder / row["output"]).exists() for row in self.rows(batch)
        )

    def _file(self, output: Output) -> str:
        return f"audio/{output.name}{self.suffix}"

    def _read(self, batch: Batch) -> list[Tensor | InputError]:
        read: dict[Path, Tensor | InputError] = {}  # copies of one recording share their samples
        for output in batch.outputs:
            path = output.recording.path
            if path not in read:
                try:
                    read[path] = read_at(output.recording, output.sample_rate)
                except InputError as error:
                    if not self.skip_broken:
                        raise
                    read[path] = error
        return [read[output.recording.path] for output in batch.outputs]

    def _do(self, batch: Batch, read: Sequence[Tensor | InputError], started: float) -> None:
        first = batch.outputs[0]
        waves: list[Tensor] = []
        outputs: list[Output] = []
        rows: dict[str, dict[str, Any]] = {}
        for output, wave in zip(batch.outputs, read, strict=True):
            if isinstance(wave, Tensor):
                waves.append(wave)
                outputs.append(output)
            else:
                names = {"output": self._file(output), "recording": output.recording.name}
                rows[output.name] = names | {"broken": str(wave)}
        built = self.chains.build(first.chain, first.sample_rate, show=False)
        pieces = [
            self._pieces(output, built, wave.shape[-1])
            for output, wave in zip(outputs, waves, strict=True)
        ]
        results = [torch.zeros_like(wave) for wave in waves]
        snr: list[list[dict[str, float]]] = [[] for _ in waves]
        todo = [(number, piece) for number, own in enumerate(pieces) for piece in own]
        for at in range(0, len(todo), batch.rows):
            part = todo[at : at + batch.rows]
            x = torch.zeros(len(part), first.recording.channels, batch.width)
            for row, (number, piece) in zip(x, part, strict=True):
                row[:, : piece.stop - piece.start] = waves[number][:, piece.start : piece.stop]
            ends = torch.tensor([piece.stop - piece.start for _, piece in part])
            params = Params.cat([piece.params for _, piece in part])
            with torch.inference_mode(), trusting():
                y, ends, found = apply(built.chain, x.to(self.device), ends, params)
            for (number, piece), made, end, realised in zip(
                part, y.cpu(), ends.tolist(), found, strict=True
            ):
                if built.chain.changes_ends:  # then there is one piece
                    results[number] = made[:, :end].clone()
                else:
                    join(results[number], made, piece.start, piece.stop, first.sample_rate)
                snr[number].append(realised)
        for output, wave, result, own, reached in zip(
            outputs, waves, results, pieces, snr, strict=True
        ):
            rows[output.name] = self._write(output, built, wave, result, own, reached)
        seconds = time.perf_counter() - started
        taken = {"rows": [rows[output.name] for output in batch.outputs], "seconds": seconds}
        part_file = self._state(batch).with_suffix(".part")
        part_file.write_text(json.dumps(taken), encoding="utf-8")
        part_file.replace(self._state(batch))

    def _pieces(self, output: Output, built: Built, frames: int) -> list[Piece]:
        spans = cut(frames, output.sample_rate, self.piece_seconds)
        if output.drawn is None:
            return [
                Piece(start, stop, self._drawn(output, built, k, stop - start))
                for k, (start, stop) in enumerate(spans)
            ]
        old = output.drawn["pieces"]
        if [(piece["start"], piece["stop"]) for piece in old] != spans:
            raise InputError(
                f"{output.name}: was drawn for {old[-1]['stop']:,} samples in {len(old)} pieces "
                f"and has {frames:,} in {len(spans)}; give the same recording and --piece-seconds"
            )
        return [
            Piece(start, stop, self._replayed(output, built, piece))
            for (start, stop), piece in zip(spans, old, strict=True)
        ]

    def _drawn(self, output: Output, built: Built, piece: int, frames: int) -> Params:
        words = f"{self.seed}\n{output.copy}\n{piece}\n{output.recording.name}"
        drawn = hashlib.sha256(words.encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(drawn, "little") >> 1)
        return built.chain.sample(1, frames, generator, time=built.chain.most_samples(frames))

    def _replayed(self, output: Output, built: Built, piece: Mapping[str, Any]) -> Params:
        params = Params.from_json(json.dumps(piece["params"]))
        spare = built.chain.sample(1, 1, torch.Generator().manual_seed(0)).values
        if params.values.keys() != spare.keys() or len(params) != 1:
            raise InputError(f"{output.name}: its drawn parameters are not those of its chain")
        clips = built.clips(params)
        if clips != piece.get("noise"):
            raise InputError(
                f"{output.name}: was mixed with {piece.get('noise')}, and --noise holds {clips} "
                "there; give the noise of that run"
            )
        return params

    def _write(
        self,
        output: Output,
        built: Built,
        wave: Tensor,
        result: Tensor,
        pieces: Sequence[Piece],
        realised: Sequence[Mapping[str, float]],
    ) -> dict[str, Any]:
        peak = float(result.abs().max())
        beyond = int((result.abs() > 1).sum())
        gain_db = 0.0
        if self.lower and peak > 1:
            gain_db = float(20 * torch.tensor(FULL_SCALE / peak).log10())
            result = result * (FULL_SCALE / peak)
        name = self._file(output)
        cut_off = write_wav(self.folder / name, result, output.sample_rate, subtype=self.subtype)
        return {
            "output": name,
            "recording": output.recording.name,
            "copy": output.copy,
            "sample_rate": output.sample_rate,
            "channels": len(result),
            "frames": result.shape[-1],
            "chain": output.chain,
            "pieces": [
                {
                    "start": piece.start,
                    "stop": piece.stop,
                    "params": json.loads(piece.params.to_json()),
                    "noise": built.clips(piece.params),
                    "snr_db": measured,
                }
                for piece, measured in zip(pieces, realised, strict=True)
            ],
            "noise_looped": any(built.loops(p.params, p.stop - p.start) for p in pieces),
            "input_at_full_scale": int((wave.abs() >= FULL_SCALE).sum()),
            "silent": not bool(wave.any()),
            "beyond_full_scale": beyond,
            "cut_off": cut_off,
            "gain_db": round(gain_db, 4),
        }


def read_at(recording: Recording, sample_rate: int) -> Tensor:
    """A recording's channels at a rate, (C, T)."""
    return read_audio(recording, sample_rate=sample_rate, mono=False)
