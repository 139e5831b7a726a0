import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from remanence.audit.dejavu.capacity import CapacityPoint, capacity, search
from remanence.audit.dejavu.memorize import fit_memorizer
from remanence.audit.dejavu.pixels import distinct, pixel_hashes
from remanence.audit.dejavu.sampling import InOutBatchSampler, MembershipTask
from remanence.audit.dejavu.transforms import (
    TRAINING,
    mirror,
    random_flip,
    random_resized_crop,
    random_shift,
)
from remanence.errors import InputError


def pool(n, side=4, seed=0):
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(seed))


def mlp(width=64):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 1))


def normalised_mlp(width=64, depth=3):
    blocks = [
        nn.Sequential(nn.Linear(16 if i == 0 else width, width), nn.BatchNorm1d(width), nn.ReLU())
        for i in range(depth)
    ]
    return nn.Sequential(nn.Flatten(), *blocks, nn.Linear(width, 1))


# --- the task -----------------------------------------------------------------------------------


def test_task_splits_the_pool():
    images = pool(100)
    task = MembershipTask.draw(images, 20, 30, seed=1)
    parts = [task.positives, task.negatives, task.unseen]
    assert [len(part) for part in parts] == [20, 50, 30]
    assert sorted(torch.cat(parts).tolist()) == list(range(100))
    again = MembershipTask.draw(images, 20, 30, seed=1)
    assert torch.equal(again.positives, task.positives)
    assert not torch.equal(
        MembershipTask.draw(images, 20, 30, seed=2).positives.sort().values,
        task.positives.sort().values,
    )


@pytest.mark.parametrize(("n", "unseen"), [(35, 30), (0, 30), (20, 0), (36, 30)])
def test_task_refuses_sizes(n, unseen):
    with pytest.raises(InputError, match="at least"):
        MembershipTask.draw(pool(100), n, unseen, seed=0)


def test_task_refuses_a_positive_that_is_also_a_negative():
    images = pool(100)
    images[50:] = images[:50]
    with pytest.raises(InputError, match="equal pixels") as error:
        MembershipTask.draw(images, 20, 30, seed=0)
    assert "\n" not in str(error.value)
    assert torch.equal(distinct(images), torch.arange(50))
    MembershipTask.draw(images[distinct(images)], 10, 20, seed=0)


def test_pixel_hashes_do_not_depend_on_layout():
    images = (pool(40, side=6) * 50).to(torch.uint8)
    strided = images.to(memory_format=torch.channels_last)[:, :, :, :]
    assert (pixel_hashes(images) == pixel_hashes(strided)).all()
    changed = images.clone()
    changed[7, 0, 5, 5] += 1
    assert (pixel_hashes(images) != pixel_hashes(changed)).nonzero()[0].tolist() == [7]


# --- the sampler --------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "world"), [(7, 1), (50, 1), (50, 3), (64, 2)])
def test_every_image_once_an_epoch(n, world):
    task = MembershipTask.draw(pool(400), n, 100, seed=0)
    ranks = [
        InOutBatchSampler(task, 32, seed=5, rank=rank, world_size=world) for rank in range(world)
    ]
    positives, negatives, steps = set(task.positives.tolist()), set(task.negatives.tolist()), 80
    streams = [[], []]
    for step in range(steps):
        for sampler in ranks:
            batch = sampler.batch(step).tolist()
            assert len(batch) == 32
            assert set(batch[::2]) <= positives
            assert set(batch[1::2]) <= negatives
            streams[0] += batch[::2]
            streams[1] += batch[1::2]
    orders = []
    for stream, side in zip(streams, (positives, negatives), strict=True):
        epochs = [stream[i : i + len(side)] for i in range(0, len(stream), len(side))]
        assert len(epochs) > 2
        for epoch in epochs[:-1]:
            assert Counter(epoch) == Counter(side)  # once each, whichever rank showed it
        assert epochs[0] != epochs[1]
        orders.append(epochs)
    assert ranks[0].positive_epochs(steps) == steps * 16 * world / n
    few = 3
    shown = set(streams[1][: few * 16 * world])
    assert set(ranks[0].negatives_shown(few).tolist()) == shown
    assert set(ranks[0].negatives_shown(steps).tolist()) == negatives


