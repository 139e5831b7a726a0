"""Augmentation where training data flows: in a data set's workers, in a batch, in Ray Data.

On a GPU the chain is best a layer of the training step, behind `pad_collate`; see `Augmentation`.
Where the CPUs have time to spare, `AugmentedDataset` augments in the loader's workers:

    dataset = AugmentedDataset(recordings, chain, seed=0)
    loader = DataLoader(dataset, 32, shuffle=True, num_workers=4, collate_fn=pad_collate)
    for epoch in range(10):
        dataset.set_epoch(epoch)
        for waves, lengths, labels in loader: ...

Every draw comes from a generator of its own, seeded by the seed, the epoch and the example. So no
two workers or processes repeat each other, and no number of workers changes what is drawn.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from remanence.errors import InputError
from remanence.speech.wavaugment.augmentation import Augmentation
from remanence.speech.wavaugment.params import Params
from remanence.speech.wavaugment.waves import as_waves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from remanence.speech.wavaugment.chain import TwoView


class AugmentedDataset(Dataset[Any]):
    """A data set whose waves come out augmented.

    An example drawn twice in one epoch is augmented alike; call `set_epoch` before each epoch. The
    epoch lies in shared memory, so that workers that outlive an epoch see it too. `RandomBabble`
    finds no other examples here: use it on batches. What speed, tempo or splices leave of a clip is
    all that comes back, longer or shorter than it was; a `TwoView` keeps the clip's length.

    Args:
        dataset: items by number: a wave, floats (T,) or (C, T), or a tuple or list that begins with
            one, of which a tuple comes back.
        augment: what augments; a `TwoView` puts two waves in the place of one.
        seed: 0 or more.
    """

    def __init__(self, dataset: Any, augment: Augmentation | TwoView, seed: int = 0) -> None:
        if seed < 0:
            raise InputError(f"seed {seed} is negative: give 0 or more")
        self.dataset, self.augment, self.seed = dataset, augment, seed
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def set_epoch(self, epoch: int) -> None:
        """Draw as epoch number `epoch` from the next item on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """The item with its wave augmented.

        Raises:
            InputError: it begins with no wave, or with one that does not fit.
        """
        item = self.dataset[index]
        many = isinstance(item, tuple | list) and len(item) > 0
        wave, *rest = item if many else (item,)
        generator = _generator(self.seed, int(self._epoch), index % len(self))
        try:
            out = self._augmented(wave, generator)
        except InputError as error:
            raise InputError(f"item {index}: {error}") from error
        views = out if isinstance(out, tuple) else (out,)
        return (*views, *rest) if many or len(views) > 1 else out

    def _augmented(self, wave: Tensor, generator: torch.Generator) -> Any:
        augment = self.augment
        if not isinstance(augment, Augmentation) or not augment.changes_ends:
            return augment(wave, generator=generator)
        lengths = torch.tensor([as_waves(wave).wave.shape[-1]])
        room = augment.most_samples(int(lengths))
        padded = functional.pad(wave, (0, room - int(lengths)))
        out, params = augment(padded, lengths, generator=generator, return_params=True)
        return out[..., : int(augment.ends(lengths, params, room))]


def pad_collate(items: Sequence[Any], *, waves: int = 1) -> tuple[Any, ...]:
    """Make a batch of ragged clips.

    Args:
        items: waves, floats (T,) or (C, T), or tuples of waves and targets.
        waves: how many of a tuple's first fields are waves of one length: 2 behind a `TwoView`
            (`functools.partial(pad_collate, waves=2)`).

    Returns:
        (B, C, T) waves, zero behind each clip's end, for each of the wave fields; lengths, (B,)
        int64; then the targets: numbers as a tensor (B,), tensors of one shape stacked, anything
        else as a list.

    Raises:
        InputError: no items, items without their waves or with an empty one, or another number of
            channels.
    """
    if not items:
        raise InputError("no items to collate: give at least one")
    rows = [item if isinstance(item, tuple | list) else (item,) for item in items]
    for place, row in enumerate(rows):
        if len(row) < waves or not all(isinstance(wave, Tensor) for wave in row[:waves]):
            raise InputError(f"item {place} does not begin with {waves} waves: give tensors first")
        if any(wave.ndim not in (1, 2) or wave.numel() == 0 for wave in row[:waves]):
            shape = tuple(row[0].shape)
            raise InputError(f"item {place} has a wave {shape}: give (T,) or (C, T), nothing empty")
    clips = [[wave.reshape(-1, wave.shape[-1]) for wave in row[:waves]] for row in rows]
    if len({wave.shape[0] for row in clips for wave in row}) > 1:
        raise InputError("clips differ in their number of channels: mix them to one")
    if any(wave.shape != row[0].shape for row in clips for wave in row):
        raise InputError("the waves of an item differ in length: collate them apart")
    lengths = torch.tensor([row[0].shape[-1] for row in clips])
    batches = (
        pad_sequence([wave.T for wave in field], batch_first=True).transpose(1, 2)
        for field in zip(*clips, strict=True)
    )
    targets = zip(*(row[waves:] for row in rows), strict=True)
    return (*batches, lengths, *(_together(field) for field in targets))


