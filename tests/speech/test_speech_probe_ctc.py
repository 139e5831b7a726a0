import itertools
import math

import numpy as np
import pytest
import torch

from remanence.errors import InputError
from remanence.speech.probe.ctc import CtcHead, frames_needed, frames_out, train_ctc
from remanence.speech.probe.decode import best_path, collapse, prefix_beam_search
from remanence.speech.probe.error_rate import edit_distance, error_rate


def drawn(T, C, seed, sharp=1.0):
    logits = sharp * torch.randn(T, C, generator=torch.Generator().manual_seed(seed))
    return logits.double().log_softmax(1)


def enumerated(log_probs):
    """The probability of each sequence, over all paths."""
    T, C = log_probs.shape
    total = {}
    for path in itertools.product(range(C), repeat=T):
        p = math.exp(sum(float(log_probs[t, c]) for t, c in enumerate(path)))
        joined = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
        sequence = tuple(c for c in joined if c != C - 1)
        total[sequence] = total.get(sequence, 0.0) + p
    return total


@pytest.mark.parametrize(("T", "C"), [(4, 3), (4, 4), (6, 3)])
def test_prefix_beam_search_equals_enumeration(T, C):
    for seed in range(15):
        log_probs = drawn(T, C, seed, sharp=1 + seed % 3)
        exact = enumerated(log_probs)
        found = prefix_beam_search(log_probs, width=10_000)
        assert len(found) == len(exact)
        for sequence, log_p in found:
            assert math.exp(log_p) == pytest.approx(exact[tuple(sequence)], rel=1e-9)
        assert tuple(found[0][0]) == max(exact, key=exact.get)
        assert sum(exact.values()) == pytest.approx(1)


def reference_beam(log_probs, width):
    """Prefix beam search with a dict of prefixes."""
    blank = log_probs.shape[1] - 1
    beam = {(): (1.0, 0.0)}
    for row in log_probs.exp().tolist():
        new = {}
        for prefix, (pb, pn) in beam.items():
            for c, p in enumerate(row):
                if c == blank:
                    grown, more = prefix, ((pb + pn) * p, 0.0)
                elif prefix and c == prefix[-1]:
                    old = new.get(prefix, (0.0, 0.0))
                    new[prefix] = (old[0], old[1] + pn * p)
                    grown, more = (*prefix, c), (0.0, pb * p)
                else:
                    grown, more = (*prefix, c), (0.0, (pb + pn) * p)
                old = new.get(grown, (0.0, 0.0))
                new[grown] = (old[0] + more[0], old[1] + more[1])
        beam = dict(sorted(new.items(), key=lambda item: -sum(item[1]))[:width])
    return {prefix: sum(p) for prefix, p in beam.items() if sum(p) > 0}


def test_a_narrow_beam_equals_the_search_with_a_dict():
    # Prefixes leave the beam and come back here, while longer ones of theirs stay.
    for seed in range(30):
        log_probs = drawn(12, 3, seed, sharp=1 + seed % 2)
        wanted = reference_beam(log_probs, 4)
        found = prefix_beam_search(log_probs, 4)
        assert len(found) == len(wanted)
        assert {tuple(s) for s, _ in found} == set(wanted)
        for sequence, log_p in found:
            assert math.exp(log_p) == pytest.approx(wanted[tuple(sequence)], rel=1e-9)


def test_best_path_may_miss_the_best_sequence():
    # Blank is likeliest in both frames, but all paths of "0" together are likelier.
    log_probs = torch.tensor([[0.4, 0.6], [0.4, 0.6]]).log()
    assert best_path(log_probs.unsqueeze(0)) == [[]]
    sequence, log_p = prefix_beam_search(log_probs)[0]
    assert sequence == [0]
    assert math.exp(log_p) == pytest.approx(0.64)


def test_collapse_and_lengths():
    assert collapse(torch.tensor([2, 0, 0, 2, 0, 1, 1, 2]), 2) == [0, 0, 1]
    rows = torch.eye(3)[torch.tensor([[0, 2, 0, 1], [1, 1, 0, 0]])].log()
    assert best_path(rows, torch.tensor([4, 2])) == [[0, 0, 1], [1]]


def test_certain_outputs_are_read_off():
    log_probs = torch.eye(4)[torch.tensor([0, 0, 3, 0, 1, 3, 2])].log()
    assert prefix_beam_search(log_probs) == [([0, 0, 1, 2], 0.0)]
    with pytest.raises(InputError, match="NaN"):
        prefix_beam_search(log_probs * 0)


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_distance("abc", "") == 3
    assert edit_distance("abc", "abc") == 0
    assert edit_distance("abc", "bc") == 1
    assert edit_distance("ab", "ba") == 2
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (rng.integers(3, size=rng.integers(9)).tolist() for _ in range(2))
        assert edit_distance(a, b) == by_recursion(tuple(a), tuple(b))