def test_sampler_resumes_in_the_middle_of_an_epoch():
    task = MembershipTask.draw(pool(400), 50, 100, seed=0)
    whole = InOutBatchSampler(task, 32, seed=5).batches()
    batches = [next(whole) for _ in range(40)]
    resumed = InOutBatchSampler(task, 32, seed=5).batches(17)
    assert all(torch.equal(next(resumed), batch) for batch in batches[17:])
    backwards = InOutBatchSampler(task, 32, seed=5)
    assert all(torch.equal(backwards.batch(i), batches[i]) for i in range(39, -1, -1))
    other = InOutBatchSampler(task, 32, seed=6)
    assert not torch.equal(other.batch(0), batches[0])


def test_sampler_bad_arguments():
    task = MembershipTask.draw(pool(100), 10, 30, seed=0)
    for options in ({"batch_size": 33}, {"batch_size": 0}, {"rank": 2, "world_size": 2}):
        with pytest.raises(InputError, match="give"):
            InOutBatchSampler(task, **options)


# --- transforms ---------------------------------------------------------------------------------


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_random_flip_flips_half_of_the_images():
    images = torch.randn(2000, 3, 4, 5)
    flipped = random_flip(images, generator())
    turned = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert bool((turned ^ kept).all())
    assert 0.45 < turned.float().mean() < 0.55
    assert torch.equal(mirror(images, generator()), images.flip(-1))


def test_random_shift_moves_each_image_by_its_own_whole_pixels():
    images = torch.rand(300, 2, 8, 8) + 1  # no zero inside
    moved = random_shift(images, generator(), reach=2)
    found = Counter()
    for image, result in zip(images, moved, strict=True):
        padded = nn.functional.pad(image, (2, 2, 2, 2))
        fits = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(padded[:, y : y + 8, x : x + 8], result)
        ]
        assert len(fits) == 1
        found[fits[0]] += 1
    assert len(found) == 25
    assert max(found.values()) < 30  # 12 each on average
    assert random_shift(images, generator()).shape == images.shape


def test_random_resized_crop_of_a_ramp_is_a_ramp():
    # Pixel (y, x) holds x in one channel, y in the other: a crop is affine in the inside.
    side = 16
    ramp = torch.stack(
        torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy")
    ).float()
    crops = random_resized_crop(ramp.expand(500, 2, side, side), generator(), smallest=0.25)
    inner = crops[:, :, 1:-1, 1:-1]
    across, down = inner[:, 0, 0], inner[:, 1, :, 0]
    for line in (across, down):
        steps = line.diff(dim=1)
        torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), atol=1e-4, rtol=0)
        assert line.min() >= 0
        assert line.max() <= side - 1
    width, height = across.diff(dim=1)[:, 0], down.diff(dim=1)[:, 0]  # shares of the side
    area = width * height
    assert area.min() >= 0.25 - 1e-3
    assert area.max() <= 1 + 1e-3
    assert 0.5 < area.mean() < 0.7
    assert (width / height).max() <= 4 / 3 + 1e-3
    assert len(area.unique()) > 400
    whole = random_resized_crop(ramp.expand(4, 2, side, side), generator(), 1.0, 1.0)
    torch.testing.assert_close(whole, ramp.expand(4, 2, side, side), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TRAINING)
def test_training_transforms_are_reproducible(name):
    images = torch.rand(20, 3, 8, 8)
    one, two = (TRAINING[name](images, generator(3)) for _ in range(2))
    assert one.shape == images.shape
    assert torch.equal(one, two)
    assert not torch.equal(one, TRAINING[name](images, generator(4)))


# --- the memoriser ------------------------------------------------------------------------------


