"""KoLeo against its definition, closed forms, finite differences and one process for two."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from remanence.errors import InputError
from remanence.search import koleo
from remanence.search.koleo import KoLeoLoss, koleo_loss, koleo_of_uniform


def drawn(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradient(z: Tensor, **options: object) -> Tensor:
    leaf = z.clone().requires_grad_()
    koleo_loss(leaf, **options).backward()
    assert leaf.grad is not None
    return leaf.grad


def defined(z: Tensor, topk: int = 1, exclude: list[int] | None = None) -> float:
    """Return the loss, by loops."""
    unit = z.double() / z.double().norm(dim=1, keepdim=True)
    logs = []
    for i in range(len(z)):
        others = [
            j for j in range(len(z)) if j != i and (exclude is None or exclude[i] != exclude[j])
        ]
        logs += sorted(math.log((unit[i] - unit[j]).norm().item()) for j in others)[:topk]
    return -sum(logs) / len(logs)


# --- values


@pytest.mark.parametrize(("n", "d", "topk"), [(2, 3, 1), (40, 5, 1), (40, 5, 3), (3, 4, 7)])
def test_the_definition(n: int, d: int, topk: int) -> None:
    z = drawn(n, d)
    assert koleo_loss(z, topk=topk).item() == pytest.approx(defined(z, topk), abs=1e-5)
    assert KoLeoLoss(topk=topk)(z).item() == koleo_loss(z, topk=topk).item()


def test_closed_forms() -> None:
    basis = torch.eye(6)
    half_log_2 = 0.5 * math.log(2)
    assert koleo_loss(basis).item() == pytest.approx(-half_log_2, abs=1e-6)
    assert koleo_loss(torch.cat([basis, -basis])).item() == pytest.approx(-half_log_2, abs=1e-6)
    simplex = torch.eye(9) - 1 / 9
    assert koleo_loss(simplex).item() == pytest.approx(-0.405465, abs=1e-6)
    # A diagonal masked by -1 would let each of an antipodal pair find itself.
    antipodal = torch.tensor([[0.6, 0.8], [-0.6, -0.8]])
    assert koleo_loss(antipodal).item() == pytest.approx(-math.log(2), abs=1e-6)


@pytest.mark.parametrize(("n", "d", "value"), [(64, 3, 1.69), (1024, 8, 0.77), (1024, 24, 0.13)])
def test_uniform_vectors_reach_what_is_expected_of_them(n: int, d: int, value: float) -> None:
    assert koleo_of_uniform(n, d) == pytest.approx(value, abs=0.03)
    seen = [koleo_loss(drawn(n, d, seed)).item() for seed in range(12)]
    assert sum(seen) / len(seen) == pytest.approx(koleo_of_uniform(n, d), abs=0.03)


def test_code_form_differs_by_log_n() -> None:
    z = drawn(64, 8)
    unit = torch.nn.functional.normalize(z, dim=1)
    gaps = torch.cdist(unit, unit).fill_diagonal_(math.inf).amin(1)
    assert -(64 * gaps).log().mean().item() == pytest.approx(
        koleo_loss(z).item() - 4.1589, abs=1e-4
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30), st.integers(2, 9), st.integers(0, 999))
def test_rotation_permutation_and_scale_change_nothing(n: int, d: int, seed: int) -> None:
    z = drawn(n, d, seed, torch.float64)
    turn = torch.linalg.qr(drawn(d, d, seed + 1, torch.float64)).Q
    other = (z @ turn)[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] * 1e-30
    assert koleo_loss(other).item() == pytest.approx(koleo_loss(z).item(), abs=1e-9)


def test_close_pairs_keep_their_digits_in_float32() -> None:
    """2 - 2 z.z' in float32 loses these distances, and may find another neighbour."""
    centres = torch.nn.functional.normalize(drawn(5, 16, 0, torch.float64), dim=1)
    z = (centres.repeat(20, 1) + 1e-4 * drawn(100, 16, 1, torch.float64)).float()
    assert koleo_loss(z).item() == pytest.approx(defined(z), abs=1e-3)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z, ids = drawn(101, 6), torch.arange(101) // 3
    whole = koleo_loss(z, topk=2, exclude=ids), gradient(z, topk=2, exclude=ids)
    monkeypatch.setattr(koleo, "TABLE", 700)
    assert torch.equal(koleo_loss(z, topk=2, exclude=ids), whole[0])
    assert torch.equal(gradient(z, topk=2, exclude=ids), whole[1])


# --- gradients


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("topk", [1, 3])
def test_gradient_is_exact(normalize: bool, topk: int) -> None:
    z = drawn(12, 4, 3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: koleo_loss(v, normalize=normalize, topk=topk), z)


