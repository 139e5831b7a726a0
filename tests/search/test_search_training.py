"""Training of a catalyzer: what is drawn and mined, what the loss sees, resuming, two processes."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from remanence.errors import InputError
from remanence.search.catalyzer.network import Catalyzer
from remanence.search.catalyzer.training import Epoch, Settings, Training
from remanence.search.catalyzer.triplet import rank_triplet_loss
from remanence.search.koleo import koleo_loss, koleo_of_uniform
from remanence.search.lattice.sphere import SphereLattice

if TYPE_CHECKING:
    from pathlib import Path

N = 600
QUICK = Settings(epochs=2, batch_size=64, negative=20)


def vectors(n: int = N, seed: int = 0) -> Tensor:
    """Make vectors near a curved surface, so that there is something to learn."""
    g = torch.Generator().manual_seed(seed)
    return torch.tanh(torch.randn(n, 4, generator=g) @ torch.randn(4, 12, generator=g))


def training(
    settings: Settings = QUICK,
    x: Tensor | None = None,
    dims: tuple[int, ...] = (4, 8),
    *,
    shortcut: bool = True,
    **more: Any,
) -> Training:
    torch.manual_seed(0)
    x = vectors() if x is None else x
    return Training(Catalyzer(x.shape[1], dims, hidden=32, shortcut=shortcut), x, settings, **more)


def run(trained: Training) -> list[Epoch]:
    return list(trained.epochs())


def images(trained: Training, dim: int = 8, x: Tensor | None = None) -> Tensor:
    return trained.catalyzer.at(dim).embed(trained.vectors if x is None else x)


def same(first: Training, second: Training) -> bool:
    pairs = zip(
        first.catalyzer.state_dict().items(), second.catalyzer.state_dict().items(), strict=True
    )
    return all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


def gaps_to_others(z: Tensor, base: Tensor) -> Tensor:
    gaps = (z.double().unsqueeze(1) - base.double().unsqueeze(0)).norm(dim=2)
    return gaps.fill_diagonal_(math.inf)


class Watched:
    """What reaches the network in training, as numbers of vectors, and what is mined."""

    def __init__(self, watched: Training) -> None:
        self.training = watched
        self.number = {row.numpy().tobytes(): i for i, row in enumerate(watched.vectors.float())}
        self.mined: list[Tensor] = []
        self.modes: list[bool] = []
        self.steps: list[Tensor] = []  # (roles, batch)
        mine = watched.negatives

        def negatives(generator: torch.Generator) -> Tensor:
            self.mined.append(mine(generator))
            return self.mined[-1]

        watched.negatives = negatives  # type: ignore[method-assign]  # a spy
        watched.catalyzer.register_forward_pre_hook(self.see)

    def see(self, network: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        if network.training:
            rows = [self.number[row.numpy().tobytes()] for row in x]
            self.steps.append(torch.tensor(rows).view(-1, self.training.settings.batch_size))
        else:
            assert not torch.is_grad_enabled()


# --- triplets


def test_triplets_are_what_they_should_be() -> None:
    trained = training()
    watched = Watched(trained)
    x = trained.vectors
    near = gaps_to_others(x, x).argsort(dim=1)[:, :10]
    orders = []
    for number, _ in enumerate(trained.epochs()):
        steps, watched.steps = watched.steps, []
        assert len(steps) == N // 64
        anchor, positive, short, full = torch.cat(steps, 1)
        assert len(anchor.unique()) == len(anchor) == N // 64 * 64
        orders.append(anchor)
        assert (near[anchor] == positive.unsqueeze(1)).any(1).all()
        assert not (positive == anchor).any()
        draws = (near[anchor] == positive.unsqueeze(1)).int().argmax(1).bincount(minlength=10)
        assert draws.min() > 0.5 * len(anchor) / 10
        assert torch.equal(watched.mined[number][anchor, 0], short)
        assert torch.equal(watched.mined[number][anchor, 1], full)
    assert not torch.equal(*orders)
    first, second = watched.mined
    assert (first != second).float().mean() > 0.5
    assert (first[:, 0] != first[:, 1]).float().mean() > 0.5


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_negative_is_of_exactly_that_rank_among_others(epochs: int) -> None:
    """In eval mode: whatever the mode, with no statistics touched."""
    trained = training(replace(QUICK, epochs=max(epochs, 1)))
    if epochs:
        run(trained)
    before = {name: value.clone() for name, value in trained.catalyzer.state_dict().items()}
    trained.catalyzer.train()
    trained.catalyzer.body[1].eval()
    found = trained.negatives(torch.Generator())
    assert trained.catalyzer.body[4].training
    assert not trained.catalyzer.body[1].training
    for name, value in trained.catalyzer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert found.shape == (N, 2)
    for column, dim in enumerate((4, 8)):
        z = images(trained, dim)
        gaps, order = gaps_to_others(z, z).sort(dim=1)
        assert (found[:, column] == order[:, 19]).float().mean() > 0.99  # the 20th
        real = (z - z[found[:, column]]).double().norm(dim=1)
        assert torch.allclose(real, gaps[:, 19], atol=1e-5)


def test_mining_embeds_every_vector_once_for_all_dimensions() -> None:
    trained = training()
    rows = []
    trained.catalyzer.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    trained.negatives(torch.Generator())
    assert sum(rows) == N


def test_neighbours_are_those_of_brute_force_whatever_the_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("remanence.search.catalyzer.training.ROWS", 77)
    trained, told = training(), []
    trained.find_neighbours(told.append)
    assert told == 7 * [77] + [61]
    trained.find_neighbours(told.append)  # found once
    assert sum(told) == N
    near = gaps_to_others(trained.vectors, trained.vectors).argsort(dim=1)[:, :10]
    assert trained.neighbours is not None
    assert (trained.neighbours == near).float().mean() > 0.99


def test_a_pool_has_its_rank_in_proportion() -> None:
    trained = training(replace(QUICK, pool=150), dims=(8,))
    found = [trained.negatives(torch.Generator().manual_seed(seed))[:, 0] for seed in range(2)]
    z = images(trained)
    gaps = gaps_to_others(z, z)
    for seed in range(2):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        pool = order[:150].sort().values
        expected = pool[gaps[:, pool].argsort(dim=1)[:, 20 * 150 // N - 1]]  # the 5th
        assert (found[seed] == expected).float().mean() > 0.99
    assert set(found[0].tolist()) != set(found[1].tolist())
    assert torch.equal(
        training(replace(QUICK, pool=N), dims=(8,)).negatives(torch.Generator()),
        training(dims=(8,)).negatives(torch.Generator()),
    )


def test_the_pool_is_drawn_anew_and_not_as_the_anchors_are() -> None:
    trained = training(replace(QUICK, pool=150))
    watched = Watched(trained)
    run(trained)
    first, second = (set(mined.flatten().tolist()) for mined in watched.mined)
    assert len(first & second) < 0.5 * len(first)
    anchors = set(torch.cat(watched.steps, 1)[0][:150].tolist())
    assert len(first & anchors) < 0.5 * len(first)


def test_duplicates_are_never_oneself() -> None:
    """30 copies of each of 20 vectors: more than the positives, and than the negative's rank."""
    x = vectors(20).repeat(30, 1)
    trained = training(x=x)
    trained.find_neighbours()
    itself = torch.arange(N)
    assert trained.neighbours is not None
    assert trained.neighbours.shape == (N, 10)
    assert not (trained.neighbours == itself.unsqueeze(1)).any()
    assert (trained.neighbours % 20 == (itself % 20).unsqueeze(1)).all()
    assert all(len(set(row)) == 10 for row in trained.neighbours.tolist())
    found = trained.negatives(torch.Generator())
    assert not (found == itself.unsqueeze(1)).any()
    assert (found % 20 == (itself % 20).unsqueeze(1)).all()  # 29 copies lie before all else
    run(trained)
    assert images(trained).isfinite().all()


