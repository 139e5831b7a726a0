"""Training of a catalyzer: triplets mined anew, and KoLeo (arXiv 1806.03198, section 3).

The loss is L_rank + lambda L_koleo. Positives are neighbours in the space of the inputs, found
once; the negative is the vector at a fixed rank around the anchor in the space of the outputs,
which changes with the network and is found anew before each epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from remanence.errors import InputError
from remanence.search.catalyzer.mining import nearest_others
from remanence.search.catalyzer.triplet import rank_triplet_loss
from remanence.search.koleo import koleo_loss, koleo_of_uniform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from remanence.search.catalyzer.network import Catalyzer
    from remanence.search.lattice.code import SphericalCode

ROWS = 8192  # anchors whose neighbours are found at a time


@dataclass(frozen=True)
class Settings:
    """How a catalyzer is trained.

    Attributes:
        koleo: lambda, the weight of the KoLeo loss: the one setting that wants choosing.
        epochs: Passes over the training vectors.
        batch_size: Anchors of a step.
        lr: Largest learning rate of Adam; it falls to 0 along a cosine.
        positives: k_pos: a positive is drawn from so many nearest neighbours of the inputs.
        negative: k_neg: the rank of the negative among the neighbours of the outputs.
        pool: Vectors among which negatives are sought, drawn anew each epoch, at a rank that is
            smaller in proportion; all vectors where None.
        bfloat16: Run the hidden layers in bfloat16.
    """

    koleo: float = 0.02
    epochs: int = 40
    batch_size: int = 256
    lr: float = 2e-3
    positives: int = 10
    negative: int = 50
    pool: int | None = None
    bfloat16: bool = False


@dataclass(frozen=True)
class Epoch:
    """What an epoch showed, in means over its steps.

    Attributes:
        number: From 1.
        rank_loss: L_rank.
        koleo: L_koleo of the anchors of a step.
        koleo_of_uniform: What as many uniformly random vectors would give: less is no better.
        satisfied: Share of triplets that cost nothing.
    """

    number: int
    rank_loss: float
    koleo: float
    koleo_of_uniform: float
    satisfied: float


class Training:
    """The training of one catalyzer, an epoch at a time.

    Under `torch.distributed` each process takes its share of the anchors, mines against all
    vectors, and the gradients are averaged; KoLeo is local to a process, as batches are. So are the
    statistics of batch norm within an epoch; after it they are averaged, so that all processes
    always mine with, and end with, the same network.

    Args:
        catalyzer: The network, on its device; its standardisation is set here. All processes
            start from the weights of the first.
        vectors: Training vectors (n, in_dim), the same on every process; kept where they are.
        settings: How.
        codes: For each output dimension that has one, the code to train end to end with (section
            4): positives and negatives are quantised, straight through, anchors are not.
        seed: Of all draws. Weights are the caller's.

    Raises:
        InputError: A setting is out of range, a code has another dimension, or there are too few
            vectors, or unfit ones.
    """

    def __init__(
        self,
        catalyzer: Catalyzer,
        vectors: Tensor,
        settings: Settings,
        *,
        codes: Mapping[int, SphericalCode] | None = None,
        seed: int = 0,
    ) -> None:
        self.catalyzer, self.vectors, self.settings, self.seed = catalyzer, vectors, settings, seed
        self.codes = dict(codes or {})
        self.rank, self.world = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        _check(settings, len(vectors), self.world)
        for dim, code in self.codes.items():
            if dim not in catalyzer.dims or code.dim != dim:
                raise InputError(
                    f"a code of dimension {code.dim} for output {dim}: give codes for "
                    + ", ".join(map(str, catalyzer.dims))
                )
        catalyzer.initialise(vectors)
        if self.world > 1:
            for value in catalyzer.state_dict().values():
                dist.broadcast(value, 0)
        self.own = torch.arange(self.rank, len(vectors), self.world)  # this process's anchors
        self.steps = (len(vectors) // self.world) // settings.batch_size
        self.neighbours: Tensor | None = None  # (anchors, k_pos), of the inputs
        self.done = 0
        self.optimizer = torch.optim.Adam(catalyzer.parameters(), lr=settings.lr)

    def find_neighbours(self, progress: Callable[[int], None] | None = None) -> None:
        """Find the positives, once: exact, n^2 in_dim products.

        Args:
            progress: Called with a number of anchors when their neighbours are found, until it was
                told of all of `own`.
        """
        if self.neighbours is not None:
            return
        x = self.catalyzer.standardised(self.vectors.to(self.catalyzer.shift.device))
        found = []
        for own in torch.split(self.own.to(x.device), ROWS):
            found.append(nearest_others(x[own], own, x, self.settings.positives).cpu())
            if progress is not None:
                progress(len(own))
        self.neighbours = torch.cat(found)

    def epochs(self, step: Callable[[], None] | None = None) -> Iterator[Epoch]:
        """Train on, and yield after each epoch what it showed.

        Args:
            step: Called after each step.

        Yields:
            The epochs that are left.

        Raises:
            InputError: A loss or a weight is no longer finite.
        """
        self.find_neighbours()
        while self.done < self.settings.epochs:
            shown = self._epoch(step or (lambda: None))
            self.done += 1
            yield shown
        self.catalyzer.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return what an interrupted training needs to go on to the same weights."""
        return {
            "catalyzer": self.catalyzer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.catalyzer.load_state_dict(state["catalyzer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = int(state["done"])

    def negatives(self, generator: torch.Generator) -> Tensor:
        """Mine the negative of each anchor at each output dimension (anchors, dims), int64."""
        n, most = len(self.vectors), self.settings.pool
        pool = torch.arange(n)
        if most is not None and most < n:
            pool = torch.randperm(n, generator=generator)[:most].sort().values
        rank = max(round(self.settings.negative * len(pool) / n), 1)
        place = torch.full((n,), -1)
        place[pool] = torch.arange(len(pool))
        columns = []
        out = self._embed_all()
        for dim in self.catalyzer.dims:
            z = self.catalyzer.unit(out, dim)
            base = z[pool.to(z.device)]
            if dim in self.codes:
                base = self.codes[dim].straight_through(base)
            own = self.own.to(z.device)
            found = nearest_others(z[own], place[self.own].to(z.device), base, rank)[:, -1]
            columns.append(pool[found.cpu()])
        return torch.stack(columns, 1)

    def _embed_all(self) -> Tensor:
        """Return the outputs (n, dims[-1]) of all vectors: each process its own, then gathered."""
        n = len(self.vectors)
        device = self.catalyzer.shift.device
        mine = self.catalyzer.outputs(self.vectors[self.rank :: self.world]).to(device)
        if self.world == 1:
            return mine
        most = -(-n // self.world)
        parts = [mine.new_empty(most, mine.shape[1]) for _ in range(self.world)]
        dist.all_gather(parts, torch.cat([mine, mine.new_zeros(most - len(mine), mine.shape[1])]))
        return torch.stack(parts, 1).flatten(0, 1)[:n]  # rows were dealt out one by one

    def _epoch(self, step: Callable[[], None]) -> Epoch:
        settings, device = self.settings, self.catalyzer.shift.device
        negatives = self.negatives(self._generator(0))
        generator = self._generator(1 + self.rank)
        order = torch.randperm(len(self.own), generator=generator)
        assert self.neighbours is not None
        self.catalyzer.train()
        sums = torch.zeros(3, device=device)
        for number in range(self.steps):
            anchors = order[number * settings.batch_size : (number + 1) * settings.batch_size]
            drawn = torch.randint(settings.positives, (len(anchors),), generator=generator)
            positive = self.neighbours[anchors, drawn]
            rows = torch.cat([self.own[anchors], positive, negatives[anchors].T.flatten()])
            x = self.vectors[rows.to(self.vectors.device)].to(device, torch.float32)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
                out = self.catalyzer(x)
            rank_loss, koleo, satisfied = self._losses(out, len(anchors))
            self._step(rank_loss + settings.koleo * koleo, number)
            sums += torch.stack([rank_loss.detach(), koleo.detach(), satisfied])
            step()
        if self.world > 1:
            dist.all_reduce(sums)
            sums.div_(self.world)
            for statistics in self.catalyzer.body.buffers():
                if statistics.is_floating_point():
                    dist.all_reduce(statistics)
                    statistics.div_(self.world)
        dims = self.catalyzer.dims
        means = (sums / (self.steps * len(dims))).tolist()
        finite = [bool(value.isfinite().all()) for value in self.catalyzer.state_dict().values()]
        if not all(finite) or not all(map(math.isfinite, means)):
            raise InputError(f"training broke down in epoch {self.done + 1}: lower the rate")
        uniform = [koleo_of_uniform(settings.batch_size, dim) for dim in dims]
        return Epoch(self.done + 1, means[0], means[1], sum(uniform) / len(dims), means[2])

    def _generator(self, purpose: int) -> torch.Generator:
        entropy = np.random.SeedSequence([self.seed % 2**64, self.done, purpose])
        return torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))

    def _losses(self, out: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the losses of all output dimensions; out holds anchors, positives, negatives."""
        rank_loss = koleo = satisfied = out.new_zeros(())
        for place, dim in enumerate(self.catalyzer.dims):
            z = self.catalyzer.unit(out, dim)
            anchor, positive, negative = z[:n], z[n : 2 * n], z[(2 + place) * n : (3 + place) * n]
            if dim in self.codes:
                positive, negative = map(self.codes[dim].straight_through, (positive, negative))
            rank_loss = rank_loss + rank_triplet_loss(anchor, positive, negative)
            koleo = koleo + koleo_loss(anchor, normalize=False)
            with torch.no_grad():
                near, far = (anchor - positive).norm(dim=1), (anchor - negative).norm(dim=1)
                satisfied = satisfied + (near <= far).float().mean()
        return rank_loss, koleo, satisfied

    def _step(self, loss: Tensor, number: int) -> None:
        share = (self.done + number / self.steps) / self.settings.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * 0.5 * (1 + math.cos(math.pi * share))
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        if self.world > 1:
            for parameter in self.catalyzer.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(self.world)
        self.optimizer.step()


def _check(settings: Settings, n: int, world: int) -> None:
    if settings.positives < 1 or settings.negative < 1:
        raise InputError(
            f"{settings.positives} positives and a negative of rank {settings.negative}: "
            "give at least 1 of each"
        )
    if n < 10 * settings.negative or n < 2 * settings.positives:
        raise InputError(
            f"{n} training vectors for a negative of rank {settings.negative}: give at least "
            f"{max(10 * settings.negative, 2 * settings.positives)}, or a lower rank"
        )
    if not 2 <= settings.batch_size <= n // world:
        raise InputError(
            f"batches of {settings.batch_size} of {n // world} vectors a process: "
            f"give 2 to {n // world}"
        )
    if settings.koleo < 0 or not math.isfinite(settings.koleo):
        raise InputError(f"KoLeo weight {settings.koleo}: give 0 or more, 0.02 say")
    if settings.epochs < 1 or not 0 < settings.lr < math.inf:
        raise InputError(f"{settings.epochs} epochs at rate {settings.lr}: give more than 0")
    # Fewer, and the nearest of the pool would lie farther than the rank asked for.
    if settings.pool is not None and settings.pool * settings.negative < n:
        raise InputError(
            f"a pool of {settings.pool} for rank {settings.negative} of {n}: "
            f"give at least {-(-n // settings.negative)}"
        )
