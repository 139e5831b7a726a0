"""Reference models, trained on known subsets of the samples, many at once.

Attacks that set a threshold per sample (arXiv 1908.11229, Section 4.2, and all that came after)
ask what the audited model would say of a sample had it, or had it not, been trained on it.
References answer: models of the same architecture on the subsets of a design.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, cos, pi
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import safetensors.torch
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from remanence.audit.membership.designs import check_design
from remanence.errors import InputError

Schedule = Literal["cosine", "constant"]
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class ReferencePool:
    """K trained models of one architecture and the samples they were trained on.

    Attributes:
        skeleton: A module of the architecture; its own weights are not used.
        parameters: Parameters by name, each stacked to (K, ...).
        buffers: Buffers by name, each stacked to (K, ...).
        design: (K, N) bool.
    """

    skeleton: nn.Module
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    design: NDArray[np.bool_]

    @classmethod
    def from_models(cls, models: Sequence[nn.Module], design: ArrayLike) -> "ReferencePool":
        """Stack trained models of one architecture.

        Raises:
            InputError: the models differ in parameters, or the design is not (K, N) bool.
        """
        mask = check_design(design)
        if len(models) != len(mask):
            raise InputError(
                f"{len(models)} models for {len(mask)} rows of the design: give one each"
            )
        shapes = [{n: (v.shape, v.dtype) for n, v in _tensors(model)} for model in models]
        if any(shape != shapes[0] for shape in shapes):
            raise InputError("the models differ in parameters: give models of one architecture")
        return cls(copy.deepcopy(models[0]).eval(), *_stack(models), mask)

    def __len__(self) -> int:
        return len(self.design)

    def model(self, k: int) -> nn.Module:
        """Model k as a module of its own, in evaluation mode."""
        model = copy.deepcopy(self.skeleton).eval()
        with torch.no_grad():
            for name, value in _tensors(model):
                value.data = {**self.parameters, **self.buffers}[name][k].clone()
        return model

    @torch.no_grad()
    def logits(
        self, images: Tensor, batch: int = 1024, prepare: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Outputs (K, N, C) in float32 on the CPU for images (N, ...), in evaluation mode.

        Args:
            images: as given to `train_references`, on any device.
            batch: images at a time.
            prepare: from raw images (B, ...) to the models' input.
        """
        device = next(iter(self.parameters.values())).device
        skeleton = copy.deepcopy(self.skeleton).eval()
        rows: list[list[Tensor]] = [[] for _ in self.design]
        for chunk in torch.split(images, batch):
            x = chunk.to(device) if prepare is None else prepare(chunk.to(device))
            for k, row in enumerate(rows):
                state = {n: v[k] for n, v in (self.parameters | self.buffers).items()}
                row.append(functional_call(skeleton, state, (x,)).float().cpu())
        return torch.stack([torch.cat(row) for row in rows])

    def save(self, file: str | Path) -> None:
        """Write one safetensors file; the architecture is not in it."""
        tensors = {f"parameters/{name}": value for name, value in self.parameters.items()}
        tensors |= {f"buffers/{name}": value for name, value in self.buffers.items()}
        tensors["design"] = torch.from_numpy(self.design)
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        safetensors.torch.save_file(tensors, file)

    @classmethod
    def load(
        cls, file: str | Path, make_model: Callable[[], nn.Module], device: str = "cpu"
    ) -> "ReferencePool":
        """Read what `save` wrote.

        Raises:
            InputError: it is not a pool, or not of this architecture.
        """
        try:
            tensors = safetensors.torch.load_file(file, device=device)
            design = tensors.pop("design").cpu().numpy()
        except (safetensors.SafetensorError, KeyError) as error:
            raise InputError(
                f"{file} is not a reference pool: give one that `save` wrote"
            ) from error
        parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "buffers": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = value
        skeleton = make_model().eval()
        expected = {name: (len(design), *value.shape) for name, value in _tensors(skeleton)}
        found = {n: tuple(v.shape) for n, v in (parts["parameters"] | parts["buffers"]).items()}
        wrong = sorted(n for n in expected | found if expected.get(n) != found.get(n))
        if wrong:
            raise InputError(f"{file} and the model differ in {wrong[0]}: give its architecture")
        return cls(skeleton, parts["parameters"], parts["buffers"], design)