def test_neighbours_far_from_the_origin() -> None:
    x = (vectors() * 1024).round() / 1024
    near, far = training(x=x), training(x=x + 2048)
    near.find_neighbours()
    far.find_neighbours()
    assert near.neighbours is not None
    assert far.neighbours is not None
    assert (near.neighbours == far.neighbours).float().mean() > 0.99


# --- the loss


def outputs(batch: int, dims: tuple[int, ...] = (4, 8)) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(batch * (2 + len(dims)), dims[-1], generator=g).requires_grad_()


def unit(z: Tensor) -> Tensor:
    return z / z.norm(dim=1, keepdim=True)


def test_the_loss_is_that_of_all_dimensions() -> None:
    out = outputs(64)
    rank, koleo, satisfied = training()._losses(out, 64)
    anchor, positive, short, full = out.detach().split(64)
    expected = [
        (unit(anchor[:, :d]), unit(positive[:, :d]), unit(negative[:, :d]))
        for d, negative in ((4, short), (8, full))
    ]
    assert rank.item() == pytest.approx(
        sum(rank_triplet_loss(*triplet).item() for triplet in expected), abs=1e-5
    )
    spread = sum(koleo_loss(anchor).item() for anchor, _, _ in expected)
    assert koleo.item() == pytest.approx(spread, abs=1e-5)
    share = sum(
        ((a - p).norm(dim=1) <= (a - n).norm(dim=1)).float().mean().item() for a, p, n in expected
    )
    assert satisfied.item() == pytest.approx(share)
    (of_rank,) = torch.autograd.grad(rank, out, retain_graph=True)
    (of_koleo,) = torch.autograd.grad(koleo, out)
    assert of_rank[64:].abs().sum(1).count_nonzero() > 64
    assert not of_koleo[64:].any()
    assert of_koleo[:64].any(1).all()


