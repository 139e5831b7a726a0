"""What every random effect and every chain can do: draw, apply, replay.

Every draw is one tensor operation for the whole batch, in float64 on the CPU, in the order of the
parameters' names, `apply` first. It never depends on the wave's device. A batch drawn in two parts
differs from one drawn at once: cut its parameters into rows instead.

`torch.compile(augment, fullgraph=True)` takes parameters that were drawn before, and is compiled
once for all draws of one batch shape. It looks at no values: a wave with NaN, or parameters of
another effect or range, pass unnoticed. With waves, lengths and parameters (`params.to(device)`) on
one GPU nothing waits for the CPU, and CUDA graphs (`mode="reduce-overhead"`) can hold it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, overload

import torch
from torch import Tensor, nn

from remanence.errors import InputError
from remanence.speech.wavaugment.graph import home
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.trust import trusting
from remanence.speech.wavaugment.waves import Waves, as_waves, check_generator


class Augmentation(nn.Module, ABC):
    """A random effect, or a chain of them. Identity in eval mode unless `always`.

    In a training step it is a layer like any other, on the waves' device:

        augment = Chain([RandomPitch(16000), RandomReverb(16000)]).to(device)
        for waves, lengths in loader:                   # see `adapters.pad_collate`
            loss = model(augment(waves.to(device), lengths)).backward()

    Args:
        always: augment in eval mode too.

    Attributes:
        changes_ends: whether examples may end elsewhere than they did; `ends` says where.
    """

    changes_ends: bool = False

    def __init__(self, *, always: bool = False) -> None:
        super().__init__()
        self.always = always

    @abstractmethod
    def sample(
        self,
        batch_size: int,
        lengths: Tensor | int,
        generator: torch.Generator | None = None,
        *,
        time: int | None = None,
    ) -> Params:
        """Draw parameters.

        Args:
            batch_size: B.
            lengths: valid samples, (B,) or one number for all.
            generator: on the CPU; torch's own where None.
            time: T, up to which examples may grow; the greatest length where None.

        Returns:
            Parameters of B rows, on the CPU.
        """

    @abstractmethod
    def run(self, rows: Tensor, lengths: Tensor | None, params: Params) -> Tensor:
        """Apply drawn parameters to (B, C, T) rows; lengths are at `home`."""

    def ends(self, lengths: Tensor, params: Params, time: int) -> Tensor:
        """Where examples end afterwards: elsewhere than before only after speed, tempo, splices.

        Args:
            lengths: valid samples before, (B,).
            params: what was drawn.
            time: T, past which nothing grows.

        Returns:
            Valid samples afterwards, (B,) int64, above 0 where they were; what lies past them is 0.
        """
        del params, time
        return lengths

    def most_samples(self, length: int) -> int:
        """With how many samples an example of so many may end, in a batch that has the room."""
        return length

    @overload
    def forward(
        self,
        wave: Tensor,
        lengths: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        params: Params | None = None,
        return_params: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        wave: Tensor,
        lengths: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        params: Params | None = None,
        return_params: Literal[True],
    ) -> tuple[Tensor, Params]: ...

    def forward(
        self,
        wave: Tensor,
        lengths: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        params: Params | None = None,
        return_params: bool = False,
    ) -> Tensor | tuple[Tensor, Params]:
        """Augment a wave.

        Compiled, it needs `params` for a whole graph, and trusts all that it is given.

        Args:
            wave: floats (T,), (C, T) or (B, C, T).
            lengths: valid samples of each row, (B,), best on the CPU. What lies past them is
                room for examples that become longer, and else comes back as 0.
            generator: on the CPU, for the draw.
            params: parameters to replay instead of a draw.
            return_params: also return the parameters; in eval mode, such as touch no row.

        Returns:
            The wave's shape, dtype and device; with `return_params` the parameters too. Where no
            row is touched it may share the wave's memory.

        Raises:
            InputError: a wave, lengths, generator or parameters that do not fit.
        """
        check_generator(generator)
        active = self.training or self.always
        if not active and not return_params:
            return wave
        waves = as_waves(wave, lengths)
        batch, _, time = waves.wave.shape
        ends = None if lengths is None else torch.as_tensor(lengths).to(home(wave.device))
        if not active:
            idle = torch.zeros(batch, dtype=torch.bool)
            spare = torch.Generator().manual_seed(0)
            return wave, self.sample(batch, time, spare).gated(idle)
        if params is None:
            params = self.sample(batch, time if ends is None else ends, generator, time=time)
        if len(params) != batch:
            raise InputError(f"parameters are for {len(params)} rows and the wave has {batch}")
        with trusting():
            out = self.run(waves.wave, ends, params)
            if ends is not None and self.changes_ends:
                after = self.ends(ends, params, time).to(wave.device)
                waves = Waves(waves.wave, after, waves.shape, ragged=True)
            out = waves.restore(out)
        return (out, params) if return_params else out


class RandomEffect(Augmentation):
    """One effect with a probability.

    Args:
        p: probability that an example is touched.
        always: augment in eval mode too.
    """

    def __init__(self, *, p: float = 1.0, always: bool = False) -> None:
        super().__init__(always=always)
        if not 0 <= p <= 1:
            raise InputError(f"p {p} is no probability: give 0..1")
        self.p = p

    def sample(
        self,
        batch_size: int,
        lengths: Tensor | int,
        generator: torch.Generator | None = None,
        *,
        time: int | None = None,
    ) -> Params:
        """Draw `apply`, then the effect's own parameters; see `Augmentation.sample`."""
        del time  # only what comes next hangs on it
        apply = torch.rand(batch_size, dtype=torch.float64, generator=generator) < self.p
        ends = torch.as_tensor(lengths).cpu().expand(batch_size)
        return Params({"apply": apply, **self.draw(ends, generator)})

    def run(self, rows: Tensor, lengths: Tensor | None, params: Params) -> Tensor:
        """Apply drawn parameters to the rows that `apply` names, and compute no others.

        Inside a compiled graph all are computed, as its shapes are fixed.
        """
        if "apply" not in params.values:
            raise InputError("parameters hold no 'apply': replay them in the chain that drew them")
        params = params.to(home(rows.device))
        if torch.compiler.is_compiling():
            every = torch.arange(len(rows), device=rows.device)
            apply = params.values["apply"][:, None, None]
            return torch.where(apply, self.select(rows, lengths, params, every), rows)
        chosen = params.values["apply"].nonzero()[:, 0]
        if len(chosen) == 0:
            return rows
        some = self.select(rows, lengths, params, chosen)
        if len(chosen) == len(rows):
            return some
        return rows.index_copy(0, chosen.to(rows.device), some)

    @abstractmethod
    def draw(self, lengths: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Parameters of len(lengths) rows."""

    @abstractmethod
    def select(
        self, rows: Tensor, lengths: Tensor | None, params: Params, chosen: Tensor
    ) -> Tensor:
        """The effect on the rows numbered `chosen`, (N,) at `home` and in order: (N, C, T)."""


class RowEffect(RandomEffect):
    """One effect with a probability, that looks at each row by itself."""

    def select(
        self, rows: Tensor, lengths: Tensor | None, params: Params, chosen: Tensor
    ) -> Tensor:
        """The effect on the rows numbered `chosen`, (N,) at `home` and in order: (N, C, T)."""
        if len(chosen) == len(rows):
            return self.effect(rows, lengths, params.values)
        ends = None if lengths is None else lengths[chosen]
        return self.effect(rows[chosen.to(rows.device)], ends, params[chosen].values)

    @abstractmethod
    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """The effect on (B, C, T) rows, each by itself."""