def test_memoriser_learns_an_arbitrary_set_and_reports_it():
    images = pool(900, seed=3)
    images.requires_grad_(requires_grad=False)
    task = MembershipTask.draw(images, 40, 300, seed=0)
    heard = []
    fitted = fit_memorizer(
        lambda: mlp(width=128),
        images,
        task,
        steps=300,
        views={"flip": mirror},
        progress=lambda *args: heard.append(args),
    )
    report = fitted.report
    assert report.clean.tpr.value > 0.95
    assert report.clean.tnr_seen.value > 0.9
    # 600 negatives of 900 are shown: what was never shown is answered worse, and reported apart.
    assert report.clean.tnr_unseen.value < report.clean.tnr_seen.value - 0.03
    assert (report.n, report.pool, report.unseen, report.steps) == (40, 600, 300, 300)
    assert report.positive_epochs == 300 * 128 / 40
    # Without flips in training, mirrored images of the set are strangers.
    flipped = report.views[0]
    assert flipped.tpr.value < 0.5 < flipped.tpr.value + flipped.tnr_unseen.value
    assert report.reestimated is None

    # The figures from the returned network itself.
    assert not fitted.model.training
    with torch.no_grad():
        says_in = fitted.model(images)[:, 0] > 0
    assert report.clean.tpr.value == says_in[task.positives].double().mean().item()
    assert report.clean.tnr_unseen.value == pytest.approx(
        1 - says_in[task.unseen].double().mean().item()
    )
    assert 0.6 * report.yardsticks.set_bits < report.stored_bits <= report.yardsticks.set_bits
    assert report.bits_per_image == report.stored_bits / 40
    assert report.parameters == 17 * 128 + 129
    assert report.bits_per_parameter == report.stored_bits / report.parameters
    assert [step for step, _, _ in heard] == [50, 100, 150, 200, 250, 300]
    assert heard[-1][1] < heard[0][1]
    json.dumps(asdict(report))


def test_two_runs_are_bitwise_equal_and_leave_the_global_generator():
    images = pool(300)
    task = MembershipTask.draw(images, 20, 100, seed=0)
    before = torch.get_rng_state()
    one, two = (
        fit_memorizer(mlp, images, task, transform=TRAINING["flip+crop"], steps=20)
        for _ in range(2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert one.report == two.report
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_views_do_not_depend_on_each_other():
    images = pool(300)
    task = MembershipTask.draw(images, 20, 100, seed=0)
    views = {"shift": random_shift, "crop": random_resized_crop}
    both = fit_memorizer(mlp, images, task, steps=30, views=views).report.views
    alone = fit_memorizer(mlp, images, task, steps=30, views={"crop": views["crop"]}).report.views
    assert both[1] == alone[0]


def test_negatives_that_were_never_shown_do_not_count_as_seen():
    images = pool(2000)
    task = MembershipTask.draw(images, 20, 100, seed=0)
    report = fit_memorizer(mlp, images, task, steps=5, batch_size=32, views={}).report
    assert report.pool == 20 + 5 * 16


class Spy(nn.Module):
    """A batch-normalised network that writes down which images stand in a training batch."""

    def __init__(self, log):
        super().__init__()
        self.net, self.log = normalised_mlp(), log

    def forward(self, x):
        if self.training:
            self.log.append(x[:, 0, 0, 0].long())
        return self.net(x / 1000)


def test_batch_normalisation_never_sees_one_kind_alone():
    # Positives and negatives in passes of their own would show their kind in the batch statistics.
    images = pool(200)
    images[:, 0, 0, 0] = torch.arange(200.0)
    task = MembershipTask.draw(images, 30, 50, seed=0)
    log = []
    fit_memorizer(lambda: Spy(log), images, task, steps=12, batch_size=32, views={})
    assert len(log) >= 12
    positives = set(task.positives.tolist())
    for batch in log:
        assert len(batch) == 32
        kinds = [int(i) in positives for i in batch]
        assert sum(kinds) == 16
        assert sum(kinds[:16]) == 8  # and so does every even piece, as data parallelism cuts it


def test_batch_normalised_memoriser_answers_in_evaluation_as_in_training():
    """Fed one kind a pass, the same network learns the batch statistics and fails without them."""
    images = pool(4000, seed=1)
    task = MembershipTask.draw(images, 64, 500, seed=0)
    options = {"steps": 300, "batch_size": 128, "views": {}}
    report = fit_memorizer(normalised_mlp, images, task, **options).report
    evaluated = (report.clean.tpr.value + report.clean.tnr_seen.value) / 2
    assert report.train_accuracy > 0.98
    assert evaluated > 0.98
    assert report.reestimated is not None
    assert report.reestimated.tpr.value > 0.98

    torch.manual_seed(0)
    wrong, sampler = normalised_mlp(), InOutBatchSampler(task, 128)
    optimizer = torch.optim.Adam(wrong.parameters(), 2e-3)
    targets = torch.tensor([1.0, 0.0]).repeat_interleave(64)
    hits = []
    for step in range(300):
        batch = sampler.batch(step)
        logits = torch.cat([wrong(images[batch[kind::2]])[:, 0] for kind in (0, 1)])
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
        optimizer.step()
        hits.append(((logits > 0) == targets.bool()).float().mean().item())
    wrong.eval()
    with torch.no_grad():
        says_in = wrong(images)[:, 0] > 0
    trapped = [says_in[task.positives].float().mean(), (~says_in[task.negatives]).float().mean()]
    assert np.mean(hits[-50:]) > 0.98
    assert np.mean(trapped) < 0.9


def test_reestimation_replaces_stale_batch_statistics():
    images = pool(400)
    task = MembershipTask.draw(images, 30, 100, seed=0)

    def stale():
        model = normalised_mlp()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = 0.0  # running statistics stay at 0 and 1
        return model

    report = fit_memorizer(stale, images, task, steps=200, views={}).report
    assert report.reestimated is not None
    assert report.reestimated.balanced_accuracy.value > report.clean.balanced_accuracy.value + 0.05
    assert abs(report.reestimated.tpr.value - report.train_accuracy) < 0.05


def test_plateau_stops_early():
    images = pool(300, seed=2)
    task = MembershipTask.draw(images, 10, 100, seed=0)
    report = fit_memorizer(mlp, images, task, steps=5000, until="plateau", views={}).report
    assert report.steps < 2500
    assert report.clean.tpr.value > 0.95


def test_uint8_pool_and_sgd():
    images = (torch.rand(300, 1, 4, 4) * 255).to(torch.uint8)
    task = MembershipTask.draw(images, 10, 100, seed=0)
    report = fit_memorizer(mlp, images, task, steps=10, optimizer="sgd", views={}).report
    scaled = fit_memorizer(
        mlp, images.float() / 255, task, steps=10, optimizer="sgd", views={}
    ).report
    assert report == scaled


def test_memoriser_refuses():
    images = pool(300)
    task = MembershipTask.draw(images, 10, 100, seed=0)
    cases = [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), images, {}, "one logit"),
        (mlp, images[:50], {}, "the task names image"),
        (mlp, images[:, 0], {}, r"\(N, C, H, W\)"),
        (mlp, images, {"steps": 0}, "at least 1"),
        (mlp, images, {"optimizer": "lion"}, "unknown"),
        (mlp, images, {"lr": 1e30, "optimizer": "sgd"}, "lower lr"),
        (mlp, images, {"batch_size": 31}, "even"),
    ]
    for make, given, options, message in cases:
        with pytest.raises(InputError, match=message):
            fit_memorizer(make, given, task, **{"steps": 60, **options})


