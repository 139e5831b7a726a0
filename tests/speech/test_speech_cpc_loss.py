"""The contrastive loss against sums spelt out, closed forms and one process for two."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.speech.cpc import loss as module
from remanence.speech.cpc.loss import CPCLoss

B, S, K, H, N = 3, 11, 4, 6, 9
W = S - K


def drawn(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randn(B, W, K, H, generator=generator, dtype=dtype) * 3
    z = torch.randn(B, S, H, generator=generator, dtype=dtype)
    return predictions.requires_grad_(), z.requires_grad_()


def draws(loss: CPCLoss) -> Tensor:
    t = torch.arange(W).repeat(B)
    return loss._draw(t, B, S, torch.Generator().manual_seed(5)).view(B, W, N)


def by_definition(predictions: Tensor, z: Tensor, candidates: Any) -> tuple[Tensor, Tensor]:
    """`candidates(b, t, k)` gives the negatives' indices; k counts from 1."""
    losses, right = [], []
    for k in range(1, K + 1):
        terms, hits = [], []
        for b in range(B):
            for t in range(predictions.shape[1]):
                p, true = predictions[b, t, k - 1], b * S + t + k
                frames = z.reshape(-1, H)[[true, *candidates(b, t, k)]]
                scores = (p * frames).mean(1)
                terms.append(scores.logsumexp(0) - scores[0])
                rivals = [
                    s for s, c in zip(scores[1:], candidates(b, t, k), strict=True) if c != true
                ]
                hits.append(all(scores[0] > s for s in rivals))
        losses.append(torch.stack(terms).mean())
        right.append(sum(hits) / len(hits))
    return torch.stack(losses), torch.tensor(right)