def test_straight_through_is_the_code_with_the_gradient_of_the_identity() -> None:
    code = SphereLattice(8, 10)
    z = unit(outputs(16)).detach().requires_grad_()
    quantised = code.straight_through(z)
    points = quantised.detach() * math.sqrt(10)
    assert torch.allclose(points, points.round(), atol=1e-5)
    assert torch.equal(quantised.detach(), code.decode(code.encode(z.detach())))
    weight = outputs(16).detach()
    (gradient,) = torch.autograd.grad((quantised * weight).sum(), z)
    assert torch.equal(gradient, weight)


def test_codes_quantise_all_but_anchors() -> None:
    """And only at the dimension that has one."""
    code = SphereLattice(8, 10)
    out = outputs(64)
    rank, koleo, _ = training(codes={8: code})._losses(out, 64)
    anchor, positive, short, full = out.detach().split(64)
    a, p, n = (unit(z).requires_grad_() for z in (anchor, positive, full))
    q = [code.decode(code.encode(z.detach())).requires_grad_() for z in (p, n)]
    with_code = rank_triplet_loss(a, *q)
    plain = rank_triplet_loss(*(unit(z[:, :4]) for z in (anchor, positive, short)))
    assert rank.item() == pytest.approx((with_code + plain).item(), abs=1e-5)
    assert koleo.item() == pytest.approx(
        (koleo_loss(anchor) + koleo_loss(anchor[:, :4])).item(), abs=1e-5
    )
    # The gradient passes the rounding as if it were not there: of the code, at the unit vectors.
    (seen,) = torch.autograd.grad(rank, out)
    slopes = torch.autograd.grad(with_code, [a, *q])
    projected = []
    for z, slope in zip((anchor, positive, full), slopes, strict=True):
        leaf = z.clone().requires_grad_()
        (of_leaf,) = torch.autograd.grad((unit(leaf) * slope).sum(), leaf)
        projected.append(of_leaf)
    # Coordinates 5 to 8 belong to the larger dimension only.
    assert torch.allclose(seen[:64, 4:], projected[0][:, 4:], atol=1e-6)
    assert torch.allclose(seen[64:128, 4:], projected[1][:, 4:], atol=1e-6)
    assert torch.allclose(seen[192:], projected[2], atol=1e-6)
    assert projected[1].any()
    assert projected[2].any()


def test_codes_mine_a_quantised_base_for_plain_anchors() -> None:
    code = SphereLattice(8, 10)
    trained = training(codes={8: code})
    found = trained.negatives(torch.Generator())
    z = images(trained)
    decoded = code.decode(code.encode(z))
    gaps = gaps_to_others(z, decoded)
    ranked = gaps.sort(dim=1).values
    real = gaps.gather(1, found[:, 1:])[:, 0]
    assert torch.allclose(real, ranked[:, 19], atol=1e-5)  # distances: many share a point
    both = gaps_to_others(decoded, decoded)
    assert (both.gather(1, found[:, 1:])[:, 0] - both.sort(dim=1).values[:, 19]).abs().max() > 0.01
    # The dimension without a code is mined as ever.
    plain = training().negatives(torch.Generator())
    assert torch.equal(found[:, 0], plain[:, 0])
    assert (found[:, 1] != plain[:, 1]).float().mean() > 0.3


