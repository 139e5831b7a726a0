import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from remanence.compress.layout import Layout, layout_of
from remanence.compress.quantizer import moments as module
from remanence.compress.quantizer.moments import Moments, input_rows
from remanence.errors import InputError


def _layer(kind, axes, groups, stride, padding, dilation):
    make = getattr(nn, f"{kind}{axes}d")
    size = (3, 2, 3)[:axes]
    return make(
        4, 6, size, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=False
    ).double()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rows_times_weight_is_the_convolution(axes):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *(9, 8, 7)[:axes], dtype=torch.float64)
    for groups, stride, padding, dilation in itertools.product((1, 2), (1, 2), (0, 2), (1, 2)):
        layer = _layer("Conv", axes, groups, stride, padding, dilation)
        layout = layout_of(layer)
        rows = input_rows(x, layout=layout, stride=stride, padding=padding, dilation=dilation)
        weight = layout.to_rows(layer.weight).reshape(groups, -1, layout.row_length)
        wanted = layer(x)
        out = torch.einsum("ngr,gor->ngo", rows, weight).flatten(1)
        out = out.reshape(2, *wanted.shape[2:], 6).movedim(-1, 1)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)


def test_axes_may_differ_and_all_channels_may_stand_alone():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    weight = torch.randn(4, 1, 3, 2, dtype=torch.float64)
    layout = Layout("conv", (4, 1, 3, 2), 4)
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3)}
    rows = input_rows(x, layout=layout, **options)
    out = torch.einsum("ngr,gr->ng", rows, weight.flatten(1)).reshape(2, 5, 9, 4).movedim(-1, 1)
    wanted = functional.conv2d(x, weight, None, groups=4, **options)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_scatters_its_rows_products(groups):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    layer = nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, groups=groups, bias=False)
    layer = layer.double()
    layout = layout_of(layer)
    rows = input_rows(x, layout=layout, stride=2, padding=1, transposed=True)
    assert rows.shape == (2 * 5 * 6, groups, 4 // groups)
    weight = layout.to_rows(layer.weight).reshape(groups, -1, layout.row_length)
    taps = torch.einsum("ngr,gor->ngo", rows, weight).reshape(2, 30, 6 * 6).mT
    wanted = layer(x)
    high, wide = (5 - 1) * 2 + 3, (6 - 1) * 2 + 2
    out = functional.fold(taps, (high, wide), (3, 2), stride=2)[..., 1:-1, 1:-1]
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)


def test_linear_rows_are_the_input_of_any_rank():
    x = torch.randn(2, 3, 4, 5)
    rows = input_rows(x, layout=Layout("linear", (7, 5)))
    assert torch.equal(rows, x.reshape(24, 1, 5))