def by_recursion(a, b):
    if not a or not b:
        return len(a) + len(b)
    rows = {(i, j): i + j for i in range(len(a) + 1) for j in range(len(b) + 1) if not i * j}
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        same = rows[i - 1, j - 1] + (a[i - 1] != b[j - 1])
        rows[i, j] = min(same, rows[i - 1, j] + 1, rows[i, j - 1] + 1)
    return rows[len(a), len(b)]


def test_error_rate_is_averaged_over_utterances_and_pooled():
    found = error_rate([[1], [1, 2, 3, 4]], [[2], [1, 2, 3, 4]])
    assert (found.mean, found.pooled) == (0.5, 0.2)
    assert found.edits.tolist() == [1, 0]
    # Insertions take it above 1.
    assert error_rate([[1]], [[2, 3, 4]]).mean == 3
    assert np.isnan(error_rate([[1]], [[1]]).mean_interval).all()
    low, high = error_rate([[1]] * 40, [[1], [2]] * 20).mean_interval
    assert 0.3 < low < 0.5 < high < 0.7
    with pytest.raises(InputError, match="reference 1 is empty"):
        error_rate([[1], []], [[1], [2]])


def test_frames_of_the_head():
    head = CtcHead(3, 4, lstm=True)
    for lengths in ([8, 11, 12], [1, 7, 20]):
        out, ends = head(torch.randn(3, max(lengths), 3), torch.tensor(lengths))
        assert ends.tolist() == frames_out(torch.tensor(lengths)).tolist()
        assert out.shape == (3, int(ends.max()), 5)
        torch.testing.assert_close(out.exp().sum(2), torch.ones(3, out.shape[1]))
    assert frames_out(torch.tensor([1, 8, 11, 12, 100])).tolist() == [1, 1, 1, 2, 24]
    assert [frames_needed(torch.tensor(t)) for t in ([0], [0, 1], [0, 0, 1, 1])] == [1, 2, 6]


@pytest.mark.parametrize("lstm", [True, False])
@pytest.mark.parametrize("frames", [5, 13])
def test_what_is_padded_does_not_matter(frames, lstm):
    # Of fewer frames than the kernel's eight, all outputs see what fills them up.
    head = CtcHead(3, 4, lstm=lstm)
    head.mean.fill_(2.0)
    x = torch.randn(1, frames, 3)
    alone, _ = head(x, torch.tensor([frames]))
    for padding in (torch.nan, 7.0):
        batch = torch.full((2, 40, 3), padding)
        batch[0, :frames], batch[1] = x[0], 1.0
        together, ends = head(batch, torch.tensor([frames, 40]))
        torch.testing.assert_close(together[0, : ends[0]], alone[0])


def spoken(n, seed, phones=3, frames=12):
    """Utterances of three phones, each a direction that lasts some frames."""
    rng = np.random.default_rng(seed)
    features, targets = [], []
    for _ in range(n):
        target = rng.permutation(phones)
        x = np.repeat(np.eye(4)[target], frames, 0) + 0.1 * rng.normal(size=(frames * phones, 4))
        features.append(torch.from_numpy(x.astype("f4")))
        targets.append(torch.from_numpy(target))
    return features, targets


@pytest.mark.parametrize("lstm", [False, True])
def test_ctc_learns_to_spell(lstm):
    features, targets = spoken(24, 0)
    probe = train_ctc(features, targets, 3, lstm=lstm, epochs=40, lr=2e-2)
    test, wanted = spoken(10, 1)
    wanted = [t.tolist() for t in wanted]
    assert probe.impossible == ()
    assert probe.losses[-1] < 0.2 * probe.losses[0]
    for width in (None, 20):
        assert error_rate(wanted, probe.decode(test, width)).mean < 0.1
    again = train_ctc(features, targets, 3, lstm=lstm, epochs=1, lr=2e-2)
    assert again.losses[0] == probe.losses[0]


def test_the_loss_is_that_of_all_paths_with_the_blank_last():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(20, 3, generator=generator), torch.randn(24, 3, generator=generator)]
    targets = [torch.tensor([0, 0]), torch.tensor([1, 2, 0])]
    probe = train_ctc(features, targets, 3, epochs=1, lr=1e-30)
    wanted = [
        -math.log(enumerated(row.double())[tuple(target.tolist())]) / len(target)
        for row, target in zip(probe.log_probs(features), targets, strict=True)
    ]
    assert float(probe.losses[0]) == pytest.approx(sum(wanted) / 2, rel=1e-5)


def test_too_few_frames_are_reported_and_teach_nothing():
    features, targets = spoken(6, 0)
    features[2] = features[2][:9]  # one frame out, three phones
    probe = train_ctc(features, targets, 3, epochs=2)
    assert probe.impossible == (2,)
    assert probe.losses.isfinite().all()
    assert all(w.isfinite().all() for w in probe.head.parameters())
    with pytest.raises(InputError, match="no utterance has frames enough"):
        train_ctc([f[:9] for f in features], targets, 3)
    with pytest.raises(InputError, match="utterance 1: has no phones"):
        train_ctc(features, [targets[0], torch.empty(0).long(), *targets[2:]], 3)