def test_training_end_to_end_goes_on_from_a_trained_network() -> None:
    first = training(replace(QUICK, epochs=6), dims=(8,))
    run(first)
    digest = first.catalyzer.at(8).digest
    code = SphereLattice(8, 4)
    settings = replace(QUICK, epochs=6, lr=1e-3)
    second = Training(first.catalyzer, first.vectors, settings, codes={8: code})
    assert second.catalyzer.at(8).digest == digest
    shown = run(second)
    assert second.catalyzer.at(8).digest != digest
    assert shown[-1].rank_loss < shown[0].rank_loss
    assert images(second).isfinite().all()


def test_koleo_spreads() -> None:
    settings = replace(QUICK, epochs=8)
    spread, alone = (training(replace(settings, koleo=weight), dims=(8,)) for weight in (0.1, 0.0))
    with_it, without = run(spread)[-1], run(alone)[-1]
    assert with_it.koleo < without.koleo - 0.1
    assert with_it.koleo_of_uniform == without.koleo_of_uniform == koleo_of_uniform(64, 8)
    assert koleo_loss(images(spread)).item() < koleo_loss(images(alone)).item() - 0.1


def test_training_learns_ranks() -> None:
    """Counted by the nearest vectors that stay among the 5 nearest."""
    trained = training(replace(QUICK, epochs=12, koleo=0.0), dims=(4,), shortcut=False)
    truth = gaps_to_others(trained.vectors, trained.vectors).argmin(1)

    def share(z: Tensor) -> float:
        order = gaps_to_others(z, z).argsort(dim=1)[:, :5]
        return (order == truth.unsqueeze(1)).any(1).float().mean().item()

    before = share(images(trained, 4))
    shown = run(trained)
    assert share(images(trained, 4)) > before + 0.1
    assert [epoch.number for epoch in shown] == list(range(1, 13))
    assert all(epoch.rank_loss > 0 and 0 < epoch.satisfied < 1 for epoch in shown)


