"""Signals against high-precision arithmetic, and everything a careless caller may hand in."""

import math
import warnings
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from remanence.audit.membership.signals import Signals, model_signals, signals_from_logits
from remanence.audit.membership.task_signals import (
    language_model_signals,
    multilabel_signals,
    regression_signals,
)
from remanence.errors import InputError


def exact(row: list[float], label: int) -> tuple[float, float, float]:
    """Loss, margin and confidence in 80 digits, through probabilities."""
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 80, -(10**6), 10**6
        powers = [(Decimal(x) - Decimal(max(row))).exp() for x in row]
        others = sum(powers[:label] + powers[label + 1 :])
        p = powers[label] / sum(powers)
        loss = (
            (1 + others / powers[label]).ln()
            if others / powers[label] > Decimal("1e-60")
            else (others / powers[label])
        )
        return float(loss), float((powers[label] / others).ln()), float(p)


@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(st.floats(-300, 300, width=32), min_size=2, max_size=6),
    label=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_signals_equal_exact_arithmetic(row: list[float], label: int, dtype: torch.dtype) -> None:
    y = label % len(row)
    got = signals_from_logits(
        torch.tensor([[5.0] * len(row), row], dtype=dtype), torch.tensor([0, y])
    )
    loss, margin, conf = exact(row, y)
    assert got.loss[1, 0] == pytest.approx(loss, rel=1e-12)
    assert got.margin[1, 0] == pytest.approx(margin, rel=1e-12, abs=1e-12)
    assert got.conf[1, 0] == pytest.approx(conf, rel=1e-12)
    assert got.hinge[1, 0] == pytest.approx(row[y] - max(row[:y] + row[y + 1 :]))


def test_margin_beyond_float32_probabilities() -> None:
    signals = signals_from_logits(torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([0]))
    assert signals.margin[0, 0] == pytest.approx(39.3069, abs=5e-5)
    p = torch.tensor([[40.0, 0.0, 0.0]]).softmax(-1)[0, 0]
    assert (p / (1 - p)).log().isinf()
    assert 0 < signals.loss[0, 0] < 1e-16
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4]])
    for label in range(3):
        far = signals_from_logits(extreme, torch.full((3,), label))
        for values in (far.loss, far.margin, far.conf, far.hinge, far.entropy):
            assert values is not None
            assert np.isfinite(values).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:logits of")
def test_any_float_dtype_gives_float64(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(6) % 4
    got, want = (signals_from_logits(x, labels) for x in (logits, logits.double().numpy()))
    for name in ("loss", "margin", "conf", "correct", "hinge", "entropy"):
        assert getattr(got, name).dtype == np.float64
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    assert got.labels.dtype == np.int64


def test_half_precision_warns() -> None:
    with pytest.warns(UserWarning, match="bfloat16 are coarse"):
        signals_from_logits(torch.randn(3, 4).bfloat16(), torch.zeros(3).long())
    with pytest.warns(UserWarning, match="float16 are coarse"):
        signals_from_logits(np.ones((3, 4), np.float16), np.zeros(3, int))


def test_binary_heads_agree() -> None:
    u = torch.linspace(-50, 50, 11)
    y = torch.arange(11) % 2
    two = signals_from_logits(torch.stack((torch.zeros(11), u), 1), y)
    for head in (u, u[:, None], u[:, None, None]):
        one = signals_from_logits(head, y)
        np.testing.assert_array_equal(one.margin, two.margin)
        np.testing.assert_array_equal(one.loss, two.loss)
    np.testing.assert_allclose(two.margin[:, 0], np.where(y == 1, u, -u))


def test_queries_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).normal(size=(50, 3, 7))
    labels = np.arange(50) % 7
    whole = signals_from_logits(logits, labels)
    monkeypatch.setattr("remanence.audit.membership.signals.CHUNK_VALUES", 21 * 4)
    pieces = signals_from_logits(logits, labels)
    for q in range(3):
        single = signals_from_logits(logits[:, q], labels)
        np.testing.assert_array_equal(whole.margin[:, q], single.margin[:, 0])
    for name in ("loss", "margin", "conf", "correct", "hinge", "entropy", "labels"):
        np.testing.assert_allclose(getattr(whole, name), getattr(pieces, name), rtol=1e-14)
    logits[3, 1, 0] = logits[41, 0, 2] = np.nan
    with pytest.raises(InputError, match="2 of 50 rows"):
        signals_from_logits(logits, labels)


