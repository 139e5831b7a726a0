"""Augmentation in loaders and batches: nobody repeats anybody, and seeds repeat."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from remanence.errors import InputError
from remanence.speech.wavaugment.adapters import AugmentedDataset, AugmentRows, pad_collate
from remanence.speech.wavaugment.chain import Chain, TwoView
from remanence.speech.wavaugment.random import (
    RandomChunkSwap,
    RandomClip,
    RandomGain,
    RandomSpeed,
)


class Ones(Dataset):
    """Clips of ones, whose level after a random gain is the parameter drawn."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.ones(10 + index).double(), index


def levels(loader: DataLoader) -> dict[int, float]:
    return {
        int(label): wave[0, 0].item()
        for waves, _, labels in loader
        for wave, label in zip(waves, labels, strict=True)
    }


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_workers_and_epochs_never_repeat_and_seeds_do() -> None:
    drawn = []
    for seed, workers, persistent in ((0, 4, True), (0, 0, False), (1, 0, False)):
        dataset = AugmentedDataset(Ones(), RandomGain((-20.0, 0.0)), seed)
        loader = DataLoader(
            dataset,
            4,
            shuffle=True,
            num_workers=workers,
            persistent_workers=persistent,
            collate_fn=pad_collate,
        )
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            drawn.append(levels(loader))
    first, second, alone, alone_second, other, other_second = drawn
    assert first == alone
    assert second == alone_second
    everything = [
        level for epoch in (first, second, other, other_second) for level in epoch.values()
    ]
    assert len(everything) == 160
    assert len(set(everything)) == 160


def test_items_keep_their_form() -> None:
    gain = RandomGain(-20.0)
    wave, label = AugmentedDataset(Ones(), gain)[3]
    torch.testing.assert_close(wave, torch.full((13,), 0.1).double())
    assert label == 3
    plain = AugmentedDataset([torch.ones(2, 5)], gain)
    assert plain[0].shape == (2, 5)
    drawn = AugmentedDataset(Ones(), RandomGain())
    assert drawn[-1][0][0] == drawn[39][0][0] != drawn[38][0][0]
    past, future, label = AugmentedDataset(Ones(), TwoView(gain, "past"))[2]
    torch.testing.assert_close(past, future / 10)
    batch = pad_collate([(past, future, 1), (past, future, 2)], waves=2)
    assert [tuple(part.shape) for part in batch] == [(2, 1, 12), (2, 1, 12), (2,), (2,)]
    loader = DataLoader(
        AugmentedDataset(Ones(), TwoView(gain)), 8, collate_fn=partial(pad_collate, waves=2)
    )
    assert len(next(iter(loader))) == 4
    mixed = AugmentedDataset([[torch.ones(5), "a"], {"wave": 1}, np.ones(5), []], gain)
    wave, label = mixed[0]
    torch.testing.assert_close(wave, torch.full((5,), 0.1))
    assert label == "a"
    for index, kind in ((1, "dict"), (2, "ndarray"), (3, "list")):
        with pytest.raises(InputError, match=f"item {index}: wave is {kind}: give a tensor"):
            mixed[index]
    with pytest.raises(InputError, match="item 0: wave is dict: give a tensor"):
        AugmentedDataset([{"wave": 1}], TwoView(gain))[0]
    with pytest.raises(InputError, match="seed -1"):
        AugmentedDataset(Ones(), gain, -1)


def test_ragged_clips_are_padded_and_go_through_a_chain() -> None:
    clips = [(torch.arange(1.0, n + 1), n, torch.ones(n), "text") for n in (3, 5, 1)]
    waves, lengths, numbers, ragged, texts = pad_collate(clips)
    assert waves.shape == (3, 1, 5)
    assert waves[0, 0].tolist() == [1, 2, 3, 0, 0]
    assert lengths.tolist() == numbers.tolist() == [3, 5, 1]
    assert [len(tensor) for tensor in ragged] == [3, 5, 1]
    assert texts == ["text"] * 3
    out = Chain([RandomClip(0.5)])(waves, lengths)
    assert out[:, 0].amax(1).tolist() == [1.5, 2.5, 0.5]
    stereo, _ = pad_collate([torch.ones(2, 4), torch.ones(2, 6)])
    assert stereo.shape == (2, 2, 6)
    _, _, counts, shares = pad_collate([(torch.ones(2), np.int64(3), np.float32(0.5))] * 2)
    assert counts.tolist() == [3, 3]
    assert counts.dtype == torch.int64
    assert shares.tolist() == [0.5, 0.5]
    for items, word in (
        ([], "at least one"),
        ([torch.ones(3), torch.ones(2, 3)], "channels"),
        ([("a", 1)], "tensors first"),
        ([torch.ones(3), {"wave": torch.ones(3)}], "item 1 does not begin with 1 waves"),
        ([torch.ones(3), np.ones(3)], "item 1 .*tensors first"),
        ([torch.ones(3), torch.zeros(0)], "item 1 .*nothing empty"),
        ([torch.tensor(3.0)], r"item 0 has a wave \(\)"),
        ([torch.ones(2, 1, 3)], r"give \(T,\) or \(C, T\)"),
    ):
        with pytest.raises(InputError, match=word):
            pad_collate(items)
    with pytest.raises(InputError, match="differ in length"):
        pad_collate([(torch.ones(3), torch.ones(4))], waves=2)


