"""Race of the kernel descriptor of patches (arXiv 1811.11147).

Ours and kornia's `MKDDescriptor` describe the same patches, blurred noise of several sides and
batches; neither whitens. Their largest difference is printed and must be at most 1e-5. kornia's
RootSIFT, and HardNet for its cost alone, with weights of chance, give the scale: their vectors are
others. `peak / batch` is the most memory that one batch takes, the vectors included, over the
memory of the batch: what becomes resident on the processor (Linux), what is allocated on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from kornia.feature import HardNet, MKDDescriptor, SIFTDescriptor
from torch.nn.functional import avg_pool2d

import harness
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from torch import Tensor

TOLERANCE = 1e-5
HARDNET_SIDE = 32  # the only one that HardNet takes
PEERS = ("ours", "kornia MKD")


def patches(count: int, size: int, device: torch.device) -> Tensor:
    """Return grey patches (N, 1, s, s) with texture at two scales."""
    noise = torch.rand(count, 1, size + 4, size + 4, generator=torch.Generator().manual_seed(0))
    return (0.7 * avg_pool2d(noise, 5, stride=1) + 0.3 * noise[..., 2:-2, 2:-2]).to(device)


def describer(name: str, size: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a contestant: patches (N, 1, s, s) to vectors (N, D)."""
    if name == "ours":
        ours = KernelDescriptor()
        return lambda batch: ours(batch).vectors
    if name == "kornia MKD":
        # Its annotation lacks the None that its documentation names.
        peer = MKDDescriptor(size, kernel_type="concat", whitening=None)  # type: ignore[arg-type]
        return peer.to(device)
    if name == "kornia RootSIFT":
        return SIFTDescriptor(size, rootsift=True).to(device)
    return HardNet(pretrained=False).to(device).eval()


def lap(
    describe: Callable[[Tensor], Tensor], batch: Tensor, repeats: int, peak: float
) -> harness.Lap:
    """Describe a batch several times, by the clock on the wall."""
    with torch.no_grad():
        began = time.perf_counter()
        for _ in range(repeats):
            describe(batch)
        if batch.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    done = len(batch) * repeats
    return harness.Lap(done, seconds, {"ms a patch": 1e3 * seconds / done, "peak / batch": peak})


def peak(describe: Callable[[Tensor], Tensor], batch: Tensor) -> float:
    """Return the most memory that a described batch takes over that of the batch."""
    with torch.no_grad():
        describe(batch)  # tables and libraries are loaded
        if batch.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            describe(batch)
            used = torch.cuda.max_memory_allocated() - before
        else:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak
            before = resident("VmRSS")
            describe(batch)
            used = resident("VmHWM") - before
    return used / (batch.numel() * batch.element_size())


def resident(key: str) -> int:
    """Read `VmRSS`, or `VmHWM` (the peak), in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    """Compare the vectors, then race."""
    options = harness.parser(__doc__)
    options.set_defaults(rounds=11, warmup=1, threads=1)
    options.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 65], help="sides, pixels")
    options.add_argument("--batches", type=int, nargs="+", default=[32, 256, 1024])
    options.add_argument("--lap", type=int, default=256, help="patches a lap, at least one batch")
    asked: argparse.Namespace = options.parse_args()
    facts = harness.environment(["torch", "kornia"], asked.threads)
    cuda = asked.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(asked.threads)

    races = []
    for size in asked.sizes:
        for count in asked.batches:
            batch = patches(count, size, device)
            names = [*PEERS, "kornia RootSIFT", *["HardNet"] * (size == HARDNET_SIDE)]
            entered = {name: describer(name, size, device) for name in names}
            with torch.no_grad():
                found, theirs = (entered[name](batch) for name in PEERS)
            gap = float((found - theirs).abs().max())
            if not gap <= TOLERANCE:
                raise SystemExit(f"largest difference {gap:.1e}, above {TOLERANCE:g}")
            repeats = max(1, asked.lap // count)
            laps = {
                name: partial(lap, describe, batch, repeats, peak(describe, batch))
                for name, describe in entered.items()
            }
            title = f"{count} patches of {size} x {size}; ours - kornia MKD at most {gap:.1e}"
            races.append(harness.race(title, laps, asked, unit="patches/s"))
    harness.finish(races, facts, asked)


if __name__ == "__main__":
    main()
