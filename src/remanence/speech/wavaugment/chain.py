"""Effects one after another, one of several, and two views of a wave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from remanence.errors import InputError
from remanence.speech.wavaugment.augmentation import Augmentation
from remanence.speech.wavaugment.graph import home
from remanence.speech.wavaugment.levels import saturate
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.random import (
    RandomBabble,
    RandomChunkSwap,
    RandomClip,
    RandomFrequencyDrop,
    RandomGain,
    RandomNoise,
    RandomPitch,
    RandomPolarity,
    RandomReverb,
    RandomSpeed,
    RandomTimeDrop,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

RECIPES = ("cpc2", "cpc2-community", "wav2aug-top3", "wav2aug-top6", "wav2aug-top9")
View = Literal["past", "future", "both", "same"]


class Chain(Augmentation):
    """Effects in order, all of them.

    Parameters are named after the effect's place, from 0: `1.snr_db`. They are drawn in order.

    Args:
        effects: random effects or chains.
        saturate: cut off at full scale after each effect, as sox does.
        always: augment in eval mode too.
    """

    def __init__(
        self, effects: Sequence[Augmentation], *, saturate: bool = False, always: bool = False
    ) -> None:
        super().__init__(always=always)
        if not effects:
            raise InputError("a chain needs an effect: give at least one")
        self.effects = nn.ModuleList(effects)
        self.saturate = saturate
        self.changes_ends = any(effect.changes_ends for effect in effects)

    def sample(
        self,
        batch_size: int,
        lengths: Tensor | int,
        generator: torch.Generator | None = None,
        *,
        time: int | None = None,
    ) -> Params:
        """Draw every effect's parameters; see `Augmentation.sample`."""
        every = torch.ones(batch_size, len(self.effects), dtype=torch.bool)
        return self._drawn(every, lengths, generator, time)

    def run(self, rows: Tensor, lengths: Tensor | None, params: Params) -> Tensor:
        """Apply drawn parameters to (B, C, T) rows."""
        for place, effect in enumerate(self._members()):
            own = params.under(str(place))
            rows = effect.run(rows, lengths, own)
            if self.saturate:
                rows = saturate(rows)
            if effect.changes_ends:
                time = rows.shape[-1]
                if lengths is None:
                    lengths = torch.full((len(rows),), time, device=home(rows.device))
                lengths = effect.ends(lengths, own, time)
        return rows

    def ends(self, lengths: Tensor, params: Params, time: int) -> Tensor:
        """Where examples end after all effects; see `Augmentation.ends`."""
        for place, effect in enumerate(self._members()):
            lengths = effect.ends(lengths, params.under(str(place)), time)
        return lengths

    def most_samples(self, length: int) -> int:
        """The most samples after all effects; see `Augmentation.most_samples`."""
        return self._most_after(length, len(self.effects))

    def _most_after(self, length: int, k: int) -> int:
        """The most samples after the `k` effects that lengthen most, in order."""
        most = [length] * (k + 1)  # after so many of the effects so far
        for effect in self._members():
            for count in range(k, 0, -1):
                most[count] = max(most[count], effect.most_samples(most[count - 1]))
        return most[k]

    def _drawn(
        self,
        chosen: Tensor,
        lengths: Tensor | int,
        generator: torch.Generator | None,
        time: int | None,
    ) -> Params:
        """Draw each effect, applied where `chosen` (B, effects), on the lengths left before it."""
        ends = torch.as_tensor(lengths).cpu().expand(len(chosen))
        room = int(ends.max()) if time is None else time
        drawn = {}
        for place, effect in enumerate(self._members()):
            own = effect.sample(len(chosen), ends, generator, time=room)
            own = drawn[str(place)] = own.gated(chosen[:, place])
            if effect.changes_ends:
                ends = effect.ends(ends, own, room)
        return Params.nest(drawn)

    def _members(self) -> list[Augmentation]:
        return [effect for effect in self.effects if isinstance(effect, Augmentation)]


class SomeOf(Chain):
    """`k` distinct effects for each example, drawn evenly, run in the order given.

    Every effect's parameters are drawn for every row; `apply` holds only where it was chosen.

    Args:
        k: how many, 1 to the number of effects.
        effects: random effects or chains.
        saturate: cut off at full scale after each effect.
        always: augment in eval mode too.
    """

    def __init__(
        self,
        k: int,
        effects: Sequence[Augmentation],
        *,
        saturate: bool = False,
        always: bool = False,
    ) -> None:
        super().__init__(effects, saturate=saturate, always=always)
        if not 1 <= k <= len(effects):
            raise InputError(f"k {k} is not 1 to {len(effects)}, the number of effects")
        self.k = k

    def sample(
        self,
        batch_size: int,
        lengths: Tensor | int,
        generator: torch.Generator | None = None,
        *,
        time: int | None = None,
    ) -> Params:
        """Draw the choice, then every effect's parameters; see `Augmentation.sample`."""
        shape = batch_size, len(self.effects)
        keys = torch.rand(shape, dtype=torch.float64, generator=generator)
        chosen = torch.zeros(shape, dtype=torch.bool)
        chosen.scatter_(1, keys.argsort(1)[:, : self.k], value=True)
        return self._drawn(chosen, lengths, generator, time)

    def most_samples(self, length: int) -> int:
        """The most samples after `k` of the effects; see `Augmentation.most_samples`."""
        return self._most_after(length, self.k)