def test_rows_of_a_table_are_augmented_alike_in_any_batch_and_after_pickling() -> None:
    augment = AugmentRows(Chain([RandomGain((-20.0, 0.0)), RandomClip()]), key="path", seed=3)
    clips = [np.random.default_rng(n).normal(size=n).astype(np.float32) for n in (50, 80, 50)]
    ragged = np.empty(3, dtype=object)
    for place, clip in enumerate(clips):
        ragged[place] = clip
    batch = {"audio": ragged, "path": np.array(["a", "b", "c"]), "label": np.arange(3)}
    out = pickle.loads(pickle.dumps(augment))(batch)  # noqa: S301 (our own bytes)
    assert [row.shape for row in out["audio"]] == [(50,), (80,), (50,)]
    assert out["audio"][0].dtype == np.float32
    assert out["label"] is batch["label"]
    assert ragged[0] is clips[0]
    for place in range(3):
        rows = np.array([2, place])
        parts = augment({name: column[rows] for name, column in batch.items()})
        np.testing.assert_allclose(parts["audio"][1], out["audio"][place], atol=1e-6)
    square = {"audio": np.ones((4, 30)), "path": np.array(list("abcd"))}
    levels = augment(square)["audio"][:, 0]
    assert len(set(levels.tolist())) == 4
    again = AugmentRows(augment.chain, key="path", seed=4)(square)["audio"][:, 0]
    assert not set(levels.tolist()) & set(again.tolist())
    unnamed = AugmentRows(augment.chain)({"audio": np.arange(12.0).reshape(2, 1, 6)})
    assert unnamed["audio"].shape == (2, 1, 6)
    assert augment({"audio": np.empty((0, 5)), "path": np.empty(0)})["audio"].shape == (0, 5)
    listed = augment({"audio": [[0.5, 1.0], [0.25]], "path": ["a", "b"]})["audio"]
    assert [row.shape for row in listed] == [(2,), (1,)]
    # Keys alike but for their ends draw apart.
    alike = np.array([f"speech/ann/{n}.wav" for n in range(4)])
    levels = augment({"audio": np.ones((4, 30)), "path": alike})["audio"][:, 0]
    assert len(set(levels.tolist())) == 4
    with pytest.raises(InputError, match=r"item 1 .*nothing empty"):
        augment({"audio": [np.ones(3), np.ones(0)], "path": ["a", "b"]})
    with pytest.raises(InputError, match="no floats"):
        augment({"audio": [np.ones(3), "b"], "path": ["a", "b"]})
    with pytest.raises(InputError, match="no column 'path'"):
        augment({"audio": np.ones((4, 30))})


def test_clips_by_themselves_become_as_long_as_their_speed_makes_them() -> None:
    chain = Chain([RandomSpeed((0.5, 2.0)), RandomChunkSwap(2, 0.5), RandomSpeed(0.8)])
    clips = [torch.arange(1.0, n + 1) for n in (50, 80, 50, 20)]
    alone = AugmentedDataset(clips, chain)
    made = [alone[place] for place in range(4)]
    ragged = {"audio": [clip.numpy() for clip in clips], "path": list("abcd")}
    augment = AugmentRows(chain, key="path")
    rows = augment(ragged)["audio"]
    for results in (made, rows):
        lengths = [len(wave) for wave in results]
        assert lengths[0] != lengths[2]
        for clip, wave in zip(clips, results, strict=True):
            assert 0.6 * len(clip) < len(wave) <= 2.5 * len(clip)
            assert wave.max() > 0.9 * len(clip)  # its end is there
    last = {name: column[-1:] for name, column in ragged.items()}
    np.testing.assert_allclose(augment(last)["audio"][0], rows[-1], atol=1e-5)
    assert augment({"audio": np.ones((2, 30)), "path": ["a", "b"]})["audio"].shape == (2, 30)
    chain.eval()
    assert torch.equal(alone[1], clips[1])
    assert np.array_equal(augment(ragged)["audio"][1], clips[1].numpy())
    with pytest.raises(InputError, match="item 0: wave is ndarray"):
        AugmentedDataset([np.ones(5)], RandomSpeed())[0]