def test_gradient_reaches_both_ends() -> None:
    """The third is the neighbour of nobody and the first that of both others."""
    z = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.5, 0.0, 1.0]])
    only_third = koleo_loss(z, exclude=torch.tensor([0, 0, 1]))
    assert only_third.isfinite()
    leaf = z.clone().requires_grad_()
    koleo_loss(leaf, exclude=torch.tensor([0, 0, 1])).backward()
    assert leaf.grad is not None
    assert leaf.grad[0].norm() > 0.1
    assert leaf.grad[2].norm() > 0.1


# --- what breaks others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_duplicates_and_zeros_are_finite(dtype: torch.dtype) -> None:
    z = drawn(6, 4).to(dtype)
    z[1] = z[0]
    z[5] = 0
    assert koleo_loss(z).isfinite()
    grad = gradient(z)
    assert grad.isfinite().all()
    assert not grad[5].any()
    assert grad.abs().max() < 100
    same = z[:1].expand(5, -1).contiguous()
    assert koleo_loss(same).item() == pytest.approx(-math.log(1e-8), abs=1e-4)
    assert not gradient(same).any()


def test_excluded_pairs_are_no_neighbours() -> None:
    z = drawn(12, 5)
    crops = torch.cat([z, z])  # two crops alike of each image
    ids = torch.arange(12).repeat(2)
    value = koleo_loss(crops, exclude=ids).item()
    assert value == pytest.approx(defined(crops, exclude=ids.tolist()), abs=1e-5)
    assert value == pytest.approx(koleo_loss(z).item(), abs=1e-5)
    assert koleo_loss(z, exclude=torch.zeros(12, dtype=torch.int64)).item() == 0


def test_a_vector_without_neighbours_counts_for_nothing() -> None:
    z = drawn(5, 4)
    ids = torch.tensor([0, 0, 0, 0, 1])
    assert koleo_loss(z, exclude=ids, topk=4).item() == pytest.approx(
        defined(z, 4, ids.tolist()), abs=1e-5
    )


def test_one_vector_is_zero_with_a_warning() -> None:
    z = drawn(1, 4).requires_grad_()
    with pytest.warns(UserWarning, match="no neighbour"):
        loss = koleo_loss(z)
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert not z.grad.any()


def test_autocast_and_half_precision_change_nothing() -> None:
    z = drawn(64, 32).bfloat16()
    plain = koleo_loss(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(koleo_loss(z), plain)
    assert koleo_loss(z).dtype == torch.float32
    assert torch.equal(gradient(z), gradient(z.float()).bfloat16())


@pytest.mark.parametrize("scale", [1e-42, 1e-25, 1e25, 1e37])
def test_extreme_lengths(scale: float) -> None:
    z = drawn(20, 4) * scale
    assert koleo_loss(z).item() == pytest.approx(defined(z), abs=1e-4)


def test_nan_is_passed_on() -> None:
    z = drawn(4, 4)
    z[2, 2] = math.nan
    assert koleo_loss(z).isnan()


def test_bad_input() -> None:
    z = drawn(4, 3)
    for message, call in {
        "a vector each row": lambda: koleo_loss(z[0]),
        "give floats": lambda: koleo_loss(z.long()),
        "torch.float32 ": lambda: koleo_loss(z[:0]),
        "give 4 integers": lambda: koleo_loss(z, exclude=torch.arange(3)),
        "topk 0": lambda: KoLeoLoss(topk=0),
        "eps 0": lambda: KoLeoLoss(eps=0.0),
        "of each": lambda: koleo_of_uniform(1, 3),
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


# --- several processes

PROGRAM = """
import os
import sys
import torch
import torch.distributed as dist
from remanence.search.koleo import koleo_loss
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
everyone = torch.randn(11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ids = torch.tensor([0, 1, 2, 3, 0, 1, 4, 5, 6, 6, 7])
mine = slice(0, 4) if rank == 0 else slice(4, 11)
z = everyone[mine].clone().requires_grad_()
losses = []
for exclude in (None, ids[mine]):
    loss = koleo_loss(z, topk=2, exclude=exclude, group=dist.group.WORLD)
    losses.append(loss.item())
    (loss / 2).backward()  # the mean over processes
torch.save((losses, z.grad), out)
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort a process that ends in the usual way
"""


def test_two_processes_are_one(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [
                *[sys.executable, "-W", "error::FutureWarning", "-c", PROGRAM],
                *[str(rank), str(tmp_path / "store"), str(tmp_path / str(rank))],
            ]
        )
        for rank in range(2)
    ]
    assert [process.wait(100) for process in processes] == [0, 0]
    everyone = drawn(11, 5, dtype=torch.float64)
    ids = torch.tensor([0, 1, 2, 3, 0, 1, 4, 5, 6, 6, 7])
    parts = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for i, exclude in enumerate((None, ids)):
        mean = sum(losses[i] for losses, _ in parts) / 2
        whole = koleo_loss(everyone, topk=2, exclude=exclude).item()
        assert mean == pytest.approx(whole, abs=1e-12)
    expected = gradient(everyone, topk=2) + gradient(everyone, topk=2, exclude=ids)
    assert torch.allclose(torch.cat([grad for _, grad in parts]), expected, atol=1e-12)
