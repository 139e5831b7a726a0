"""What every random effect and every chain can do: draw, apply, replay.

Every draw is one tensor operation for the whole batch, in float64 on the CPU, in the order of the
parameters' names, `apply` first. It never depends on the wave's device. A batch drawn in two parts
differs from one drawn at once: cut its parameters into rows instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, overload

import torch
from torch import Tensor, nn

from remanence.errors import InputError
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.trust import trusting
from remanence.speech.wavaugment.waves import as_waves


class Augmentation(nn.Module, ABC):
    """A random effect, or a chain of them. Identity in eval mode unless `always`.

    In a training step it is a layer like any other, on the waves' device:

        augment = Chain([RandomPitch(16000), RandomReverb(16000)]).to(device)
        for waves, lengths in loader:                   # see `adapters.pad_collate`
            loss = model(augment(waves.to(device), lengths)).backward()

    Args:
        always: augment in eval mode too.

    Attributes:
        changes_ends: whether examples may end sooner than they did; `ends` says where.
    """

    changes_ends: bool = False

    def __init__(self, *, always: bool = False) -> None:
        super().__init__()
        self.always = always

    @abstractmethod
    def sample(
        self, batch_size: int, lengths: Tensor | int, generator: torch.Generator | None = None
    ) -> Params:
        """Draw parameters.

        Args:
            batch_size: B.
            lengths: valid samples, (B,) or one number for all.
            generator: on the CPU; torch's own where None.

        Returns:
            Parameters of B rows, on the CPU.
        """

    @abstractmethod
    def run(self, rows: Tensor, lengths: Tensor | None, params: Params) -> Tensor:
        """Apply drawn parameters to (B, C, T) rows; lengths are on the CPU."""

    def ends(self, lengths: Tensor, params: Params) -> Tensor:
        """Where examples end afterwards: sooner than before only after speed, tempo, splices.

        Args:
            lengths: valid samples before, (B,).
            params: what was drawn.

        Returns:
            Valid samples afterwards, (B,) int64; what lies past them is 0.
        """
        del params
        return lengths

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

        Args:
            wave: floats (T,), (C, T) or (B, C, T).
            lengths: valid samples of each row, (B,), best on the CPU; what lies past them comes
                back as 0.
            generator: on the CPU, for the draw.
            params: parameters to replay instead of a draw.
            return_params: also return the parameters; in eval mode, such as touch no row.

        Returns:
            The wave's shape, dtype and device; with `return_params` the parameters too.

        Raises:
            InputError: a wave, lengths, generator or parameters that do not fit.
        """
        if generator is not None and generator.device.type != "cpu":
            raise InputError(f"generator is on {generator.device}: give one on the CPU")
        active = self.training or self.always
        if not active and not return_params:
            return wave
        waves = as_waves(wave, lengths)
        batch, _, time = waves.wave.shape
        ends = None if lengths is None else torch.as_tensor(lengths).cpu()
        if not active:
            idle = torch.zeros(batch, dtype=torch.bool)
            spare = torch.Generator().manual_seed(0)
            return wave, self.sample(batch, time, spare).gated(idle)
        if params is None:
            params = self.sample(batch, time if ends is None else ends, generator)
        if len(params) != batch:
            raise InputError(f"parameters are for {len(params)} rows and the wave has {batch}")
        with trusting():
            out = waves.restore(self.run(waves.wave, ends, params))
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
        self, batch_size: int, lengths: Tensor | int, generator: torch.Generator | None = None
    ) -> Params:
        """Draw `apply`, then the effect's own parameters; see `Augmentation.sample`."""
        apply = torch.rand(batch_size, dtype=torch.float64, generator=generator) < self.p
        ends = torch.as_tensor(lengths).cpu().expand(batch_size)
        return Params({"apply": apply, **self.draw(ends, generator)})

    def run(self, rows: Tensor, lengths: Tensor | None, params: Params) -> Tensor:
        """Apply drawn parameters to the rows that `apply` names, and compute no others."""
        if "apply" not in params.values:
            raise InputError("parameters hold no 'apply': replay them in the chain that drew them")
        params = params.to("cpu")
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
        """The effect on the rows numbered `chosen`, (N,) on the CPU and in order: (N, C, T)."""


class RowEffect(RandomEffect):
    """One effect with a probability, that looks at each row by itself."""

    def select(
        self, rows: Tensor, lengths: Tensor | None, params: Params, chosen: Tensor
    ) -> Tensor:
        """The effect on the rows numbered `chosen`, (N,) on the CPU and in order: (N, C, T)."""
        if len(chosen) == len(rows):
            return self.effect(rows, lengths, params.values)
        ends = None if lengths is None else lengths[chosen]
        return self.effect(rows[chosen.to(rows.device)], ends, params[chosen].values)

    @abstractmethod
    def effect(self, rows: Tensor, lengths: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """The effect on (B, C, T) rows, each by itself."""