def same(ours: Any, theirs: Any, predictions: Tensor, z: Tensor) -> None:
    assert torch.allclose(ours[0], theirs[0], atol=1e-12)
    assert torch.allclose(ours[1].double(), theirs[1].double(), atol=1e-6)
    weights = torch.arange(1, K + 1) / K  # each step's gradient, not only their sum's
    grads = torch.autograd.grad((ours[0] * weights).sum(), (predictions, z))
    expected = torch.autograd.grad((theirs[0] * weights).sum(), (predictions, z))
    for a, b in zip(grads, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("exclude_positive", [False, True])
@pytest.mark.parametrize("gathered", [1, 200, 10**6])
def test_sampled(exclude_positive: bool, gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHERED", gathered)
    loss, (predictions, z) = CPCLoss(K, N, exclude_positive=exclude_positive), drawn()
    index = draws(loss)

    def candidates(b: int, t: int, k: int) -> list[int]:
        return [i for i in index[b, t].tolist() if not exclude_positive or i != b * S + t + k]

    assert any(b * S + t + 1 in index[b, t] for b in range(B) for t in range(W))
    ours = loss(predictions, z, torch.Generator().manual_seed(5))
    same(ours, by_definition(predictions, z, candidates), predictions, z)


@pytest.mark.parametrize("table", [1, 500, 10**6])
def test_all_frames(table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TABLE", table)
    predictions, z = drawn()

    def candidates(b: int, t: int, _: int) -> list[int]:
        return [i for i in range(B * S) if not b * S + t < i <= b * S + t + K]

    for width in (W, 2):
        some = predictions[:, :width]
        ours = CPCLoss(K, candidates="all")(some, z)
        same(ours, by_definition(some, z, candidates), predictions, z)


def test_draws_follow_their_law() -> None:
    loss, positions = CPCLoss(K, 20_000), torch.tensor([0, 3, 6] * 2)
    index = loss._draw(positions, B, S, torch.Generator().manual_seed(0))
    window, frame = index // S, index % S
    assert not (frame == positions.unsqueeze(1)).any()
    for row, t in enumerate(positions.tolist()):
        table = torch.bincount(window[row] * S + frame[row], minlength=B * S).view(B, S)
        expected = 20_000 / (B * (S - 1))
        others = torch.tensor([s for s in range(S) if s != t])
        chi2 = ((table[:, others] - expected) ** 2 / expected).sum()
        assert chi2 < 29 + 4 * (2 * 29) ** 0.5


def test_the_generator_alone_decides() -> None:
    predictions, z = drawn()
    loss = CPCLoss(K, N)
    first, again, other = (
        loss(predictions, z, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_zero_features_are_chance_and_never_right() -> None:
    predictions, z = torch.randn(2, 20, 12, 8), torch.zeros(2, 32, 8)
    losses, accuracies = CPCLoss()(predictions, z)
    assert torch.allclose(losses, torch.full((12,), math.log(129)))
    assert not accuracies.any()
    losses, accuracies = CPCLoss(candidates="all")(predictions, z)
    assert torch.allclose(losses, torch.full((12,), math.log(64 - 12 + 1)))
    assert not accuracies.any()


@pytest.mark.parametrize("candidates", ["sampled", "all"])
def test_a_perfect_predictor_is_always_right(candidates: Any) -> None:
    z = torch.eye(B * S).view(B, S, B * S)
    predictions = 1e3 * torch.stack([z[:, k : k + W] for k in range(1, K + 1)], dim=2)
    losses, accuracies = CPCLoss(K, N, candidates=candidates, exclude_positive=True)(predictions, z)
    assert torch.equal(accuracies, torch.ones(K))
    assert losses.max() < 1e-6
    # Not even where the true frame was drawn, and the losses therefore are not 0.
    losses, accuracies = CPCLoss(K, 10 * N)(predictions, z)
    assert torch.equal(accuracies, torch.ones(K))
    assert losses.max() > 0.1


def test_no_negative_left() -> None:
    predictions, z = torch.randn(1, 1, 1, H), torch.randn(1, 2, H)  # the only draw is the true one
    predictions.requires_grad_()
    losses, accuracies = CPCLoss(1, 1, exclude_positive=True)(predictions, z)
    losses.sum().backward()
    assert (losses.item(), accuracies.item()) == (0, 1)
    assert predictions.grad is not None
    assert not predictions.grad.any()


@pytest.mark.parametrize("candidates", ["sampled", "all"])
def test_float32_inside_autocast(candidates: Any) -> None:
    predictions, z = drawn(dtype=torch.float32)
    loss = CPCLoss(K, N, candidates=candidates)
    expected = loss(predictions, z, torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(expected[0].sum(), (predictions, z))
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss(predictions, z, torch.Generator().manual_seed(0))
        # Backward belongs outside; still it must not fail or be coarse inside.
        ours_grads = torch.autograd.grad(ours[0].sum(), (predictions, z))
    assert all(torch.equal(a, b) for a, b in zip(ours + ours_grads, expected + grads, strict=True))
    assert ours[0].dtype == torch.float32
    coarse = loss(predictions.bfloat16(), z.bfloat16(), torch.Generator().manual_seed(0))[0]
    assert coarse.dtype == torch.float32
    assert torch.allclose(coarse, expected[0], atol=0.05)


@pytest.mark.parametrize("candidates", ["sampled", "all"])
def test_what_is_kept_for_the_gradient_is_small(candidates: Any) -> None:
    """Neither the negatives' vectors nor all scores: each would be 4 million numbers here."""
    predictions = torch.randn(4, 64, 8, 128, requires_grad=True)
    z = torch.randn(4, 512, 128, requires_grad=True)
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        CPCLoss(8, 128, candidates=candidates)(predictions, z)
    inputs = predictions.numel() + z.numel()
    assert sum(sizes.values()) - inputs < 2_000_000


def test_bad_input() -> None:
    predictions, z = drawn()
    for message, call in {
        "give \\(B, W, 5, H\\)": lambda: CPCLoss(5)(predictions, z),
        "at most S - 4": lambda: CPCLoss(K)(predictions, z[:, 1:]),
        r"frames \(2, 11, 6\)": lambda: CPCLoss(K)(predictions, z[1:]),
        r"frames \(3, 11, 5\)": lambda: CPCLoss(K)(predictions, z[:, :, 1:]),
        "0 steps": lambda: CPCLoss(0),
        "0 negatives": lambda: CPCLoss(K, 0),
        "candidates 'some'": lambda: CPCLoss(candidates="some"),  # type: ignore[arg-type] # wrong
        "scope 'wide'": lambda: CPCLoss(scope="wide"),  # type: ignore[arg-type] # on purpose
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
from remanence.speech.cpc.loss import CPCLoss
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
predictions = torch.randn(4, 7, 4, 6, generator=generator, dtype=torch.float64)
z = torch.randn(4, 11, 6, generator=generator, dtype=torch.float64)
mine = slice(2 * rank, 2 * rank + 2)
predictions, z = predictions[mine].clone().requires_grad_(), z[mine].clone().requires_grad_()
made = CPCLoss(4, candidates="all", scope="global")(predictions, z)
(made[0].sum() / 2).backward()  # the mean over processes
index = CPCLoss(4, 500, scope="global")
windows = []
draw = index._draw
index._draw = lambda t, count, *rest: windows.append(draw(t, count, *rest) // 11) or windows[0] * 11
index(predictions, z)
torch.save((*(x.detach() for x in made), predictions.grad, z.grad, windows[0].unique()), out)
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort a process that ends in the usual way
"""


@pytest.mark.slow
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
    parts = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(4, 7, 4, 6, generator=generator, dtype=torch.float64)
    z = torch.randn(4, 11, 6, generator=generator, dtype=torch.float64)
    predictions.requires_grad_()
    z.requires_grad_()
    losses, accuracies = CPCLoss(4, candidates="all")(predictions, z)
    losses.sum().backward()
    assert torch.allclose((parts[0][0] + parts[1][0]) / 2, losses, atol=1e-12)
    assert torch.allclose((parts[0][1] + parts[1][1]) / 2, accuracies, atol=1e-6)
    for i, whole in ((2, predictions.grad), (3, z.grad)):
        assert whole is not None
        assert torch.allclose(torch.cat([part[i] for part in parts]), whole, atol=1e-12)
    assert all(part[4].tolist() == [0, 1, 2, 3] for part in parts)  # drawn from everyone's windows
