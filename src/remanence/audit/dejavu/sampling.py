"""The memorisation task and its batches: an arbitrary set against the rest of the same pool."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from remanence.audit.dejavu.pixels import pixel_hashes
from remanence.errors import InputError


@dataclass(frozen=True)
class MembershipTask:
    """Which images of one pool are in the set, which are not, which are never shown.

    Attributes:
        positives: (n,) int64 indices of the set.
        negatives: (N - n,) indices of the rest of the pool that training may show.
        unseen: indices of the images that training never shows.
    """

    positives: Tensor
    negatives: Tensor
    unseen: Tensor

    @classmethod
    def draw(cls, images: Tensor, n_positives: int, n_unseen: int, seed: int) -> "MembershipTask":
        """Draw the set and the unseen images at random from `images`; nothing is copied.

        Args:
            images: (N + n_unseen, C, H, W) pool, every image once.
            n_positives: n, the size of the set, below N / 2.
            n_unseen: images kept out of training.
            seed: of the draw.

        Raises:
            InputError: a size is out of range, or an image of the set occurs again outside it.
        """
        pool = len(images) - n_unseen
        if n_positives < 1 or 2 * n_positives >= pool:
            raise InputError(
                f"a set of {n_positives} out of {pool} images: give at least 1 and fewer than half"
            )
        if n_unseen < 1:
            raise InputError("no image is unseen: keep at least 1 out of training (n_unseen)")
        order = np.random.default_rng(seed).permutation(len(images))
        hashes = pixel_hashes(images)[order]
        twins = np.flatnonzero(np.isin(hashes[n_positives:], hashes[:n_positives]))
        if len(twins):
            twin = int(twins[0]) + n_positives
            original = int(np.flatnonzero(hashes[:n_positives] == hashes[twin])[0])
            raise InputError(
                f"images {order[original]} and {order[twin]} of the pool have equal pixels, one in "
                f"the set and one not ({len(twins)} such): give images[distinct(images)]"
            )
        positives, negatives, unseen = (
            torch.from_numpy(part) for part in np.split(order, (n_positives, pool))
        )
        return cls(positives, negatives, unseen)


class InOutBatchSampler:
    """Batches of exactly half positives and half negatives, without replacement.

    Each side is an endless stream of shuffled epochs: every positive occurs once in a positive
    epoch, every negative once in a negative epoch, whatever the batch size. A step is a fixed piece
    of both streams, so the step is the whole state: iteration resumes anywhere, in the middle of
    an epoch too, and ranks take disjoint pieces.

    Args:
        task: what is in and what is not.
        batch_size: images a batch and rank, even; half of them positives.
        seed: of the shuffles, the same on every rank.
        rank: of this process.
        world_size: number of processes.

    Raises:
        InputError: the batch size is odd or not positive, or `rank` is not below `world_size`.
    """

    def __init__(
        self,
        task: MembershipTask,
        batch_size: int = 256,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 2 or batch_size % 2:
            raise InputError(f"batch size {batch_size} has no halves: give an even number")
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} of {world_size} processes: give 0 <= rank < world_size")
        self.half = batch_size // 2
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._sides = (task.positives.numpy(), task.negatives.numpy())
        self._epochs: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def batch(self, step: int) -> Tensor:
        """Indices of step `step`, int64 (batch_size,): positive, negative, positive, ...

        They alternate, so that code that cuts a batch in even pieces (data parallelism, ghost
        batch normalisation) still gets both kinds in every piece.
        """
        start = (step * self.world_size + self.rank) * self.half
        sides = [self._take(side, start) for side in (0, 1)]
        return torch.from_numpy(np.stack(sides, axis=1).reshape(-1))

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the batches from step `start` on, without end."""
        while True:
            yield self.batch(start)
            start += 1

    def positive_epochs(self, steps: int) -> float:
        """Positive epochs that all ranks together make in `steps` steps."""
        return steps * self.half * self.world_size / len(self._sides[0])

    def negatives_shown(self, steps: int) -> Tensor:
        """Distinct negatives that all ranks together show in the first `steps` steps, int64."""
        shown = steps * self.half * self.world_size
        return torch.from_numpy(self._shuffled(1, 0)[:shown].copy())

    def _take(self, side: int, start: int) -> npt.NDArray[np.int64]:
        n = len(self._sides[side])
        positions = np.arange(start, start + self.half)
        first, last = positions[0] // n, positions[-1] // n
        epochs = [self._shuffled(side, int(epoch)) for epoch in range(first, last + 1)]
        taken: npt.NDArray[np.int64] = np.concatenate(epochs)[positions - first * n]
        return taken

    def _shuffled(self, side: int, epoch: int) -> npt.NDArray[np.int64]:
        if (side, epoch) not in self._epochs:
            # Only an epoch that a batch may have stopped in is worth keeping.
            self._epochs = {key: kept for key, kept in self._epochs.items() if key[0] != side}
            rng = np.random.default_rng((self.seed, side, epoch))
            self._epochs[side, epoch] = rng.permutation(self._sides[side])
        return self._epochs[side, epoch]
