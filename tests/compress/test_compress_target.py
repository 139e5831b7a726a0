import pytest
import torch

from remanence.compress.layout import Layout
from remanence.compress.quantizer import moments as moments_module
from remanence.compress.quantizer.moments import Moments
from remanence.compress.quantizer.target import bias_correction, teacher_target
from remanence.errors import InputError

LAYOUT = Layout("conv", (6, 4, 3), 2)  # two groups of 3 rows of length 12


def _inputs(seed=0, n=200):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(n, 2, 12, generator=generator, dtype=torch.float64) + 0.5
    rows = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    return teacher, rows, generator


def _output(rows, x):
    return torch.einsum("ngr,gor->ngo", x, rows.reshape(2, 3, 12))


def test_an_undamaged_input_leaves_the_weight_alone():
    teacher, rows, _ = _inputs()
    moments = Moments(LAYOUT)
    moments.add(teacher, teacher)
    torch.testing.assert_close(teacher_target(rows, moments), rows, rtol=0, atol=1e-12)


def test_an_invertible_damage_is_undone():
    teacher, rows, generator = _inputs()
    mix = torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
    student = torch.einsum("ngr,grs->ngs", teacher, mix)
    moments = Moments(LAYOUT)
    moments.add(student, teacher)
    target = teacher_target(rows, moments, damping=0.0)
    torch.testing.assert_close(_output(target, student), _output(rows, teacher), rtol=0, atol=1e-7)


def test_the_target_is_the_ridge_solution():
    teacher, rows, generator = _inputs()
    student = teacher.relu() + 0.3 * torch.randn(teacher.shape, generator=generator).double()
    moments = Moments(LAYOUT)
    moments.add(student, teacher)
    target = teacher_target(rows, moments, damping=0.05).reshape(2, 3, 12)
    strength = 0.05 * moments.second.diagonal(dim1=1, dim2=2).mean()
    for g in range(2):
        tall = torch.cat([student[:, g] / 200**0.5, strength.sqrt() * torch.eye(12).double()])
        own = rows.reshape(2, 3, 12)[g].T
        aim = torch.cat([teacher[:, g] @ own / 200**0.5, strength.sqrt() * own])
        wanted = torch.linalg.lstsq(tall, aim).solution.T
        torch.testing.assert_close(target[g], wanted, rtol=0, atol=1e-9)


def test_pieces_of_a_long_row_are_solved_each(monkeypatch):
    monkeypatch.setattr(moments_module, "LONGEST", 16)
    monkeypatch.setattr(moments_module, "PIECE", 16)
    generator = torch.Generator().manual_seed(0)
    layout = Layout("linear", (5, 48))
    teacher = torch.randn(300, 1, 48, generator=generator, dtype=torch.float64)
    student = teacher.clone()
    student[..., :16] = teacher[..., :16] @ torch.randn(16, 16, generator=generator).double()
    rows = torch.randn(5, 48, generator=generator, dtype=torch.float64)
    moments = Moments(layout)
    moments.add(student, teacher)
    target = teacher_target(rows, moments, damping=0.0)
    out = student[:, 0] @ target.T
    torch.testing.assert_close(out, teacher[:, 0] @ rows.T, rtol=0, atol=1e-7)
    torch.testing.assert_close(target[:, 16:], rows[:, 16:])


def test_no_signal_leaves_the_weight_alone():
    _, rows, _ = _inputs()
    moments = Moments(LAYOUT)
    moments.add(torch.zeros(9, 2, 12), torch.zeros(9, 2, 12))
    assert torch.equal(teacher_target(rows, moments), rows)


@pytest.mark.parametrize("with_teacher", [False, True])
def test_the_corrected_bias_restores_the_mean_output(with_teacher):
    teacher, rows, generator = _inputs()
    student = teacher.relu() if with_teacher else teacher
    decoded = rows + torch.randn(6, 12, generator=generator, dtype=torch.float64)
    moments = Moments(LAYOUT)
    moments.add(student, teacher if with_teacher else None)
    shift = bias_correction(rows, decoded, moments)
    got = _output(decoded, student).mean(0).flatten() + shift
    torch.testing.assert_close(got, _output(rows, teacher).mean(0).flatten(), rtol=0, atol=1e-10)


def test_what_cannot_be_solved_is_refused():
    teacher, rows, _ = _inputs()
    moments = Moments(LAYOUT)
    moments.add(teacher)
    with pytest.raises(InputError, match="teacher rows"):
        teacher_target(rows, moments)
    few = Moments(LAYOUT)
    few.add(teacher[:5], teacher[:5])
    with pytest.raises(InputError, match="damping"):
        teacher_target(rows, few, damping=0.0)
    assert teacher_target(rows, few).isfinite().all()
    with pytest.raises(InputError, match="rows of shape"):
        bias_correction(rows[:3], rows, moments)