def test_temperature_divides_logits() -> None:
    logits = torch.randn(5, 3)
    got = signals_from_logits(logits, torch.zeros(5).long(), 2.0)
    want = signals_from_logits(logits / 2, torch.zeros(5).long())
    np.testing.assert_allclose(got.margin, want.margin, rtol=1e-6)


def test_predicted_labels_take_the_place_of_true_ones() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.5, -1.0]])
    signals = signals_from_logits(logits)
    assert signals.predicted
    assert signals.labels.tolist() == [0, 1]
    assert (signals.correct == 1).all()
    p = logits.double().softmax(-1)
    np.testing.assert_allclose(signals.conf[:, 0], p.amax(-1))
    assert signals.entropy is not None
    np.testing.assert_allclose(signals.entropy[:, 0], -(p * p.log()).sum(-1), rtol=1e-12)


def test_probabilities_are_refused_or_taken_as_asked() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.arange(8) % 5
    p = logits.softmax(-1)
    with pytest.raises(InputError, match="look like probabilities"):
        signals_from_logits(p, labels)
    with pytest.raises(InputError, match="no probabilities"):
        signals_from_logits(logits, labels, probabilities=True)
    got, want = (
        signals_from_logits(p, labels, probabilities=True),
        signals_from_logits(logits, labels),
    )
    np.testing.assert_allclose(got.margin, want.margin, rtol=1e-12)
    u = torch.tensor([-1.0, 0.3, 2.0]).double()
    y = torch.tensor([0, 1, 1])
    one = signals_from_logits(u.sigmoid(), y, probabilities=True)
    np.testing.assert_allclose(one.margin, signals_from_logits(u, y).margin, rtol=1e-12)
    with pytest.warns(UserWarning, match="in \\[0, 1\\]"):
        signals_from_logits(u.sigmoid(), y)
    with pytest.warns(UserWarning, match="1 rows hold a probability of 0"):
        hard = signals_from_logits(
            np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 1]), probabilities=True
        )
    assert np.isfinite(hard.margin).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.eye(3)[[0, 1, 2, 0]], "one-hot"),
        (torch.tensor([0, 1, 2, 3]), "0 to 3: they must lie in 0 to 2"),
        (torch.tensor([0, 1, -1, 2]), "-1 to 2"),
        (torch.tensor([0.0, 1.0, 1.0, 2.0]), "integer"),
        (torch.tensor([0, 1]), r"must be \(4,\)"),
    ],
)
def test_bad_labels(labels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        signals_from_logits(torch.randn(4, 3), labels)


def test_bad_logits() -> None:
    labels = torch.zeros(4).long()
    bad = torch.randn(4, 3)
    bad[1, 0] = math.inf
    with pytest.raises(InputError, match="1 of 4 rows"):
        signals_from_logits(bad, labels)
    with pytest.raises(InputError, match="floating"):
        signals_from_logits(torch.ones(4, 3, dtype=torch.int64), labels)
    with pytest.raises(InputError, match=r"\(N, C\)"):
        signals_from_logits(torch.randn(4, 2, 2, 2), labels)
    with pytest.raises(InputError, match="temperature"):
        signals_from_logits(torch.randn(4, 3), labels, 0.0)
    ones = np.ones(2)
    with pytest.raises(InputError, match="loss is not finite for 1"):
        Signals(np.array([1.0, np.nan]), ones, ones, ones, ones, np.zeros(2))


class Net(nn.Module):
    """Batch statistics and dropout: wrong in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(x)))


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def test_model_is_scored_in_eval_mode_and_put_back() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(20, 4, generator=generator) * 3 + 1, torch.arange(20) % 3
    net = Net().train()
    net.norm.eval()  # a frozen layer must stay frozen
    before = {k: v.clone() for k, v in net.state_dict().items()}
    first, second = (model_signals(net, batches(x, y, size)) for size in (5, 5))
    np.testing.assert_array_equal(first.margin, second.margin)
    order = torch.randperm(20, generator=generator)
    shuffled = model_signals(net, batches(x[order], y[order], 7))
    np.testing.assert_allclose(shuffled.margin, first.margin[order], rtol=1e-5, atol=1e-6)
    assert net.training
    assert net.drop.training
    assert not net.norm.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        want = signals_from_logits(net.eval()(x), y)
    np.testing.assert_allclose(first.margin, want.margin, rtol=1e-6, atol=1e-6)


def test_model_queries_labels_and_half_precision() -> None:
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    net = Net().eval()
    flips = (lambda b: b, lambda b: b.flip(-1))
    signals = model_signals(net, batches(x, y, 4), queries=flips)
    with torch.no_grad():
        want = torch.stack((net(x), net(x.flip(-1))), 1)
    np.testing.assert_allclose(
        signals.loss, signals_from_logits(want, y).loss, rtol=1e-5, atol=1e-7
    )
    assert model_signals(net, batches(x, y, 4), label="predicted").predicted
    with pytest.warns(UserWarning, match="coarse") as caught:
        model_signals(net.bfloat16(), batches(x.bfloat16(), y, 2))
    assert len(caught) == 1


def test_model_autocast_is_off() -> None:
    net, x, y = Net().eval(), torch.randn(6, 4), torch.arange(6) % 3
    want = model_signals(net, [(x, y)])
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(model_signals(net, [(x, y)]).loss, want.loss)


def test_model_failures_put_the_mode_back() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, x

    net = nn.Sequential(Pair()).train()
    with pytest.raises(InputError, match="gave a tuple"):
        model_signals(net, [(torch.randn(2, 3), torch.zeros(2).long())])
    assert net.training
    with pytest.raises(InputError, match="no batch"):
        model_signals(Net(), [])
    with pytest.raises(InputError, match=r"\(B, C\)"):
        model_signals(nn.Identity(), [(torch.randn(2, 3, 4), torch.zeros(2).long())])


def test_multilabel_is_the_sum_of_binary_losses() -> None:
    z, y = torch.randn(9, 4).double() * 3, torch.randint(0, 2, (9, 4))
    signals = multilabel_signals(z, y)
    bce = nn.functional.binary_cross_entropy_with_logits(z, y.double(), reduction="none").sum(1)
    np.testing.assert_allclose(signals.loss[:, 0], bce, rtol=1e-12)
    p = (-bce).exp()
    np.testing.assert_allclose(signals.margin[:, 0], (p / (1 - p)).log(), rtol=1e-9)
    # One label is a binary head; confident ones must not tie.
    far = torch.tensor([[60.0], [45.0], [-200.0], [31.0], [0.2]]).double()
    ones = torch.ones(5, 1)
    np.testing.assert_allclose(multilabel_signals(far, ones).margin[:, 0], far[:, 0], rtol=1e-12)
    with pytest.raises(InputError, match="0 or 1"):
        multilabel_signals(z, y + 1)


def test_language_model_masks_by_label_not_by_loss() -> None:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(5, 6, 11, generator=generator).double() * 2
    y = torch.randint(0, 11, (5, 6), generator=generator)
    z[0, 2] = 0
    z[0, 2, y[0, 2]] = 1e4  # a loss of exactly 0 still counts
    y[:, 4:] = -100
    y[3, 1:] = -100
    signals = language_model_signals(z, y)
    for n in range(5):
        want = nn.functional.cross_entropy(z[n], y[n], ignore_index=-100).item()
        assert signals.loss[n, 0] == pytest.approx(want, rel=1e-12)
        p = math.exp(-want)
        assert signals.margin[n, 0] == pytest.approx(math.log(p / (1 - p)), rel=1e-9)
    # A single token is a classifier's sample.
    one = language_model_signals(z[:, :1], y[:, :1])
    np.testing.assert_allclose(one.margin, signals_from_logits(z[:, 0], y[:, 0]).margin, rtol=1e-9)
    y[2] = -100
    with pytest.raises(InputError, match="sequence 2 has no token"):
        language_model_signals(z, y)
    with pytest.raises(InputError, match="token ids"):
        language_model_signals(z[:1], y[:1].clamp(min=0) + 11)


def test_regression_is_the_squared_error() -> None:
    signals = regression_signals(np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[1.5, 1.0], [0, 0]]))
    assert signals.loss[:, 0].tolist() == [1.25, 0.0]
    assert signals.margin[:, 0].tolist() == [-1.25, -0.0]
    assert np.isnan(signals.correct).all()
    with pytest.raises(InputError, match="one shape"):
        regression_signals(np.zeros(3), np.zeros(4))


def test_select() -> None:
    signals = signals_from_logits(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    part = signals.select(np.array([True, False, True, False]))
    assert len(part) == 2
    assert part.labels.tolist() == [0, 2]
