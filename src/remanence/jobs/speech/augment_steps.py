"""A chain on a batch of pieces, step by step, and pieces joined."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remanence.jobs.speech.augment_noise import steps_of
from remanence.jobs.speech.augment_plan import fade_samples
from remanence.speech.wavaugment.chain import Chain
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.random import RandomNoise


def apply(
    chain: Chain, x: Tensor, ends: Tensor, params: Params, before: str = ""
) -> tuple[Tensor, Tensor, list[dict[str, float]]]:
    """Run a chain step by step, and look at what each noise step did.

    Args:
        chain: The chain.
        x: (B, C, T), zero past the ends.
        ends: (B,) on the CPU.
        params: Of B rows.
        before: Place of the chain in another.

    Returns:
        (B, C, T), the ends (B,), and for each row the SNR that its noise steps reached, dB, by
        place.
    """
    measured: list[dict[str, float]] = [{} for _ in x]
    for number, effect in enumerate(steps_of(chain)):
        own, place = params.under(str(number)), f"{before}{number}"
        if isinstance(effect, Chain):
            x, ends, found = apply(effect, x, ends, own, f"{place}.")
            for known, more in zip(measured, found, strict=True):
                known.update(more)
            continue
        y = effect.run(x, ends, own)
        if isinstance(effect, RandomNoise):
            ratios = _snr_db(x, y, scaled=effect.mix != "rms").tolist()
            for row, touched in enumerate(own.values["apply"].tolist()):
                if touched and math.isfinite(ratios[row]):
                    measured[row][place] = round(ratios[row], 3)
        x = y
        if effect.changes_ends:
            ends = effect.ends(ends, own, x.shape[-1])
    return x, ends, measured


def _snr_db(before: Tensor, after: Tensor, *, scaled: bool) -> Tensor:
    """Energy of `before`, fitted where the mix scales it, over that of what was added, (B,)."""
    x, y = before.double().flatten(1), after.double().flatten(1)
    if scaled:
        x = x * ((x * y).sum(1) / x.square().sum(1))[:, None]
    return 10 * (x.square().sum(1) / (y - x).square().sum(1)).log10()


def join(result: Tensor, made: Tensor, start: int, stop: int, sample_rate: int) -> None:
    """Write a piece into its output, cross-faded with the one before.

    Args:
        result: (C, T), in which the pieces before it are.
        made: (C, at least stop - start).
        start: Its first sample.
        stop: Its end.
        sample_rate: Its rate.
    """
    made = made[:, : stop - start].clone()
    overlap = min(fade_samples(sample_rate), stop - start) if start else 0
    rise = (torch.arange(overlap) + 0.5) / max(1, overlap)
    made[:, :overlap] *= rise
    made[:, :overlap] += result[:, start : start + overlap] * (1 - rise)
    result[:, start:stop] = made
