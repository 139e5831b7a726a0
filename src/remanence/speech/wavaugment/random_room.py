"""Random rooms: reverberation by parameters, or by recorded or simulated impulse responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.utils.rnn import pad_sequence

from remanence.errors import InputError
from remanence.speech.wavaugment.augmentation import RowEffect
from remanence.speech.wavaugment.draws import Range, as_range, as_whole_range, uniform, whole
from remanence.speech.wavaugment.graph import found
from remanence.speech.wavaugment.reverb import convolve_room, reverb
from remanence.speech.wavaugment.waves import check_rate, mono_clips

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor


class RandomReverb(RowEffect):
    """Reverberation; `reverb`. A range draws evenly, a number is fixed.

    Draws `room` as whole percents in [low, high), as the published code does, then `reverberance`,
    `damping`, `stereo_depth`, `pre_delay_ms` and `wet_db`.
    """

    def __init__(
        self,
        sample_rate: float,
        *,
        room: Range = (0, 100),
        reverberance: Range = 50.0,
        damping: Range = 50.0,
        stereo_depth: Range = 100.0,
        pre_delay_ms: Range = 0.0,
        wet_db: Range = 0.0,
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        check_rate(sample_rate)
        self.sample_rate = sample_rate
        self.room = as_whole_range("room", room, 0, 100)
        self.ranges = {
            "reverberance": as_range("reverberance", reverberance, 0, 100),
            "damping": as_range("damping", damping, 0, 100),
            "stereo_depth": as_range("stereo_depth", stereo_depth, 0, 100),
            "pre_delay_ms": as_range("pre_delay_ms", pre_delay_ms, 0, 500),
            "wet_db": as_range("wet_db", wet_db, -10, 10),
        }

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `room`, int64, and the others, float64."""
        room = whole(self.room, len(lengths), generator)
        others = {k: uniform(v, len(lengths), generator) for k, v in self.ranges.items()}
        return {"room": room, **others}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Reverberate; one channel stays one."""
        return reverb(
            rows,
            self.sample_rate,
            reverberance=values["reverberance"],
            damping=values["damping"],
            room=values["room"],
            stereo_depth=values["stereo_depth"],
            pre_delay_ms=values["pre_delay_ms"],
            wet_db=values["wet_db"],
            lengths=lengths,
        )


class RandomRoom(RowEffect):
    """A room from a bank of impulse responses; `convolve_room`.

    Draws `response`. The bank is a buffer and moves with the module.

    Args:
        responses: at the waves' sample rate: (M, K) or a sequence of (K,) floats.
        align: see `convolve_room`.
        unit_energy: see `convolve_room`.
        p: probability that an example is touched.
        always: augment in eval mode too.

    Raises:
        InputError: an empty bank, or a response that is empty, silent or not mono.
    """

    bank: Tensor

    def __init__(
        self,
        responses: Tensor | Sequence[Tensor],
        *,
        align: bool = True,
        unit_energy: bool = True,
        p: float = 1.0,
        always: bool = False,
    ) -> None:
        super().__init__(p=p, always=always)
        clips = mono_clips("the bank of responses", responses)
        if any(not clip.any() for clip in clips):
            raise InputError("the bank holds a response of only zeros: leave it out")
        bank = pad_sequence([clip[0, 0] for clip in clips], batch_first=True)
        self.register_buffer("bank", bank, persistent=False)
        self.align, self.unit_energy = align, unit_energy

    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw `response`, int64."""
        return {"response": whole((0, len(self.bank)), len(lengths), generator)}

    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Play the wave in the room."""
        if found(values["response"] >= len(self.bank)):
            raise InputError(f"parameters name a response beyond the bank's {len(self.bank)}")
        impulse = self.bank[values["response"].to(self.bank.device)]
        return convolve_room(
            rows, impulse, align=self.align, unit_energy=self.unit_energy, lengths=lengths
        )
