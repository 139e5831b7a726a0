"""Calibration batches: how a network is run on them, and how far two networks disagree there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

from remanence.errors import InputError
from remanence.modes import evaluating

# A tensor is the network's one argument, a tuple or list its arguments, a mapping its keywords.
Batch: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
Forward: TypeAlias = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Batch) -> object:
    """Run a network on a batch: the tensor, positional arguments, or keywords.

    Args:
        model: The network.
        batch: A tensor, a tuple or list of arguments, or a mapping of keyword arguments.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch)


def run(model: nn.Module, batch: Batch, forward: Forward | None) -> object:
    """Run a network on a batch that is moved to its device.

    Args:
        model: The network.
        batch: See `call`.
        forward: Runs the network on the batch instead of `call`.

    Raises:
        InputError: The forward raised.
    """
    device = device_of(model)
    try:
        return (forward or call)(model, move(batch, device))
    except InputError:
        raise
    except Exception as error:  # the network's own code raises what it likes
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"the model cannot run a calibration batch of {describe(batch)} "
            f"({type(error).__name__}: {reason}); give the model's inputs alone, in the size that "
            "it takes, or a `forward`"
        ) from error


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a network's first parameter or buffer."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def move(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [move(value, device) for value in batch]
    return batch


def tensors_of(batch: object) -> Iterator[Tensor]:
    """Yield the tensors of a batch."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from itertools.chain.from_iterable(map(tensors_of, batch.values()))
    elif isinstance(batch, list | tuple):
        yield from itertools.chain.from_iterable(map(tensors_of, batch))


def describe(batch: object) -> str:
    """Return the shapes of a batch's tensors in words."""
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_of(batch)]
    return f"shape {' and '.join(shapes)}" if shapes else f"type {type(batch).__name__}"


def items_in(batch: Batch) -> int:
    """Return the length of the first tensor of a batch."""
    first = next(tensors_of(batch))
    return len(first) if first.ndim else 1


def check_batches(batches: Iterable[Batch]) -> tuple[Iterable[Batch], list[int]]:
    """Look at every calibration batch once.

    Args:
        batches: Batches; an iterator that can be read only once is read into a list.

    Returns:
        The batches, which can be read again and again, and the items of each.

    Raises:
        InputError: There is no batch, or a batch is empty, holds no tensor, NaN or infinity.
    """
    again = list(batches) if isinstance(batches, Iterator) else batches
    items = []
    for index, batch in enumerate(again):
        tensors = list(tensors_of(batch))
        if not tensors or any(tensor.numel() == 0 for tensor in tensors):
            raise InputError(
                f"calibration batch {index} is empty ({describe(batch)}); leave it out"
            )
        if not all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point()):
            raise InputError(f"calibration batch {index} holds NaN or infinity; leave it out")
        items.append(items_in(batch))
    if not items:
        raise InputError("there is no calibration batch; give at least one")
    return again, items


def held_out(count: int) -> set[int]:
    """Return which of a rank's batches are held out: the last fifth of all ranks' batches.

    Rank r of n holds the batches r, r + n, r + 2 n, ... of the whole calibration set, so that the
    choice does not depend on the number of ranks.

    Args:
        count: Batches of this rank.

    Returns:
        Indices among this rank's batches; none where there is only one batch in all.
    """
    total = int(sum_over_ranks(torch.tensor(float(count))))
    first = total - math.ceil(total / 5) if total > 1 else total
    rank, ranks = rank_and_ranks()
    return {index for index in range(count) if index * ranks + rank >= first}


def pick(batches: Iterable[Batch], indices: set[int]) -> Iterator[Batch]:
    """Yield the batches at the indices."""
    return (batch for index, batch in enumerate(batches) if index in indices)


def logits_of(output: object) -> Tensor | None:
    """Return the logits in a network's output; None where there are none.

    Args:
        output: A tensor, an object or a mapping with `logits`, or a tuple that starts with a
            tensor.
    """
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    output = getattr(output, "logits", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) at temperature 1, the mean over items (section 3.3).

    Args:
        teacher: Logits (N, C), (N, T, C) for a sequence, or (N, C, H, W) for a map.
        student: Logits of the same shape.

    Returns:
        A scalar in nats, float32 or better; the gradient flows to the student alone.
    """
    axis = 1 if teacher.ndim >= 4 else -1
    precise = torch.promote_types(student.dtype, torch.float32)
    log_p = F.log_softmax(teacher.detach().to(precise), axis)
    log_q = F.log_softmax(student.to(precise), axis)
    return (log_p.exp() * (log_p - log_q)).sum(axis).mean()


@torch.no_grad()
def mean_kl(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[Batch],
    forward: Forward | None = None,
) -> float | None:
    """Return KL(teacher || student) over batches of all ranks, both networks in eval mode.

    Args:
        teacher: The float network.
        student: The network under test.
        batches: This rank's batches.
        forward: See `run`.

    Returns:
        Mean over items in nats; None where the output holds no logits or there is no batch.
    """
    total = torch.zeros(2, dtype=torch.float64)
    with evaluating(teacher), evaluating(student):
        for batch in batches:
            expected = logits_of(run(teacher, batch, forward))
            actual = logits_of(run(student, batch, forward))
            if expected is None or actual is None:
                continue
            kl = kl_divergence(expected, actual).double().cpu()
            total += torch.stack([kl, torch.ones_like(kl)]) * items_in(batch)
    divergence, items = sum_over_ranks(total).tolist()
    return divergence / items if items else None


def rank_and_ranks() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; itself where there is only one."""
    if rank_and_ranks()[1] == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's generators and restore them afterwards.

    Args:
        device: The network's device.
        seed: The seed.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
