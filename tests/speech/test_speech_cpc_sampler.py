import itertools

import numpy as np
import pytest

from remanence.errors import InputError
from remanence.speech.cpc.sampler import WindowSampler, same_speaker
from remanence.speech.cpc.windows import Piece, cut

WINDOW = 100
# Three speakers: long recordings, short ones, and both; "dora" has less than a window.
LENGTHS = [730, 1005, 250, 40, 60, 55, 90, 30, 80, 75, 20, 99, 310, 45, 70, 40, 30]
SPEAKERS = ["anna"] * 3 + ["bert"] * 9 + ["carl"] * 3 + ["dora"] * 2


def sampler(**options):
    return WindowSampler(LENGTHS, SPEAKERS, **{"window": WINDOW, "batch": 4, "seed": 3} | options)


def windows_in(batches):
    return [window for batch in batches for window in batch.windows]


def samples_of(windows):
    return [(p.recording, i) for window in windows for p in window for i in range(p.start, p.stop)]


@pytest.mark.parametrize("straddle", [False, True])
@pytest.mark.parametrize("mode", ["speaker", "sequence", "uniform", "sequential"])
def test_no_sample_is_given_out_twice_and_windows_are_whole(mode, straddle):
    every = sampler(mode=mode, straddle=straddle)
    for epoch in range(3):
        every.set_epoch(epoch)
        windows = windows_in(every)
        samples = samples_of(windows)
        assert len(samples) == len(set(samples)) == WINDOW * len(windows)
        for recording, i in samples:
            assert 0 <= i < LENGTHS[recording]


def test_every_batch_has_one_speaker():
    batches = list(sampler())
    assert all(
        len(set(batch.speakers)) == 1 and same_speaker(batch.speakers) == 1 for batch in batches
    )
    for batch in batches:
        names = {SPEAKERS[piece.recording] for window in batch.windows for piece in window}
        assert names == set(batch.speakers)
    assert {batch.speakers[0] for batch in batches} == {"anna", "bert", "carl"}


def test_the_share_of_negatives_of_the_same_speaker_is_told():
    shares = [same_speaker(batch.speakers) for batch in sampler(mode="uniform", batch=8)]
    assert min(shares) < 1
    lone = WindowSampler([100] * 4, list("abcd"), window=100, batch=4, mode="uniform")
    assert [same_speaker(batch.speakers) for batch in lone] == [0.25]
    assert [batch.everyone == batch.speakers for batch in sampler()] == [True] * len(sampler())
    # Drawn from the windows of all processes, a negative has another speaker more often.
    pair = WindowSampler([100] * 4, list("aabb"), window=100, batch=2, rank=1, world_size=2)
    assert [(same_speaker(b.speakers), same_speaker(b.everyone)) for b in pair] == [(1, 0.5)]


def test_a_batch_from_one_sequence():
    for batch in sampler(mode="sequence"):
        files = {piece.recording for window in batch.windows for piece in window}
        assert len(files) == 1 or all(LENGTHS[file] < WINDOW for file in files)


def test_windows_cross_recordings_only_where_these_are_short():
    for epoch in range(4):
        every = sampler()
        every.set_epoch(epoch)
        for window in windows_in(every):
            files = {piece.recording for piece in window}
            assert len(files) == 1 or all(LENGTHS[file] < WINDOW for file in files)
            assert len({SPEAKERS[file] for file in files}) == 1