class AugmentRows:
    """A function from batch to batch, for `map_batches` of Ray Data or anything alike.

    A batch is a dictionary of numpy arrays, a row an example:

        augmented = recordings.map_batches(AugmentRows(chain, key="path"), batch_size=64)

    What a row draws hangs on the seed and its key alone, not on the batch or the worker that it
    came to. `RandomBabble` finds no other examples here. Clips of an object array or a list become
    as long as speed, tempo and splices leave them; rows of an array of floats keep their length.

    Args:
        chain: what augments.
        column: of the waves: (B, T) or (B, C, T) floats, or an object array or a list of (T,) or
            (C, T) floats.
        key: column that tells rows apart, such as a path; the wave itself where None.
        seed: 0 or more; another seed makes another copy.
        device: where to augment.
    """

    def __init__(
        self,
        chain: Augmentation,
        *,
        column: str = "audio",
        key: str | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.chain, self.column, self.key = chain, column, key
        self.seed, self.device = seed, device

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Augment a batch.

        Args:
            batch: the columns.

        Returns:
            The same, with the waves augmented, of the same form and dtype; of a list comes an
            object array.

        Raises:
            InputError: a column is missing, or its waves do not fit.
        """
        for name in (self.column, self.key):
            if name is not None and name not in batch:
                raise InputError(
                    f"the batch has no column {name!r}: name one of {', '.join(batch)}"
                )
        clips = [np.asarray(clip) for clip in batch[self.column]]
        if not clips:
            return batch
        keys = clips if self.key is None else list(batch[self.key])
        if any(clip.dtype.kind != "f" for clip in clips):
            raise InputError(f"column {self.column!r} holds rows that are no floats: convert them")
        waves, lengths = pad_collate([torch.from_numpy(clip.copy()) for clip in clips])
        chain, column = self.chain.to(self.device), batch[self.column]
        fixed = isinstance(column, np.ndarray) and column.dtype != object
        rooms = [n if fixed else chain.most_samples(n) for n in lengths.tolist()]
        drawn = [
            chain.sample(1, n, _generator(self.seed, _digest(key)), time=room)
            for n, room, key in zip(lengths.tolist(), rooms, keys, strict=True)
        ]
        padded = functional.pad(waves, (0, max(rooms) - waves.shape[-1])).to(self.device)
        out, params = chain(padded, lengths, params=Params.cat(drawn), return_params=True)
        if fixed:
            return {**batch, self.column: out.cpu().numpy().reshape(column.shape)}
        rows = np.empty(len(clips), dtype=object)
        ends = chain.ends(lengths, params, max(rooms)).tolist()
        for place, (row, clip, end) in enumerate(zip(out.cpu().numpy(), clips, ends, strict=True)):
            rows[place] = row[:, :end].reshape(*clip.shape[:-1], end)
        return {**batch, self.column: rows}


def _generator(*numbers: int) -> torch.Generator:
    """A generator of its own for each tuple of numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _digest(key: Any) -> int:
    data = key.tobytes() if isinstance(key, np.ndarray) else str(key).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _together(field: tuple[Any, ...]) -> Any:
    if all(isinstance(value, int | float | np.number) for value in field):
        return torch.tensor(field)
    if all(isinstance(value, Tensor) and value.shape == field[0].shape for value in field):
        return torch.stack(field)
    return list(field)
