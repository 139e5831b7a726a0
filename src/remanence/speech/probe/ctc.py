"""A small head with CTC on frozen features, for phone error rates with few labels.

As in Libri-light (arXiv 1912.07875): an optional LSTM, then one convolution over eight frames every
four, whose outputs are the phones and, last, the blank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import ctc_loss, pad
from torch.nn.utils.rnn import pad_sequence

from remanence.errors import InputError
from remanence.modes import evaluating
from remanence.speech.probe.decode import best_path, prefix_beam_search
from remanence.speech.probe.linear import moments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KERNEL, STRIDE = 8, 4


class CtcHead(nn.Module):
    """From features to log-probabilities of phones and the blank.

    Args:
        dim: D of the features.
        phones: P.
        lstm: Whether an LSTM of D units, which sees the past only, comes first.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, dim: int, phones: int, *, lstm: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, dim, batch_first=True) if lstm else None
        self.conv = nn.Conv1d(dim, phones + 1, KERNEL, STRIDE)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(dim))

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (B, T, P + 1), the blank last, and their lengths (B,).

        Args:
            features: (B, S, D), padded at the end with anything.
            lengths: Frames of each (B,), int64; fewer than 8 count as 8, filled up with zeros.
        """
        x = (features - self.mean) / self.spread
        inside = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device).unsqueeze(1)
        x = x.masked_fill(~inside.unsqueeze(2), 0.0)
        x = pad(x, (0, 0, 0, max(0, KERNEL - x.shape[1])))
        if self.lstm is not None:
            x, _ = self.lstm(x)
        out = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return out.log_softmax(-1), frames_out(lengths)


@dataclass(frozen=True, eq=False)
class CtcProbe:
    """A trained head.

    Attributes:
        head: The network, in eval mode.
        losses: Mean loss of each epoch (epochs,).
        impossible: Numbers of the utterances that have more phones than the head gives frames: no
            path spells them, and they taught nothing.
    """

    head: CtcHead
    losses: Tensor
    impossible: tuple[int, ...]

    @torch.no_grad()
    def log_probs(self, features: Sequence[Tensor], batch: int = 8) -> list[Tensor]:
        """Return log-probabilities (T, P + 1) of each utterance's features (S, D)."""
        place = self.head.mean.device
        found = []
        with evaluating(self.head):
            for i in range(0, len(features), batch):
                part = [x.to(place).float() for x in features[i : i + batch]]
                lengths = torch.tensor([len(x) for x in part])
                out, ends = self.head(pad_sequence(part, batch_first=True), lengths)
                found += [row[:end] for row, end in zip(out, ends.tolist(), strict=True)]
        return found

    def decode(self, features: Sequence[Tensor], width: int | None = 20) -> list[list[int]]:
        """Return the phones of each utterance's features (S, D).

        Args:
            features: Of each utterance.
            width: Of the prefix beam search; None takes the best path.
        """
        rows = self.log_probs(features)
        if width is None:
            return [best_path(row.unsqueeze(0))[0] for row in rows]
        return [prefix_beam_search(row, width)[0][0] for row in rows]


def frames_out(lengths: Tensor) -> Tensor:
    """Return how many frames the head gives for so many, both int64."""
    return (lengths.clamp(min=KERNEL) - KERNEL) // STRIDE + 1


def frames_needed(target: Tensor) -> int:
    """Return the frames that a target (n,) takes: one a phone, and a blank between equal ones."""
    return len(target) + int((target[1:] == target[:-1]).sum())


def train_ctc(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    phones: int,
    *,
    lstm: bool = False,
    epochs: int = 30,
    batch: int = 8,
    lr: float = 2e-4,
    standardise: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    step: Callable[[], None] | None = None,
) -> CtcProbe:
    """Train a head; the defaults are Libri-light's.

    Args:
        features: (S, D) of each utterance.
        targets: (n,) int64 of each, phones from 0 to P - 1, at least one.
        phones: P.
        lstm: See `CtcHead`.
        epochs: Passes over the utterances.
        batch: Utterances a step.
        lr: Learning rate of Adam.
        standardise: Whether the head brings each dimension to mean 0 and deviation 1 first, by what
            it sees in training.
        seed: For the initial weights and the order of utterances.
        device: Where to train; that of the features if None.
        step: Called after each epoch, for progress.

    Raises:
        InputError: Features and targets do not fit, a target is empty, or all are impossible.
    """
    lengths = _check(features, targets, phones)
    needed = torch.tensor([frames_needed(target) for target in targets])
    impossible = tuple(torch.nonzero(frames_out(lengths) < needed).flatten().tolist())
    if len(impossible) == len(targets):
        raise InputError(
            f"no utterance has frames enough for its phones: CTC takes one of {STRIDE} frames; "
            "give features of a higher rate"
        )
    place = features[0].device if device is None else torch.device(device)
    dim = features[0].shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        head = CtcHead(dim, phones, lstm=lstm)
    if standardise:
        mean, spread = moments(features)
        head.mean.copy_(mean)
        head.spread.copy_(spread)
    head.to(place).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    possible = len(targets) - len(impossible)
    losses = []
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).tolist()
        total = torch.zeros((), device=place)
        for i in range(0, len(order), batch):
            rows = order[i : i + batch]
            x = pad_sequence([features[j].to(place).float() for j in rows], batch_first=True)
            out, ends = head(x, lengths[rows])
            own = [targets[j] for j in rows]
            sizes = torch.tensor([len(target) for target in own])
            each = ctc_loss(
                out.transpose(0, 1),
                torch.cat(own).to(place),
                ends,
                sizes,
                blank=phones,
                reduction="none",
                zero_infinity=True,
            )
            each = each / sizes.to(place)
            optimizer.zero_grad(set_to_none=True)
            each.mean().backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
            total += each.detach().sum()
        losses.append(total / possible)
        if step is not None:
            step()
    return CtcProbe(head.eval(), torch.stack(losses).cpu(), impossible)


def _check(features: Sequence[Tensor], targets: Sequence[Tensor], phones: int) -> Tensor:
    if len(features) != len(targets) or not features:
        raise InputError(
            f"{len(features)} features and {len(targets)} targets: give both for each utterance"
        )
    for i, (x, target) in enumerate(zip(features, targets, strict=True)):
        if x.ndim != 2 or not len(x) or x.shape[1] != features[0].shape[1]:
            raise InputError(
                f"utterance {i}: features {tuple(x.shape)}; give (S, D), D the same for all"
            )
        if target.ndim != 1 or not len(target):
            raise InputError(f"utterance {i}: has no phones; leave it out")
        if int(target.min()) < 0 or int(target.max()) >= phones:
            raise InputError(f"utterance {i}: phones must be 0 to {phones - 1}")
    return torch.tensor([len(x) for x in features])