def test_sampled_positions_are_distinct_rows_of_all_and_follow_the_generator():
    torch.manual_seed(0)
    x, layout = torch.randn(3, 4, 6, 6), Layout("conv", (5, 4, 3, 3))
    every = input_rows(x, layout=layout, padding=1)
    draws = [
        input_rows(
            x, layout=layout, padding=1, positions=50, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    matches = (draws[0][:, None] == every[None]).flatten(2).all(2)
    assert matches.sum(1).eq(1).all()
    assert matches.sum(0).max() == 1
    assert len(input_rows(x, layout=layout, positions=10**6)) == 3 * 16


def test_moments_are_those_of_all_rows_together(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(module, "TILE", 5)
    torch.manual_seed(0)
    layout = Layout("conv", (6, 4, 3), 2)
    student = torch.randn(100, 2, 12, dtype=torch.float64) + 1
    teacher = student + torch.randn(100, 2, 12, dtype=torch.float64)
    one, two = Moments(layout), Moments(layout)
    one.add(student[:30], teacher[:30])
    two.add(student[30:31], teacher[30:31])
    two.add(student[31:], teacher[31:])
    one.merge(two)
    assert one.count == 100
    second = torch.einsum("ngi,ngj->gij", student, student) / 100
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(one.second, second, **close)
    torch.testing.assert_close(
        one.cross, torch.einsum("ngi,ngj->gij", teacher, student) / 100, **close
    )
    torch.testing.assert_close(one.mean, student.mean(0), **close)
    torch.testing.assert_close(one.teacher_mean, teacher.mean(0), **close)
    # The paper's matrix: blocks of the input stacked, times themselves.
    stacked = student.reshape(-1, 3)
    torch.testing.assert_close(one.shared(3), stacked.T @ stacked / 100 / 2, **close)
    blocks = one.blocks(6)
    assert blocks.shape == (2, 2, 6, 6)
    torch.testing.assert_close(blocks[1, 1], second[1, 6:, 6:], **close)


def test_processes_sum_what_each_saw(monkeypatch):
    rows = torch.randn(10, 1, 8)
    moments = Moments(Layout("linear", (4, 8)))
    moments.add(rows, 2 * rows)
    before = moments.second, moments.cross, moments.mean, moments.teacher_mean
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "all_reduce", lambda tensor: tensor.mul_(3))
    moments.all_reduce()
    assert moments.count == 30
    after = moments.second, moments.cross, moments.mean, moments.teacher_mean
    torch.testing.assert_close(after, before)


def test_half_precision_rows_are_summed_in_single():
    torch.manual_seed(0)
    rows = torch.randn(3000, 1, 8).bfloat16()
    moments = Moments(Layout("linear", (4, 8)))
    moments.add(rows)
    exact = rows.double().flatten(1)
    torch.testing.assert_close(moments.second[0], exact.T @ exact / 3000, rtol=1e-5, atol=1e-6)


def test_a_long_row_keeps_aligned_pieces(monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 40)
    monkeypatch.setattr(module, "PIECE", 32)
    torch.manual_seed(0)
    layout = Layout("linear", (4, 60))
    rows = torch.randn(50, 1, 60, dtype=torch.float64)
    moments = Moments(layout, block=12)
    moments.add(rows, rows)
    assert [(p.start, p.stop) for p in moments.pieces] == [(0, 24), (24, 48), (48, 60)]
    wanted = rows[:, 0, 24:48].T @ rows[:, 0, 24:48] / 50
    torch.testing.assert_close(moments.seconds[1][0], wanted)
    torch.testing.assert_close(moments.crosses[1][0], wanted)
    torch.testing.assert_close(moments.blocks(12)[0, 3], wanted[12:, 12:])
    with pytest.raises(InputError, match="pieces"):
        _ = moments.second
    with pytest.raises(InputError, match="block=5"):
        moments.blocks(5)


def test_centred_moments_are_those_of_rows_less_their_means(monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 6)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 50, 2, 8, dtype=torch.float64) + 3
    layout = Layout("conv", (4, 8, 1, 1), 2)
    moments, wanted = Moments(layout, 2), Moments(layout, 2)
    moments.add(student, teacher)
    wanted.add(student - student.mean(0), teacher - teacher.mean(0))
    found = moments.centred()
    assert found.count == 50
    for mine, theirs in (
        (found.seconds, wanted.seconds),
        (found.crosses, wanted.crosses),
        (
            (found.blocks(2), found.mean, found.teacher_mean),
            (wanted.blocks(2), *[torch.zeros(2, 8)] * 2),
        ),
    ):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b.double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(moments.mean, student.mean(0))


def test_identity_is_white():
    moments = Moments.identity(Layout("embedding", (50, 8)))
    assert torch.equal(moments.second, torch.eye(8, dtype=torch.float64)[None])
    assert torch.equal(moments.mean, torch.zeros(1, 8, dtype=torch.float64))


def test_bad_rows_are_refused_and_change_nothing():
    layout = Layout("linear", (4, 8))
    moments = Moments(layout)
    with pytest.raises(InputError, match="no rows"):
        _ = moments.second
    rows = torch.randn(5, 1, 8)
    moments.add(rows)
    before = moments.second
    with pytest.raises(InputError, match="NaN"):
        moments.add(rows / 0)
    with pytest.raises(InputError, match="shape"):
        moments.add(rows.squeeze(1))
    with pytest.raises(InputError, match="teacher"):
        moments.add(rows, rows)
    assert torch.equal(moments.second, before)
    with pytest.raises(InputError, match="embedding"):
        input_rows(rows, layout=Layout("embedding", (5, 8)))
    with pytest.raises(InputError, match="channels"):
        input_rows(torch.randn(2, 3, 8, 8), layout=Layout("conv", (4, 4, 3, 3)))
    with pytest.raises(InputError, match="smaller"):
        input_rows(torch.randn(2, 4, 2, 2), layout=Layout("conv", (4, 4, 3, 3)))
