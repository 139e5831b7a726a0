"""Devices, precision and processes: how a job asks Lightning Fabric for them."""

from __future__ import annotations

import os
import platform
import random
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from remanence.errors import InputError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]


def launch(devices: int = 1, precision: Precision = "auto", accelerator: str = "auto") -> Fabric:
    """Start the processes of a job.

    Under `torchrun` or SLURM the processes are there already and join; otherwise `devices` of them
    are started on this machine.

    Args:
        devices: Processes on this machine, one device each.
        precision: `auto` is bf16-mixed on a GPU that has it, else 32-true.
        accelerator: `cpu`, `cuda` or `auto`.

    Returns:
        The launched Fabric.

    Raises:
        InputError: The devices asked for are not there.
    """
    from lightning_fabric import Fabric

    world = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    if world > 1:
        devices, nodes = local, world // local
    else:
        nodes = int(os.environ.get("SLURM_NNODES", "1")) if devices > 1 else 1
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is none here; take cpu")
    there = torch.cuda.device_count() if accelerator == "cuda" else os.cpu_count() or 1
    if world == 1 and not 1 <= devices <= there:
        kind = "CUDA devices" if accelerator == "cuda" else "processor cores"
        raise InputError(f"--devices {devices}: this machine has {there} {kind}")
    if precision == "auto":
        bf16 = accelerator == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16-mixed" if bf16 else "32-true"
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy="ddp" if devices * nodes > 1 else "auto",
        precision=precision,
    )
    # Sizes repeat for thousands of steps, so trying cuDNN's algorithms once pays.
    torch.backends.cudnn.benchmark = accelerator == "cuda"
    fabric.launch()
    return fabric


def sum_over_processes(fabric: Fabric, tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes, on each of them."""
    summed = fabric.all_reduce(tensor.to(fabric.device), reduce_op="sum")
    assert isinstance(summed, torch.Tensor)
    return summed


def seed_all(*numbers: int) -> None:
    """Seed Python, NumPy and torch from a tuple of numbers.

    A step that is seeded by (seed, step) draws the same numbers whether the run was interrupted
    before it or not: nothing random needs to be kept in a checkpoint.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # timm's mixup draws from the global generator
    # torch.manual_seed formats a stack trace for every backend that has not been started.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("torchvision", "timm", "lightning-fabric")
    return {
        "remanence": version("remanence"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, which the package's version lacks
        **{name: version(name) for name in packages},
    }


def device_name() -> str:
    """Return the name of the device that `auto` would choose."""
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return f"cpu ({torch.get_num_threads()} threads)"
