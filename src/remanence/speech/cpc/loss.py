"""The contrastive loss of CPC (arXiv 1807.03748, eq. 4; arXiv 2002.02848, Section 3).

The score of a candidate frame z under a prediction p is their mean product, p . z / H. For each
step k the loss is the cross-entropy of the true frame among the true one and the negatives.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from remanence.errors import InputError

Candidates = Literal["sampled", "all"]
Scope = Literal["local", "global"]
# Numbers held at a time: of gathered frames (on a processor, what its cache holds), of scores.
GATHERED, GATHERED_GPU = 2**19, 2**26
TABLE, TABLE_GPU = 2**22, 2**26


class CPCLoss(nn.Module):
    """Cross-entropy of the true frame among negatives, for each step.

    For each position (b, t) the negatives are drawn once, for all K steps: the window uniformly,
    the frame (t + r) mod S with r uniform in 1..S-1. That is never frame t, but it may be the true
    frame, with probability 1 / (B (S - 1)) a draw. As all steps share them, a position's negatives
    are gathered once, for a few positions at a time, and gathered again for the gradient: time
    grows as B, memory hardly.

    Chance is ln(1 + negatives) a step. With `candidates="all"` the negatives are all frames of the
    batch but the K true ones of the position: no noise from drawing, and chance is the larger
    ln(B S - K + 1), which grows with the batch; losses compare only at equal B and S. All scores
    are then computed, for a few positions at a time, and again for the gradient: time grows as B^2.

    Args:
        steps: Steps K.
        negatives: Draws N for each position.
        exclude_positive: Leave out draws of the true frame, rather than count them as negatives.
        candidates: `sampled` or `all`.
        scope: `local`, or `global` to take negatives from the windows of all processes of the
            default group, which must hold as many each. Gradients reach the other processes'
            frames; their mean over processes, as DistributedDataParallel takes it, is that of one
            process holding all windows. Where processes hold different speakers, negatives do.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        steps: int = 12,
        negatives: int = 128,
        *,
        exclude_positive: bool = False,
        candidates: Candidates = "sampled",
        scope: Scope = "local",
    ) -> None:
        super().__init__()
        if steps < 1 or negatives < 1:
            raise InputError(f"{steps} steps, {negatives} negatives: give at least 1 of each")
        if candidates not in get_args(Candidates):
            raise InputError(f"candidates {candidates!r}: give one of {get_args(Candidates)}")
        if scope not in get_args(Scope):
            raise InputError(f"scope {scope!r}: give one of {get_args(Scope)}")
        self.steps, self.negatives, self.exclude_positive = steps, negatives, exclude_positive
        self.candidates, self.scope = candidates, scope

    def forward(
        self, predictions: Tensor, z: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the accuracy of each step, in float32 inside autocast too.

        Args:
            predictions: (B, W, K, H): entry (b, t, k) predicts frame t + k + 1 of window b, counted
                from 0. W is at most S - K.
            z: Frames (B, S, H).
            generator: For the draws, on any device; give each process its own. None takes torch's.

        Returns:
            losses: (K,), mean over positions, float32 (float64 where z is). What trains is the sum.
            accuracies: (K,), share of positions whose true frame scores above all negatives: a tie
                is wrong. A draw of the true frame itself is no rival. Without gradient.

        Raises:
            InputError: The shapes do not fit each other.
        """
        self._check(predictions, z)
        with torch.autocast(z.device.type, enabled=False):
            precision = torch.promote_types(z.dtype, torch.float32)
            predictions, z = predictions.to(precision), z.to(precision)
            windows, width = predictions.shape[:2]
            everyone, first = z, 0
            if self.scope == "global":
                gather: Any = _AllGather.apply  # torch gives it no types
                everyone, first = gather(z).flatten(0, 1), dist.get_rank() * windows
            t = torch.arange(width, device=z.device).repeat(windows)
            window = torch.arange(first, first + windows, device=z.device).repeat_interleave(width)
            ahead = torch.arange(1, self.steps + 1, device=z.device)
            true = (window * z.shape[1] + t).unsqueeze(1) + ahead  # (B W, K), of all frames
            rows, frames = predictions.flatten(0, 1), everyone.flatten(0, 1)
            if self.candidates == "all":
                positive, others, rival = _among_all(rows, frames, true)
            else:
                drawn = self._draw(t, len(everyone), z.shape[1], generator)
                positive, others, rival = self._among_drawn(rows, frames, true, drawn)
            losses = torch.logaddexp(positive, others) - positive
            return losses.mean(0), (positive > rival).to(precision).mean(0)

    def _check(self, predictions: Tensor, z: Tensor) -> None:
        if (
            predictions.ndim != 4
            or z.ndim != 3
            or predictions.shape[2] != self.steps
            or (len(predictions), predictions.shape[3]) != (len(z), z.shape[2])
            or not predictions.numel()
            or predictions.shape[1] + self.steps > z.shape[1]
        ):
            raise InputError(
                f"predictions {tuple(predictions.shape)} of frames {tuple(z.shape)}: give "
                f"(B, W, {self.steps}, H) and (B, S, H) with W at most S - {self.steps}"
            )

    def _draw(
        self, t: Tensor, windows: int, length: int, generator: torch.Generator | None
    ) -> Tensor:
        """Return indices of frames (B W, N), counted over all windows."""
        device = t.device if generator is None else generator.device
        shape = (len(t), self.negatives)
        window = torch.randint(windows, shape, generator=generator, device=device)
        offset = torch.randint(1, length, shape, generator=generator, device=device)
        window, offset = (x.to(t.device, non_blocking=True) for x in (window, offset))
        return window * length + (t.unsqueeze(1) + offset) % length

    def _among_drawn(
        self, rows: Tensor, frames: Tensor, true: Tensor, drawn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B W, K) each: score of the true frame, log-sum-exp and maximum of the others."""
        apply: Any = _Products.apply  # torch gives it no types
        scores = apply(rows, frames, torch.cat([true, drawn], dim=1)) / rows.shape[2]
        positive = scores[:, :, : self.steps].diagonal(dim1=1, dim2=2)
        negative = scores[:, :, self.steps :]
        itself = drawn.unsqueeze(1) == true.unsqueeze(2)
        rival = negative.detach().masked_fill(itself, -torch.inf).amax(2)
        if self.exclude_positive:
            negative = negative.masked_fill(itself, -torch.inf)
        return positive, negative.logsumexp(2), rival


def _among_all(rows: Tensor, frames: Tensor, true: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `CPCLoss._among_drawn`, with all frames but the row's own true ones."""
    products: Any = _Products.apply
    others: Any = _Others.apply
    positive = (products(rows, frames, true) / rows.shape[2]).diagonal(dim1=1, dim2=2)
    return positive, *others(rows, frames, true)


class _Products(torch.autograd.Function):
    """Products (n, K, M) of rows (n, K, H) with their own M of the frames (F, H).

    What was gathered is not kept: backward gathers it again.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, frames: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(rows, frames, index)
        products = rows.new_empty(*rows.shape[:2], index.shape[1])
        for part in _parts(rows, index):
            gathered = _gathered(frames, index[part])
            torch.bmm(rows[part], gathered.transpose(1, 2), out=products[part])
        return products

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (rows, frames, index) = grads, ctx.saved_tensors
        of_rows, of_frames = torch.empty_like(rows), torch.zeros_like(frames)
        with torch.autocast(rows.device.type, enabled=False):
            for part in _parts(rows, index):
                torch.bmm(grad[part], _gathered(frames, index[part]), out=of_rows[part])
                of_gathered = torch.bmm(grad[part].transpose(1, 2), rows[part])
                of_frames.index_add_(0, index[part].flatten(), of_gathered.flatten(0, 1))
        return of_rows, of_frames, None


def _parts(rows: Tensor, index: Tensor) -> list[slice]:
    most = GATHERED_GPU if rows.is_cuda else GATHERED
    size = max(most // (index.shape[1] * rows.shape[2]), 1)
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _gathered(frames: Tensor, index: Tensor) -> Tensor:
    return frames.index_select(0, index.flatten()).view(*index.shape, -1)


class _Others(torch.autograd.Function):
    """Log-sum-exp and maximum (n, K) of the scores of rows (n, K, H) with all frames (F, H) but K.

    The scores are not kept: backward computes them again.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, frames: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
        found, most = (rows.new_empty(rows.shape[:2]) for _ in range(2))
        for part in _rows_at_a_time(rows, frames):
            scores = _scores(rows[part], frames, true[part])
            found[part], most[part] = scores.logsumexp(2), scores.amax(2)
        ctx.save_for_backward(rows, frames, true, found)
        ctx.mark_non_differentiable(most)
        return found, most

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, frames, true, found = ctx.saved_tensors
        of_rows, of_frames = torch.empty_like(rows), torch.zeros_like(frames)
        scale = (grads[0] / rows.shape[2]).unsqueeze(2)
        with torch.autocast(rows.device.type, enabled=False):
            for part in _rows_at_a_time(rows, frames):
                scores = _scores(rows[part], frames, true[part])
                weights = scores.sub_(found[part].unsqueeze(2)).exp_().mul_(scale[part])
                of_rows[part] = weights @ frames
                of_frames.addmm_(weights.flatten(0, 1).T, rows[part].flatten(0, 1))
        return of_rows, of_frames, None


def _rows_at_a_time(rows: Tensor, frames: Tensor) -> list[slice]:
    size = max((TABLE_GPU if rows.is_cuda else TABLE) // (rows.shape[1] * len(frames)), 1)
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _scores(rows: Tensor, frames: Tensor, true: Tensor) -> Tensor:
    """Return (n, K, F), -inf at the true frames of all steps."""
    scores = (rows.flatten(0, 1) @ frames.T).view(*rows.shape[:2], -1).div_(rows.shape[2])
    return scores.scatter_(2, true.unsqueeze(1).expand(-1, rows.shape[1], -1), -torch.inf)


class _AllGather(torch.autograd.Function):
    """Stack the equally large tensors of all processes; backward sums what all did with them."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank()]