def test_no_window_is_left_out_for_the_offset_and_short_recordings_are_shuffled():
    counts = {"anna": 7 + 10 + 2, "bert": sum(LENGTHS[3:12]) // WINDOW, "carl": 3 + 1, "dora": 0}
    every, seen = sampler(), set()
    for epoch in range(6):
        every.set_epoch(epoch)
        assert every.windows_of() == counts
        seen.add(tuple(sorted((p.recording, p.start) for w in windows_in(every) for p in w)))
    assert len(seen) == 6
    assert every.skipped == ("dora",)


def test_straddling_as_published():
    every = cut(np.array(LENGTHS), np.zeros(len(LENGTHS), int), WINDOW, straddle=True)
    tape = [(i, j) for i, length in enumerate(LENGTHS) for j in range(length)]
    assert samples_of([every.pieces(i) for i in range(len(every))]) == tape[: len(every) * WINDOW]
    rng = np.random.default_rng(0)
    offsets = set()
    for _ in range(40):
        drawn = cut(np.array(LENGTHS), np.repeat([0, 1], [3, 14]), WINDOW, straddle=True, rng=rng)
        first = {drawn.pieces(int(np.flatnonzero(drawn.speaker == s)[0]))[0] for s in (0, 1)}
        # One offset for all speakers: 0 to half a window into the first recording of each.
        own = {sum(LENGTHS[3 : p.recording]) + p.start if p.recording else p.start for p in first}
        assert len(own) == 1
        offsets |= own
    assert min(offsets) >= 0
    assert max(offsets) <= WINDOW // 2
    assert len(offsets) > 15


def test_a_window_of_short_recordings():
    found = cut(np.array([60, 70, 200]), np.array([0, 0, 1]), 100)
    assert found.pieces(2) == (Piece(0, 0, 60), Piece(1, 0, 40))
    assert [found.pieces(0), found.pieces(1)] == [(Piece(2, 0, 100),), (Piece(2, 100, 200),)]


def test_sequential_is_the_order_given_in_every_epoch():
    every = WindowSampler([250, 340], None, window=100, batch=2, mode="sequential")
    for epoch in (0, 5):
        every.set_epoch(epoch)
        assert windows_in(every) == [
            (Piece(0, 0, 100),), (Piece(0, 100, 200),),
            (Piece(1, 0, 100),), (Piece(1, 100, 200),), (Piece(1, 200, 300),),
        ]  # fmt: skip


@pytest.mark.parametrize("mode", ["speaker", "sequence", "uniform", "sequential"])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_nothing_and_have_batches_of_one_size_at_each_step(world, mode):
    for epoch in range(3):
        alone = sampler(mode=mode)
        ranks = [sampler(mode=mode, rank=rank, world_size=world) for rank in range(world)]
        for each in (alone, *ranks):
            each.set_epoch(epoch)
        given = [list(each) for each in ranks]
        for step in zip(*given, strict=True):
            assert len({len(batch.windows) for batch in step}) == 1
            every = sorted(name for batch in step for name in batch.speakers)
            assert all(sorted(batch.everyone) == every for batch in step)
        assert [len(each) for each in ranks] == [len(batches) for batches in given]
        windows = [windows_in(batches) for batches in given]
        samples = [set(samples_of(own)) for own in windows]
        assert all(not a & b for a, b in itertools.combinations(samples, 2))
        # A batch a further process is lost at most, and what is told is what was given.
        count, used = len(windows_in(alone)), sum(map(len, windows))
        assert count - used <= 4 * (world - 1)
        for each in ranks:
            assert sum(each.windows_of().values()) == used
            assert each.left_out == count - used


def test_batches_from_one_sequence_are_not_lost_on_two_processes():
    lengths = np.random.default_rng(0).integers(200, 1600, 300)
    ranks = [
        WindowSampler(
            lengths, ["anna"] * 300, window=100, batch=8, mode="sequence", rank=i, world_size=2
        )
        for i in range(2)
    ]
    used = sum(len(windows_in(each)) for each in ranks)
    assert used == sum(ranks[0].windows_of().values())
    assert ranks[0].left_out <= 8
    assert used > 0.94 * (lengths // 100).sum()
    # Small and large batches take turns.
    ranks[0].set_epoch(0)
    sizes = [len(batch.windows) for batch in ranks[0]]
    assert abs(np.mean(sizes[: len(sizes) // 2]) - np.mean(sizes)) < 0.5


@pytest.mark.parametrize("straddle", [False, True])
def test_what_is_enough_for_the_processes_is_so_in_every_epoch(straddle):
    # Nine windows make two batches, eight one: no offset may then cost a window.
    pair = WindowSampler([900], ["anna"], window=100, batch=8, straddle=straddle, world_size=2)
    for epoch in range(60):
        pair.set_epoch(epoch)
        assert len(pair) == 1


def test_smaller_batches_are_kept_on_one_process():
    sizes = {len(batch.windows) for batch in sampler()}
    assert 4 in sizes
    assert len(sizes) > 1
    assert len(windows_in(sampler())) == sum(sampler().windows_of().values())


@pytest.mark.parametrize("straddle", [False, True])
@pytest.mark.parametrize("mode", ["speaker", "uniform"])
def test_it_goes_on_where_it_stopped(mode, straddle):
    options = {"mode": mode, "straddle": straddle, "batch": 2}
    whole = sampler(**options)
    for epoch in range(3):
        whole.set_epoch(epoch)
        expected = list(whole)
        for stop in (0, 1, len(expected) // 2, len(expected)):
            first = sampler(**options)
            first.set_epoch(epoch)
            got = list(itertools.islice(first, stop))
            second = sampler(**options)
            second.load_state_dict(first.state_dict())
            assert got + list(second) == expected


def test_another_seed_or_epoch_is_another_order():
    a, b, c = sampler(), sampler(seed=4), sampler()
    c.set_epoch(1)
    assert list(a) != list(b)
    assert list(sampler()) != list(c)
    assert list(sampler()) == list(sampler())


@pytest.mark.parametrize(
    ("lengths", "speakers", "options", "words"),
    [
        ([500], None, {}, "nothing says who speaks"),
        ([50, 60], ["a", "b"], {}, "no speaker has one window of 100 samples, the longest 60"),
        ([500], ["a"], {"mode": "same"}, "'same' is unknown"),
        ([500], ["a"], {"window": 0}, "give at least 1"),
        ([500], ["a"], {"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ([500], ["a", "b"], {}, "2 speakers for 1 recordings"),
        ([500, 0], ["a", "b"], {}, "empty"),
        ([300], ["a"], {"world_size": 2}, "1 batches for 2 processes"),
    ],
)  # fmt: skip
def test_bad_input(lengths, speakers, options, words):
    with pytest.raises(InputError, match=words) as error:
        WindowSampler(lengths, speakers, **{"window": WINDOW, "batch": 4} | options)
    assert "\n" not in str(error.value)