def test_an_epoch_shows_means_over_steps_and_dimensions() -> None:
    trained = training(replace(QUICK, epochs=1))
    seen = []
    losses = trained._losses

    def spy(out: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(losses(out, n))
        return seen[-1]

    trained._losses = spy  # type: ignore[method-assign]  # a spy
    (epoch,) = run(trained)
    means = torch.stack([torch.stack(step) for step in seen]).mean(0) / 2
    assert means.tolist() == pytest.approx(
        [epoch.rank_loss, epoch.koleo, epoch.satisfied], abs=1e-5
    )
    assert epoch.koleo_of_uniform == pytest.approx(
        (koleo_of_uniform(64, 4) + koleo_of_uniform(64, 8)) / 2
    )


def test_the_rate_falls_along_a_cosine() -> None:
    trained, rates = training(), []
    for _ in trained.epochs(lambda: rates.append(trained.optimizer.param_groups[0]["lr"])):
        assert trained.catalyzer.training
    steps = 2 * (N // 64)
    assert not trained.catalyzer.training
    assert rates == pytest.approx(
        [2e-3 * 0.5 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)]
    )


# --- inputs of any kind


def test_scale_and_shift_of_the_inputs_change_nothing() -> None:
    """A network in float64, where rounding differs by too little for Adam to make it a step."""
    x, fresh = ((vectors(n, seed) * 256).round() / 256 for n, seed in ((N, 0), (50, 9)))
    trained = []
    for scale, shift in ((1, 0), (1000, 5)):
        torch.manual_seed(0)
        network = Catalyzer(12, (4, 8), hidden=32).double()
        trained.append(Training(network, scale * x + shift, replace(QUICK, epochs=3)))
        run(trained[-1])
    plain, moved = trained
    for dim in (4, 8):
        assert (images(plain, dim) - images(moved, dim)).abs().max() < 1e-3
        of_fresh = images(moved, dim, 1000 * fresh + 5)
        assert (images(plain, dim, fresh) - of_fresh).abs().max() < 1e-3


def test_a_scale_without_rounding_changes_no_bit() -> None:
    plain, scaled = training(), training(x=1024 * vectors())
    run(plain)
    run(scaled)
    assert torch.equal(images(plain), images(scaled))


def test_bytes_and_doubles_train_as_floats() -> None:
    x = (vectors() * 100 + 128).to(torch.uint8)
    of_bytes, of_floats, of_doubles = (training(x=kind) for kind in (x, x.float(), x.double()))
    for trained in (of_bytes, of_floats, of_doubles):
        run(trained)
    assert same(of_bytes, of_floats)
    assert same(of_bytes, of_doubles)


def test_bfloat16_stays_inside() -> None:
    trained = training(replace(QUICK, bfloat16=True))
    run(trained)
    assert {p.dtype for p in trained.catalyzer.parameters()} == {torch.float32}
    plain = training()
    run(plain)
    assert not same(trained, plain)
    assert (images(trained) - images(plain)).norm(dim=1).mean() < 0.5


@pytest.mark.parametrize("seed", [1, -1, 2**31, 2**62 + 1])
def test_seeds_of_any_size(seed: int) -> None:
    first, second, other = (training(seed=s) for s in (seed, seed, 0))
    for trained in (first, second, other):
        run(trained)
    assert same(first, second)
    assert not same(first, other)


# --- resuming


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    settings = replace(QUICK, epochs=4, pool=200)
    more: dict[str, Any] = {"codes": {8: SphereLattice(8, 10)}, "seed": 5}
    whole = training(settings, **more)
    shown = run(whole)
    stopped = training(settings, **more)
    for epoch in stopped.epochs():
        if epoch.number == 2:
            break
    torch.save(stopped.state_dict(), tmp_path / "state")
    torch.manual_seed(99)
    resumed = Training(Catalyzer(12, (4, 8), hidden=32), vectors(), settings, **more)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert same(resumed, stopped)
    assert run(resumed) == shown[2:]
    assert same(resumed, whole)
    assert resumed.catalyzer.at(8).digest == whole.catalyzer.at(8).digest
    assert not run(resumed)  # nothing is left


# --- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positives": 0}, "at least 1 of each"),
        ({"negative": 0}, "at least 1 of each"),
        ({"negative": 61}, "600 training vectors .* at least 610"),
        ({"positives": 301}, "at least 602"),
        ({"batch_size": 1}, "give 2 to 600"),
        ({"batch_size": 601}, "give 2 to 600"),
        ({"koleo": -0.1}, "KoLeo weight -0.1"),
        ({"koleo": math.nan}, "KoLeo weight nan"),
        ({"koleo": math.inf}, "KoLeo weight inf"),
        ({"epochs": 0}, "0 epochs"),
        ({"lr": 0.0}, "rate 0.0"),
        ({"lr": math.nan}, "rate nan"),
        ({"lr": math.inf}, "rate inf"),
        ({"pool": 29}, "a pool of 29 .* at least 30"),
        ({"pool": 0}, "a pool of 0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        training(replace(QUICK, **changes))
    assert "\n" not in str(caught.value)


def test_smallest_settings_run() -> None:
    run(training(Settings(epochs=1, batch_size=2, negative=1, positives=1), vectors(10)))
    run(training(replace(QUICK, epochs=1, pool=30)))
    run(training(replace(QUICK, epochs=1, batch_size=600)))


def test_unfit_vectors() -> None:
    broken = vectors()
    broken[77, 3] = math.nan
    for message, x in {
        "row 77 holds NaN": broken,
        "all the same": torch.full((N, 12), 0.3),
        r"\(600, 11\)": vectors()[:, :11],
        r"\(600,\)": vectors()[:, 0],
        "199 training vectors .* at least 200": vectors(199),
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            Training(Catalyzer(12, [8], hidden=32), x, QUICK)
        assert "\n" not in str(caught.value)


def test_codes_that_fit_no_output() -> None:
    for codes in ({6: SphereLattice(6, 4)}, {8: SphereLattice(4, 4)}):
        with pytest.raises(InputError, match="give codes for 4, 8") as caught:
            training(codes=codes)
        assert "\n" not in str(caught.value)


def test_a_breakdown_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for weight in (math.nan, math.inf):
        trained = training()
        losses = trained._losses

        def broken(out: Tensor, n: int, of: Any = losses, w: float = weight) -> Any:
            rank, koleo, satisfied = of(out, n)
            return rank * w, koleo, satisfied

        monkeypatch.setattr(trained, "_losses", broken)
        with pytest.raises(InputError, match="in epoch 1: lower the rate"):
            run(trained)


# --- several processes

PROGRAM = """
import os
import sys
import torch
import torch.distributed as dist
from remanence.search.catalyzer.network import Catalyzer
from remanence.search.catalyzer.training import Settings, Training
rank, folder, seed = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
x = torch.load(f"{folder}/x")
torch.manual_seed(seed + rank)  # weights differ before the first broadcasts its own
settings = Settings(epochs=4, batch_size=64, negative=20, pool=200)
training = Training(Catalyzer(12, (4, 8), hidden=32), x, settings)
record = {"own": training.own, "gathered": [], "alone": [], "anchors": [], "epochs": []}
number = {row.numpy().tobytes(): i for i, row in enumerate(x)}
mine = training.negatives
def negatives(generator):
    out = training._embed_all()
    record["gathered"].append([training.catalyzer.unit(out, dim) for dim in (4, 8)])
    record["alone"].append([training.catalyzer.at(dim).embed(x) for dim in (4, 8)])
    found = mine(generator)
    record.setdefault("negatives", found)
    return found
training.negatives = negatives
def see(network, inputs):
    if network.training:
        rows = [number[row.numpy().tobytes()] for row in inputs[0][:64]]
        record["anchors"].append(torch.tensor(rows))
training.catalyzer.register_forward_pre_hook(see)
for epoch in training.epochs():
    record["epochs"].append(epoch)
    if epoch.number == 2:
        torch.save(training.state_dict(), f"{folder}/state{rank}")
record["state"] = training.catalyzer.state_dict()
record["grads"] = [p.grad for p in training.catalyzer.parameters()]
again = Training(Catalyzer(12, (4, 8), hidden=32), x, settings)
again.load_state_dict(torch.load(f"{folder}/state0", weights_only=True))  # the first's, for all
list(again.epochs())
record["resumed"] = again.catalyzer.state_dict()
torch.save(record, f"{folder}/{rank}")
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort a process that ends in the usual way
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Train in two processes on 601 vectors; return what each recorded."""
    folder = tmp_path_factory.mktemp("both")
    torch.save(vectors(601), folder / "x")
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), str(folder), "0"])
        for rank in range(2)
    ]
    assert [process.wait(100) for process in processes] == [0, 0]
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(2)]


