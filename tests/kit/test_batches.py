import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from remanence.kit.batches import AugmentedImages, Batches, CachedViews, Plan, drawn_view
from remanence.kit.images import open_images
from remanence.learn.fixres import EvalTransform, FinetuneTransform


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 200),
    batch_size=st.integers(1, 64),
    world=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_every_sample_is_counted_once_over_all_processes(count, batch_size, world, epoch):
    seen: list[int] = []
    weights = np.zeros(Plan(count, batch_size, 0).steps)
    for rank in range(world):
        plan = Plan(count, batch_size, 7, rank, world)
        for step, (keys, weight) in enumerate(plan.epoch(epoch)):
            assert all(e == epoch for e, _ in keys)
            seen += [row for _, row in keys]
            weights[step] += weight
    assert sorted(seen) == list(range(count))
    # Averaged over processes, the weights are one: the gradient is that of the mean over samples.
    np.testing.assert_allclose(weights / world, 1.0)


def test_steps_differ_by_one_sample_at_most_and_never_pass_the_batch_size():
    sizes = [len(keys) for keys, _ in Plan(1000, 128, 0).epoch(0)]
    assert sum(sizes) == 1000
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 128


def test_starting_late_gives_the_rest_of_the_same_epoch():
    plan = Plan(50, 8, 3)
    whole = list(plan.epoch(2))
    assert list(plan.epoch(2, start=4)) == whole[4:]
    assert list(plan.epoch(1)) != whole


def test_samples_do_not_depend_on_workers_or_on_what_was_drawn_before():
    images = open_images("digits", split="train", limit=24)
    data = AugmentedImages(images, FinetuneTransform(12), seed=5)
    alone = [b.inputs for b in Batches(data, 8, seed=1, workers=0).epoch(3)]
    torch.rand(17)
    parallel = [b.inputs for b in Batches(data, 8, seed=1, workers=2).epoch(3)]
    late = [b.inputs for b in Batches(data, 8, seed=1, workers=0).epoch(3, start=2)]
    for a, b in zip(alone, parallel, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(late[0], alone[2])
    other = [b.inputs for b in Batches(data, 8, seed=1, workers=0).epoch(4)]
    assert not torch.equal(alone[0], other[0])


class FixedViews(torch.utils.data.Dataset):
    """The uncached twin of `CachedViews`: decodes and transforms each time."""

    def __init__(self, images, views, seed):
        self.images, self.views, self.seed = images, views, seed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, row = key
        view = drawn_view(self.seed, epoch, len(self), len(self.views))[row]
        return self.views[view](self.images.image(row)), int(self.images.labels[row]), row


def test_training_on_cached_features_is_training_on_the_images():
    # A9 item 9: same order, fp32, loss equal to 1e-5 for 100 steps.
    images = open_images("digits", split="train", limit=120)
    views = FinetuneTransform(12, jitter=0.0).variants(3)
    assert len(views) == 6
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.eval()

    def embed(pixels):
        with torch.no_grad():
            return backbone(pixels.float() / 255)

    features = torch.stack(
        [embed(torch.stack([v(images.image(i)) for i in range(len(images))])) for v in views]
    )
    labels = torch.from_numpy(images.labels)
    sources = [
        CachedViews(features, labels, 12, seed=4),
        Batches(FixedViews(images, views, 4), 12, seed=4),
    ]
    losses = []
    for source, encode in zip(sources, [lambda z: z, embed], strict=True):
        torch.manual_seed(1)
        head = nn.Linear(8, 10)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)
        found = []
        for epoch in range(10):
            for batch in source.epoch(epoch):
                loss = nn.functional.cross_entropy(head(encode(batch.inputs)), batch.labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        losses.append(found)
    assert len(losses[0]) == 100
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_the_plain_test_view_is_among_the_cached_ones():
    images = open_images("digits", split="train", limit=3)
    first = FinetuneTransform(12, jitter=0.0).variants(3)[0]
    assert torch.equal(first(images.image(0)), EvalTransform(12)(images.image(0)))


@pytest.mark.parametrize("views", [1, 6])
def test_views_are_drawn_evenly(views):
    drawn = drawn_view(0, 0, 60000, views)
    counts = np.bincount(drawn, minlength=views)
    assert counts.min() > 0.95 * 60000 / views
