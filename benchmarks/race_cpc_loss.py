"""Race of the loss of contrastive predictive coding (arXiv 2002.02848, 2007.00991).

Forward and backward, of made predictions and frames in the shapes of the presets' training. Ours
gathers a position's negatives once for all steps, a few positions at a time; `products` multiplies
all predictions with all frames of the batch and picks the scores; `gather once` gathers as ours
does, all at a time, through autograd; `gather each step` puts the true frame and the negatives'
vectors together for every step anew, as the released code does. All have the same draws: losses
and gradients must differ by at most 1e-5. `peak, MB` is the most memory that one lap takes over
what was there, the gradients included: resident on the processor (Linux), allocated on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import harness
from remanence.speech.cpc.loss import CPCLoss

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    Method = Callable[[Tensor, Tensor, Tensor], Tensor]

TOLERANCE = 1e-5
SHAPES = {"small": (90, 8, 48, 64), "cpc2": (128, 12, 256, 128)}  # S, K, H, N


def products(predictions: Tensor, z: Tensor, drawn: Tensor) -> Tensor:
    """Score all frames of the batch, then pick (B, W, K, 1 + N)."""
    windows, width, steps, hidden = predictions.shape
    scores = predictions.flatten(0, 2) @ z.flatten(0, 1).T / hidden
    scores = scores.view(windows * width, steps, -1)
    negatives = drawn.unsqueeze(1).expand(-1, steps, -1)
    index = torch.cat([truth(predictions, z).unsqueeze(2), negatives], dim=2)
    return entropies(scores.gather(2, index))


def gather_once(predictions: Tensor, z: Tensor, drawn: Tensor) -> Tensor:
    """Gather (B W, K + N, H) and multiply."""
    steps, hidden = predictions.shape[2:]
    index = torch.cat([truth(predictions, z), drawn], dim=1)
    frames = z.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, hidden)
    scores = predictions.flatten(0, 1) @ frames.transpose(1, 2) / hidden
    positive = scores[:, :, :steps].diagonal(dim1=1, dim2=2).unsqueeze(2)
    return entropies(torch.cat([positive, scores[:, :, steps:]], dim=2))


def gather_each_step(predictions: Tensor, z: Tensor, drawn: Tensor) -> Tensor:
    """Gather negatives (B W, N, H), join them with the true frame of each step."""
    rows, frames = predictions.flatten(0, 1), z.flatten(0, 1)
    negatives = frames[drawn]
    losses = []
    for step, true in enumerate(truth(predictions, z).T):
        candidates = torch.cat([frames[true].unsqueeze(1), negatives], dim=1)
        scores = (rows[:, step].unsqueeze(1) * candidates).mean(2)
        losses.append(entropies(scores.unsqueeze(1)))
    return torch.cat(losses)


def truth(predictions: Tensor, z: Tensor) -> Tensor:
    """Return the true frames' indices (B W, K)."""
    windows, width, steps, _ = predictions.shape
    t = torch.arange(windows, device=z.device).unsqueeze(1) * z.shape[1]
    t = t + torch.arange(width, device=z.device)
    return t.flatten().unsqueeze(1) + torch.arange(1, steps + 1, device=z.device)


def entropies(scores: Tensor) -> Tensor:
    """Return (K,) from (B W, K, 1 + N), the true frame first."""
    first = torch.zeros(scores.shape[0], dtype=torch.long, device=scores.device)
    return torch.stack([cross_entropy(scores[:, k], first) for k in range(scores.shape[1])])


def ours(predictions: Tensor, z: Tensor, drawn: Tensor) -> Tensor:
    """Run CPCLoss with the given draws."""
    loss = CPCLoss(predictions.shape[2], drawn.shape[1])
    loss._draw = lambda *_: drawn  # type: ignore[method-assign]  # noqa: SLF001 - one draw for all
    losses: Tensor = loss(predictions, z)[0]
    return losses


CONTESTANTS: dict[str, Method] = {
    "ours": ours,
    "products": products,
    "gather once": gather_once,
    "gather each step": gather_each_step,
}


def run(method: Method, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Return the losses and both gradients."""
    losses = method(*inputs)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), inputs[:2])]


def lap(method: Method, inputs: tuple[Tensor, Tensor, Tensor], peak: float) -> harness.Lap:
    """Run once, by the clock on the wall."""
    began = time.perf_counter()
    run(method, inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return harness.Lap(1, seconds, {"ms": 1e3 * seconds, "peak, MB": peak})


def peak(method: Method, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Return the most memory that a run takes, in MB."""
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(method, inputs)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak
    before = resident("VmRSS")
    run(method, inputs)
    return (resident("VmHWM") - before) / 1e6


def resident(key: str) -> int:
    """Read `VmRSS`, or `VmHWM` (the peak), in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    """Compare losses and gradients, then race."""
    options = harness.parser(__doc__)
    options.set_defaults(rounds=5, threads=1)
    options.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options.add_argument("--windows", type=int, nargs="+", default=[8], help="windows of a batch")
    options.add_argument(
        "--peers", nargs="+", choices=list(CONTESTANTS)[1:], default=list(CONTESTANTS)[1:]
    )
    asked: argparse.Namespace = options.parse_args()
    facts = harness.environment(["torch"], asked.threads)
    cuda = asked.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(asked.threads)

    races = []
    for shape in asked.shapes:
        for windows in asked.windows:
            frames, steps, hidden, negatives = SHAPES[shape]
            generator = torch.Generator().manual_seed(0)
            size = (windows, frames - steps, steps, hidden)
            predictions = torch.randn(*size, generator=generator).to(device).requires_grad_()
            z = torch.randn(windows, frames, hidden, generator=generator).relu().to(device)
            t = torch.arange(frames - steps).repeat(windows)
            drawn = CPCLoss(steps, negatives)._draw(t, windows, frames, generator)  # noqa: SLF001 - one draw for all
            inputs = (predictions, z.requires_grad_(), drawn.to(device))
            expected = run(ours, inputs)
            laps, most = {}, 0.0
            for name in ["ours", *asked.peers]:
                found = run(CONTESTANTS[name], inputs)
                gaps = [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]
                most = max(most, *gaps)
                del found
                memory = peak(CONTESTANTS[name], inputs)
                laps[name] = partial(lap, CONTESTANTS[name], inputs, memory)
            if not most <= TOLERANCE:
                raise SystemExit(f"{shape}: largest difference {most:.1e}, above {TOLERANCE:g}")
            title = f"{shape}, {windows} windows, losses and gradients differ by at most {most:.1e}"
            races.append(harness.race(title, laps, asked, unit="batches/s"))
    harness.finish(races, facts, asked)


if __name__ == "__main__":
    main()
