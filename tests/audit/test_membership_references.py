import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from remanence.audit.membership.designs import balanced_design, public_design
from remanence.audit.membership.references import (
    ReferencePool,
    Schedule,
    _together_is_faster,
    train_references,
)
from remanence.errors import InputError

OPTIONS = {"epochs": 4, "batch_size": 8, "lr": 0.05, "weight_decay": 1e-3, "seed": 3}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def data(n: int = 80) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (n,), generator=generator)
    return torch.randn(n, 3, 4, 4, generator=generator) + labels[:, None, None, None] / 2, labels


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + 0.1 * torch.randn(images.shape, generator=generator)


def state_of(pool: ReferencePool) -> dict[str, Tensor]:
    return pool.parameters | pool.buffers


def assert_same(ours: ReferencePool, theirs: ReferencePool, atol: float) -> None:
    for name, value in state_of(theirs).items():
        torch.testing.assert_close(state_of(ours)[name], value, rtol=0, atol=atol)


# Designs


@settings(max_examples=30, deadline=None)
@given(K=st.sampled_from([2, 4, 10]), N=st.integers(2, 60), seed=st.integers(0, 99))
def test_every_sample_is_in_exactly_half_of_the_sets(K: int, N: int, seed: int) -> None:
    design = balanced_design(K, N, seed)
    assert design.shape == (K, N)
    assert design.dtype == np.bool_
    assert (design.sum(axis=0) == K // 2).all()
    np.testing.assert_array_equal(design, balanced_design(K, N, seed))


def test_memberships_are_even_and_independent() -> None:
    design = balanced_design(4, 60_000, 0)
    assert np.abs(design.mean(axis=1) - 0.5).max() < 0.01
    # The six ways to choose two of four models are equally frequent.
    codes = np.bincount((design * np.array([[1], [2], [4], [8]])).sum(axis=0), minlength=16)
    assert np.abs(codes[codes > 0] / 60_000 - 1 / 6).max() < 0.01
    assert np.abs(np.corrcoef(design[:, :-1].ravel(), design[:, 1:].ravel())[0, 1]) < 0.02


def test_a_group_is_in_or_out_as_a_whole() -> None:
    groups = np.random.default_rng(0).choice(["ada", "bob", "cy", "dee"], 50)
    design = balanced_design(6, 50, 1, groups=groups)
    assert (design.sum(axis=0) == 3).all()
    for name in set(groups):
        own = design[:, groups == name]
        assert (own == own[:, :1]).all()
    assert len({tuple(column) for column in design.T}) > 1


@pytest.mark.parametrize("grouped", [False, True])
def test_stratified_sets_hold_half_of_each_class(*, grouped: bool) -> None:
    labels = np.repeat([0, 1, 2], [40, 41, 19])
    groups = np.arange(100)
    design = balanced_design(8, 100, 2, labels=labels, groups=groups if grouped else None)
    assert (design.sum(axis=0) == 4).all()
    for label, n in zip((0, 1, 2), (40, 41, 19), strict=True):
        assert np.abs(design[:, labels == label].sum(axis=1) - n / 2).max() <= 1
    assert len({tuple(column) for column in design.T}) > 20


def test_public_design_is_the_official_one() -> None:
    split = public_design(30)
    # The release's index logic, with its Python sets.
    state = np.random.RandomState(0)
    drawn = state.choice(60_000, 31_000, replace=False)
    rest = np.array(list(set(range(60_000)).symmetric_difference(set(drawn.tolist()))))
    np.testing.assert_array_equal(split.private, drawn[:15_000])
    np.testing.assert_array_equal(split.test, drawn[15_000:30_000])
    np.testing.assert_array_equal(split.validation, drawn[30_000:])
    np.testing.assert_array_equal(split.public, rest)
    for row in split.design:
        np.testing.assert_array_equal(
            np.flatnonzero(row), np.sort(state.choice(rest, 15_000, replace=False))
        )
    assert (split.design.sum(axis=1) == 15_000).all()
    assert not split.design[:, drawn].any()
    assert len(np.unique(np.concatenate([drawn, split.public]))) == 60_000


def test_bad_designs_name_the_mend() -> None:
    with pytest.raises(InputError, match="even number"):
        balanced_design(3, 10, 0)
    with pytest.raises(InputError, match="one id for each of 10"):
        balanced_design(4, 10, 0, groups=[1, 2])
    with pytest.raises(InputError, match="several classes"):
        balanced_design(4, 3, 0, groups=[1, 1, 2], labels=[0, 1, 1])
    with pytest.raises(InputError, match="n_subset"):
        public_design(3, n_public=10, n_subset=11)


# Training


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("make_model", [mlp, cnn])
def test_together_is_one_by_one_after_20_steps(
    make_model: Callable[[], nn.Module], schedule: Schedule
) -> None:
    images, labels = data()
    design = balanced_design(4, 80, 0)
    assert len(set(design.sum(axis=1))) > 1  # unequal sets
    pools = [
        train_references(
            make_model,
            images,
            labels,
            design,
            schedule=schedule,
            augment=noisy,
            vectorize=vectorize,
            **OPTIONS,
        )
        for vectorize in (True, False)
    ]
    assert_same(pools[0], pools[1], 1e-5)
    if make_model is cnn:
        assert (pools[0].buffers["1.num_batches_tracked"] == 20).all()
        assert pools[0].buffers["1.running_mean"].abs().min(dim=1).values.max() > 1e-3


def test_training_is_textbook_sgd_on_the_stated_stream() -> None:
    images, labels = data()
    design = balanced_design(2, 80, 5)
    seen: list[Tensor] = []

    def record(x: Tensor, _: torch.Generator) -> Tensor:
        seen.append(x.clone())
        return x

    starts: list[nn.Module] = []

    def make() -> nn.Module:
        starts.append(mlp())
        return copy.deepcopy(starts[-1])

    pool = train_references(
        make, images, labels, design, augment=record, vectorize=True, momentum=0.9, **OPTIONS
    )
    k, model = 1, starts[1]
    own = [x for i, x in enumerate(seen) if i % 2 == k]
    assert len(own) == 20
    identity = [(images == image).flatten(1).all(1).nonzero().item() for x in own for image in x]
    members = np.flatnonzero(design[k])
    n = len(members)
    for start in range(0, len(identity) - n, n):  # every pass over the set is a shuffle of it
        assert sorted(identity[start : start + n]) == members.tolist()
    assert identity[:n] != identity[n : 2 * n]

    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for t, x in enumerate(own):
        y = labels[torch.tensor(identity[8 * t : 8 * t + 8])]
        gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                v.copy_(0.9 * v + g + 1e-3 * p)
                p.sub_(0.05 * 0.5 * (1 + np.cos(np.pi * t / 20)) * v)
    for name, p in model.named_parameters():
        torch.testing.assert_close(pool.parameters[name][k], p.detach(), rtol=0, atol=1e-5)


def test_a_model_depends_on_seed_and_k_alone() -> None:
    images, labels = data()
    design = balanced_design(6, 80, 0, labels=np.zeros(80))  # equal sets, so equal steps

    def train(rows: int, chunk_size: int | None = None, seed: int = 3) -> dict[str, Tensor]:
        options = {**OPTIONS, "seed": seed}
        pool = train_references(
            cnn,
            images,
            labels,
            design[:rows],
            augment=noisy,
            chunk_size=chunk_size,
            vectorize=True,
            **options,
        )
        return state_of(pool)

    whole, part, chunked, other = train(6), train(2), train(6, 4), train(6, seed=4)
    for name, value in whole.items():
        torch.testing.assert_close(part[name], value[:2], rtol=0, atol=1e-5)
        torch.testing.assert_close(chunked[name], value, rtol=0, atol=1e-5)
    weights = whole["0.weight"]
    assert (weights[0] - weights[1]).abs().max() > 1e-2
    assert (weights[0] - other["0.weight"][0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("make_model", "batch_size", "together"), [(mlp, 64, True), (cnn, 64, True), (cnn, 512, False)]
)
def test_auto_trains_together_where_that_is_faster(
    make_model: Callable[[], nn.Module], batch_size: int, together: bool
) -> None:
    assert _together_is_faster(make_model(), data()[0], batch_size) == together


def test_training_leaves_the_global_generator_alone() -> None:
    images, labels = data()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train_references(mlp, images, labels, balanced_design(2, 80, 0), **OPTIONS)
    torch.testing.assert_close(torch.rand(3), expected)


def test_references_remember_their_own_samples() -> None:
    images, labels = data()
    labels = torch.randint(3, (80,), generator=torch.Generator().manual_seed(1))
    images = (images * 40 + 100).clamp(0, 255).to(torch.uint8)
    design = balanced_design(6, 80, 0)

    def prepare(x: Tensor) -> Tensor:
        return x.float() / 40 - 2.5

    calls: list[tuple[int, int, float]] = []
    pool = train_references(
        mlp,
        images,
        labels,
        design,
        epochs=60,
        batch_size=10,
        lr=0.1,
        prepare=prepare,
        progress=lambda *call: calls.append(call),
    )
    logits = pool.logits(images, batch=33, prepare=prepare)
    assert logits.shape == (6, 80, 3)
    right = (logits.argmax(dim=2) == labels).numpy()
    assert right[design].mean() > 0.95
    assert right[~design].mean() < 0.6
    assert [call[0] for call in calls] == list(range(6, 361, 6))
    assert calls[-1][1] == 360
    assert calls[-1][2] < calls[0][2]


def test_dropout_differs_between_models_and_frozen_weights_stay() -> None:
    images, labels = data()

    def make() -> nn.Module:
        torch.manual_seed(0)  # equal starts, equal sets: only dropout can tell them apart
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.Dropout(), nn.Linear(9, 3))
        model[1].requires_grad_(requires_grad=False)
        return model

    design = np.ones((2, 80), dtype=np.bool_)
    for vectorize in (True, False):
        pool = train_references(
            make, images, labels, design, vectorize=vectorize, **{**OPTIONS, "batch_size": 80}
        )
        head = pool.parameters["3.weight"]
        assert (head[0] - head[1]).abs().max() > 1e-3
        torch.testing.assert_close(pool.parameters["1.weight"][1], make()[1].weight.detach())


def test_pool_gives_models_and_survives_a_file(tmp_path: Path) -> None:
    images, labels = data()
    pool = train_references(cnn, images, labels, balanced_design(4, 80, 0), **OPTIONS)
    logits = pool.logits(images)
    for k in range(4):
        model = pool.model(k)
        assert not model.training
        with torch.no_grad():
            torch.testing.assert_close(model(images), logits[k], rtol=0, atol=1e-5)
    with torch.no_grad():
        pool.model(0)[0].weight.zero_()  # a copy
    torch.testing.assert_close(pool.logits(images), logits)

    pool.save(tmp_path / "pool.safetensors")
    again = ReferencePool.load(tmp_path / "pool.safetensors", cnn)
    np.testing.assert_array_equal(again.design, pool.design)
    assert_same(again, pool, 0.0)
    torch.testing.assert_close(again.logits(images), logits)
    with pytest.raises(InputError, match="give its architecture"):
        ReferencePool.load(tmp_path / "pool.safetensors", mlp)
    (tmp_path / "other").write_bytes(b"not a pool")
    with pytest.raises(InputError, match="not a reference pool"):
        ReferencePool.load(tmp_path / "other", mlp)

    models = [pool.model(k).train(k == 1) for k in range(4)]
    assert_same(ReferencePool.from_models(models, pool.design), pool, 0.0)
    with pytest.raises(InputError, match="one architecture"):
        ReferencePool.from_models([*models[:3], mlp()], pool.design)
    with pytest.raises(InputError, match="3 models for 4 rows"):
        ReferencePool.from_models(models[:3], pool.design)


def test_bad_input_names_the_mend() -> None:
    images, labels = data()
    design = balanced_design(2, 80, 0)
    with pytest.raises(InputError, match=r"give \(K, N\) bool"):
        train_references(mlp, images, labels, design.astype(int), **OPTIONS)
    with pytest.raises(InputError, match="row 1 of the design is empty"):
        train_references(mlp, images, labels, np.arange(2)[:, None] < [1] * 80, **OPTIONS)
    with pytest.raises(InputError, match="one of each for every sample"):
        train_references(mlp, images[:40], labels, design, **OPTIONS)
    with pytest.raises(InputError, match="not one-hot"):
        train_references(mlp, images, labels.float(), design, **OPTIONS)
    with pytest.raises(InputError, match="give positive ones"):
        train_references(mlp, images, labels, design, **{**OPTIONS, "epochs": 0})
    with pytest.raises(InputError, match="not finite"):
        train_references(mlp, images * torch.nan, labels, design, **OPTIONS)