def train_references(
    make_model: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    design: ArrayLike,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: Schedule = "cosine",
    prepare: Callable[[Tensor], Tensor] | None = None,
    augment: Augment | None = None,
    vectorize: Literal["auto"] | bool = "auto",
    chunk_size: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> ReferencePool:
    """Train one model on each row of a design by SGD on the cross-entropy, K models at once.

    Every model takes the same number of steps an epoch, the mean training set size over the batch
    size, rounded up, all of full batches. Its images come from a stream of its own that joins one
    shuffle of its training set after the other; an epoch ends where it ends in the stream. So a
    small set is passed over a little more often than a large one. Initial weights, order and
    augmentation of model k depend on `seed` and k alone, whether models are trained together or
    one by one; dropout is independent between models, but not the same in the two ways.

    Together, all K models are one vmapped computation. On one CPU thread, 16 models: a 64-128-10
    perceptron was 1.5 times (batch 64) to 2.7 times (batch 8) as fast as one by one, a
    two-layer convolutional network 2 to 4 times at batch 4 to 8 of small images and 0.5 to 0.6
    times at 64 of 16 x 16. `auto` therefore trains together, except on a CPU where a network with
    convolutions sees more than 8,192 input values a batch.

    Args:
        make_model: builds a freshly initialised model; called K times.
        images: (N, ...) floats, or uint8 with `prepare`; moved to the device as a whole.
        labels: (N,) int64 classes.
        design: (K, N) bool.
        epochs: number of epochs, as above.
        batch_size: images a step and model.
        lr: learning rate at the start.
        momentum: of SGD.
        weight_decay: of SGD, on every parameter.
        schedule: `cosine` falls to 0 over the run, step by step; `constant` stays.
        prepare: from images (B, ...) of one batch to floats.
        augment: from prepared images (B, ...) of one model, and that model's generator on the
            device, to the network's input.
        vectorize: together (True), one by one (False), or `auto`.
        chunk_size: at most so many models together; bounds memory and, dropout aside, changes no
            result.
        seed: of everything.
        device: by default that of `images`.
        progress: called as (model-epochs done, model-epochs in all, mean loss of the last epoch).

    Raises:
        InputError: shapes, labels or options do not fit, or the loss is not finite.
    """
    mask = check_design(design)
    K, N = mask.shape
    if len(images) != N or labels.shape != (N,):
        raise InputError(
            f"{len(images)} images and labels of shape {tuple(labels.shape)} for a design of {N} "
            "samples: give one of each for every sample"
        )
    if labels.is_floating_point() or (labels < 0).any():
        raise InputError("labels are not classes: give integers from 0, not one-hot rows")
    if schedule not in get_args(Schedule):
        raise InputError(f"schedule {schedule!r} is unknown: give one of {get_args(Schedule)}")
    if min(epochs, batch_size, 1 if chunk_size is None else chunk_size) < 1 or not lr > 0:
        raise InputError("epochs, batch_size, chunk_size or lr is not positive: give positive ones")
    target = images.device if device is None else torch.device(device)
    images, labels = images.to(target), labels.to(target)
    steps = ceil(mask.sum() / K / batch_size)
    rates = [
        lr * (0.5 * (1 + cos(pi * t / (epochs * steps))) if schedule == "cosine" else 1.0)
        for t in range(epochs * steps)
    ]
    done = 0

    def batches(k: int) -> Iterator[tuple[Tensor, Tensor]]:
        noise = torch.Generator(target).manual_seed(_seed(seed, k, 2))
        for index in _stream(np.flatnonzero(mask[k]), batch_size, _seed(seed, k, 1)):
            at = index.to(target)
            x = images[at] if prepare is None else prepare(images[at])
            yield (x if augment is None else augment(x, noise)), labels[at]

    def report(models: int, loss: float) -> None:
        nonlocal done
        done += models
        if not np.isfinite(loss):
            raise InputError("a reference's loss is not finite: lower lr or check the images")
        if progress is not None:
            progress(done, K * epochs, loss)

    trained: list[nn.Module] = []
    devices = [target] if target.type == "cuda" else []
    with torch.random.fork_rng(devices):  # initialisation and dropout draw from the global one
        models = []
        for k in range(K):
            torch.manual_seed(_seed(seed, k, 0))
            models.append(make_model().to(target).train())
        if vectorize == "auto":
            vectorize = _together_is_faster(models[0], images, batch_size)
        size = (chunk_size or K) if vectorize else 1
        for start in range(0, K, size):
            torch.manual_seed(_seed(seed, start, 3))
            chunk = models[start : start + size]
            streams = [batches(k) for k in range(start, start + len(chunk))]
            train = _train_together if vectorize else _train_alone
            train(chunk, streams, rates, steps, momentum, weight_decay, report)
            trained.extend(model.eval() for model in chunk)
    return ReferencePool.from_models(trained, mask)


def _train_alone(
    models: Sequence[nn.Module],
    streams: Sequence[Iterator[tuple[Tensor, Tensor]]],
    rates: Sequence[float],
    steps: int,
    momentum: float,
    weight_decay: float,
    report: Callable[[int, float], None],
) -> None:
    (model,), (stream,) = models, streams
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rates[0], momentum=momentum, weight_decay=weight_decay
    )
    for epoch in range(len(rates) // steps):
        total = 0.0
        for rate in rates[epoch * steps : (epoch + 1) * steps]:
            optimizer.param_groups[0]["lr"] = rate
            x, y = next(stream)
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.item()
        report(1, total / steps)


def _train_together(
    models: Sequence[nn.Module],
    streams: Sequence[Iterator[tuple[Tensor, Tensor]]],
    rates: Sequence[float],
    steps: int,
    momentum: float,
    weight_decay: float,
    report: Callable[[int, float], None],
) -> None:
    skeleton = models[0]
    stacked, buffers = _stack(models)
    free = {name for name, value in skeleton.named_parameters() if value.requires_grad}
    parameters = {name: value for name, value in stacked.items() if name in free}
    frozen = {name: value for name, value in stacked.items() if name not in free}
    velocity = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def loss_of_one(
        p: dict[str, Tensor], f: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # BatchNorm updates its statistics in place: on copies, which are handed back.
        b = {name: value.clone() for name, value in b.items()}
        return nn.functional.cross_entropy(functional_call(skeleton, (p, f, b), (x,)), y), b

    step = vmap(grad_and_value(loss_of_one, has_aux=True), randomness="different")
    for epoch in range(len(rates) // steps):
        total = torch.zeros(())
        for rate in rates[epoch * steps : (epoch + 1) * steps]:
            drawn = [next(stream) for stream in streams]
            x, y = (torch.stack(part) for part in zip(*drawn, strict=True))
            gradients, (loss, buffers) = step(parameters, frozen, buffers, x, y)
            for name, value in parameters.items():
                gradient = gradients[name].add(value, alpha=weight_decay)
                velocity[name].mul_(momentum).add_(gradient)
                value.sub_(velocity[name], alpha=rate)
            total = total.to(loss.device) + loss.mean()
        report(len(models), total.item() / steps)
    with torch.no_grad():
        for k, model in enumerate(models):
            for name, value in _tensors(model):
                value.copy_((stacked | buffers)[name][k])


def _stream(members: NDArray[np.int64], batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches of indices (B,) from one shuffle after the other, without end."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.from_numpy(members)
    rest = own[:0]
    while True:
        while len(rest) < batch_size:
            rest = torch.cat([rest, own[torch.randperm(len(own), generator=generator)]])
        yield rest[:batch_size]
        rest = rest[batch_size:]


def _together_is_faster(model: nn.Module, images: Tensor, batch_size: int) -> bool:
    if images.device.type != "cpu":
        return True
    convolves = any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in model.modules())
    return not convolves or batch_size * images[0].numel() <= 8192


def _seed(seed: int, k: int, purpose: int) -> int:
    return int(np.random.SeedSequence([seed, k, purpose]).generate_state(1)[0])


def _stack(models: Sequence[nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers of models, each (K, ...) by name."""
    parts = [
        [{name: value.detach() for name, value in named(model)} for model in models]
        for named in (nn.Module.named_parameters, nn.Module.named_buffers)
    ]
    parameters, buffers = (
        {name: torch.stack([own[name] for own in part]) for name in part[0]} for part in parts
    )
    return parameters, buffers


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