class OneOf(SomeOf):
    """One effect for each example, drawn evenly, as the published training code does.

    Args:
        effects: random effects or chains.
        always: augment in eval mode too.
    """

    def __init__(self, effects: Sequence[Augmentation], *, always: bool = False) -> None:
        super().__init__(1, effects, always=always)


def from_recipe(
    name: str, sample_rate: int, noise: Tensor | Sequence[Tensor], *, always: bool = False
) -> Chain:
    """Build a published recipe.

    - `cpc2`: pitch by -300..299 cents; noise at 5..15 dB; reverberance 50, damping 50, room 0..99
      (arXiv 2007.00991).
    - `cpc2-community`: the same effects as later code has them: RMS and peak normalised noise at
      5..20 dB; reverberance 0..100, damping 100, room 0..99.
    - `wav2aug-top3`, `-top6`, `-top9`: for each example two distinct effects, evenly drawn, of the
      first so many of noise, frequency drop, time drop, speed, clip, chunk swap, babble, gain and
      polarity, the order in which the authors of wav2aug found them useful, with its ranges. Speed
      moves an example's end (`ends`), and babble needs the batch as a whole.

    Args:
        name: of the recipe.
        sample_rate: Hz.
        noise: clips at that rate, (M, T') or a sequence of (T',) floats.
        always: augment in eval mode too.

    Returns:
        The chain.

    Raises:
        InputError: an unknown recipe, or no noise.
    """
    if name == "cpc2":
        pitch, room = RandomPitch(sample_rate), RandomReverb(sample_rate)
        return Chain([pitch, RandomNoise(noise), room], always=always)
    if name == "cpc2-community":
        mixed = RandomNoise(noise, (5.0, 20.0), mix="rms_peak")
        room = RandomReverb(sample_rate, reverberance=(0.0, 100.0), damping=100.0)
        return Chain([RandomPitch(sample_rate), mixed, room], always=always)
    if name in RECIPES:
        useful: list[Augmentation] = [
            RandomNoise(noise, (0.0, 10.0)),
            RandomFrequencyDrop(sample_rate, (1, 8), 0.2),
            RandomTimeDrop(sample_rate, 250.0, count=(1, 8)),
            RandomSpeed((0.9, 1.1)),
            RandomClip((0.0, 0.75), law="uniform", keep_peak=True),
            RandomChunkSwap(4, 0.01),
            RandomBabble(16, (0.0, 20.0)),
            RandomGain((-26.0, -6.0)),
            RandomPolarity(p=0.6),
        ]
        return SomeOf(2, useful[: int(name[-1])], always=always)
    raise InputError(f"recipe {name!r} is unknown: give one of {RECIPES}")


class TwoView(nn.Module):
    """Two copies of a wave for contrastive prediction (arXiv 2007.00991, Section 4).

    Args:
        chain: what augments.
        mode: `past` augments the first copy, `future` the second, `both` each by its own draw,
            `same` both by one draw. A copy that is not augmented is the wave itself, and under
            `same` both copies are one tensor: encode it once.

    Raises:
        InputError: an unknown mode.
    """

    def __init__(self, chain: Augmentation, mode: View = "past") -> None:
        super().__init__()
        if mode not in get_args(View):
            raise InputError(f"mode {mode!r} is unknown: give one of {get_args(View)}")
        self.chain = chain
        self.mode = mode

    def sample(
        self, batch_size: int, lengths: Tensor | int, generator: torch.Generator | None = None
    ) -> Params:
        """Draw parameters, named `past.` and `future.`, or `same.`; see `Augmentation.sample`."""
        views = ("past", "future") if self.mode == "both" else (self.mode,)
        return Params.nest(
            {view: self.chain.sample(batch_size, lengths, generator) for view in views}
        )

    def forward(
        self,
        wave: Tensor,
        lengths: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        params: Params | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the two copies.

        Args:
            wave: floats (T,), (C, T) or (B, C, T).
            lengths: valid samples of each row, (B,).
            generator: on the CPU; past is drawn before future.
            params: what `sample` drew, to replay.

        Returns:
            (past, future), each of the wave's shape, dtype and device.

        Raises:
            InputError: as the chain's forward does.
        """

        def view(name: str) -> Tensor:
            own = None if params is None else params.under(name)
            out: Tensor = self.chain(wave, lengths, generator=generator, params=own)
            return out

        if self.mode == "same":
            copy = view("same")
            return copy, copy
        past = wave if self.mode == "future" else view("past")
        return past, wave if self.mode == "past" else view("future")