def test_processes_share_anchors(both: list[dict[str, Any]]) -> None:
    own = [record["own"] for record in both]
    assert [len(o) for o in own] == [301, 300]
    assert torch.equal(torch.cat(own).sort().values, torch.arange(601))
    for record in both:
        assert len(record["anchors"]) == 4 * 4
        for epoch in range(4):
            anchors = torch.cat(record["anchors"][4 * epoch : 4 * epoch + 4])
            assert len(anchors.unique()) == 256
            assert torch.isin(anchors, record["own"]).all()


def test_processes_hold_one_network(both: list[dict[str, Any]]) -> None:
    """Running statistics too: they are of each process's own batches."""
    first, second = both
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    for grad, other in zip(first["grads"], second["grads"], strict=True):
        assert torch.equal(grad, other)
    assert first["epochs"] == second["epochs"]
    fresh = Training(Catalyzer(12, (4, 8), hidden=32), vectors(601), QUICK).catalyzer.state_dict()
    assert torch.allclose(first["state"]["shift"], fresh["shift"])
    assert torch.allclose(first["state"]["scale"], fresh["scale"])
    assert first["state"]["body.1.num_batches_tracked"] == 16


def test_processes_gather_what_one_would_embed(both: list[dict[str, Any]]) -> None:
    for epoch in range(4):
        for column in range(2):
            gathered = [record["gathered"][epoch][column] for record in both]
            assert gathered[0].shape == (601, (4, 8)[column])
            assert torch.equal(*gathered)
            for record in both:
                assert (gathered[0] - record["alone"][epoch][column]).abs().max() < 1e-6


def test_processes_mine_what_one_would(both: list[dict[str, Any]]) -> None:
    settings = Settings(epochs=4, batch_size=64, negative=20, pool=200)
    alone = training(settings, vectors(601))
    expected = alone.negatives(alone._generator(0))
    for record in both:
        found = expected[record["own"]]
        assert (found == record["negatives"]).float().mean() > 0.99


def test_processes_resume_from_the_state_of_the_first(both: list[dict[str, Any]]) -> None:
    for record in both:
        for name, value in record["resumed"].items():
            assert torch.equal(value, record["state"][name]), name


def test_a_batch_larger_than_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    dist = torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="batches of 301 of 300 vectors a process: give 2 to 300"):
        training(replace(QUICK, batch_size=301))