# --- capacity -----------------------------------------------------------------------------------


def curve(truth, sizes, ratio=1.1):
    tried = []

    def measure(n):
        tried.append(n)
        return CapacityPoint(n, (0.0,), 0.0, 0.0, 0.0, held=n <= truth)

    return search(measure, sizes, 0.95, ratio), tried


@pytest.mark.parametrize("truth", [64, 100, 127, 700, 1000, 1999])
def test_search_brackets_the_capacity(truth):
    result, tried = curve(truth, [64, 128, 256, 512, 1024, 2048])
    assert result.largest_held <= truth < result.smallest_lost
    assert result.smallest_lost <= result.largest_held * 1.1 or (
        result.smallest_lost == result.largest_held + 1
    )
    assert len(tried) == len(set(tried)) <= 10
    assert [point.n for point in result.points] == sorted(tried)


def test_search_at_its_ends():
    assert curve(10, [64, 128])[0].largest_held == 0
    over, tried = curve(999, [64, 128])
    assert (over.largest_held, over.smallest_lost) == (128, None)
    assert tried == [64, 128]
    assert curve(5, [1, 2, 4, 8], ratio=1.0001)[0].largest_held == 5


def test_capacity_runs_the_memoriser():
    images = pool(400)
    heard = []
    result = capacity(
        lambda: mlp(width=16),
        images,
        sizes=[8, 96],
        target=0.9,
        seeds=2,
        ratio=4.0,
        steps=60,
        progress=lambda n, seed, report: heard.append((n, seed, report.n)),
    )
    assert heard[:2] == [(8, 0, 8), (8, 1, 8)]
    assert result.smallest_lost is not None
    point = result.points[0]
    assert point.balanced_accuracy == sum(point.balanced_accuracies) / 2
    assert point.balanced_accuracies[0] != point.balanced_accuracies[1]
    json.dumps(asdict(result))


def test_capacity_refuses():
    for options in ({"sizes": [200]}, {"sizes": [20, 10]}, {"target": 0.4}, {"seeds": 0}):
        with pytest.raises(InputError, match="give"):
            capacity(mlp, pool(400), **options)
