"""Marks against closed forms where features are linear, and their bounds on a trained network."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from remanence.audit.radioactive.augment import (
    Identity,
    PadCropFlip,
    RandomResizedCropFlip,
    Windows,
    image_generator,
)
from remanence.audit.radioactive.features import FeatureExtractor
from remanence.audit.radioactive.marking import MarkConfig, Marked, MarkingInfeasible, mark
from remanence.audit.radioactive.perturbation import Perturbation
from remanence.errors import InputError

# Short runs on a small network are not meant to get far.
pytestmark = pytest.mark.filterwarnings(
    "ignore::remanence.audit.radioactive.marking.MarkingInfeasible"
)

MEAN, STD = (0.3, 0.4, 0.35), (0.3, 0.25, 0.35)
NORMAL = {"mean": MEAN, "std": STD}
SMALL = MarkConfig.preset("small", iterations=9)
LONG = replace(SMALL, iterations=40)
CROPS = MarkConfig(iterations=5, augment=RandomResizedCropFlip(24))


def unit_rows(k: int, d: int, seed: int = 0) -> Tensor:
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((k, d)))
    return rows / rows.norm(dim=1, keepdim=True)


def normalised(images: Tensor) -> Tensor:
    return (images.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]


def noise(n: int, height: int = 32, width: int = 32) -> Tensor:
    draws = np.random.default_rng(1).integers(0, 256, (n, 3, height, width), dtype=np.uint8)
    return torch.from_numpy(draws)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    grey = torch.from_numpy(data.images).float()[:600, None] * (255 / 16)
    large = interpolate(grey, (32, 32), mode="bilinear").round().to(torch.uint8)
    tint = torch.tensor([0.6, 0.5, 0.4])[:, None, None]
    return (40 + large * tint).round().to(torch.uint8), torch.from_numpy(data.target[:600])


@pytest.fixture(scope="module")
def extractor(digits: tuple[Tensor, Tensor]) -> FeatureExtractor:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.Linear(16, 10),
    )
    images, labels = normalised(digits[0]), digits[1]
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(4):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return FeatureExtractor(model, input_size=(3, 32, 32))


class Linear(nn.Module):
    """Features that are linear in the normalised image, so that the best mark is known."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.flat = nn.Flatten()
        self.features = nn.Linear(3 * side * side, dim)
        self.head = nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.flat(x)))


def mark_digits(
    digits: tuple[Tensor, Tensor], extractor: FeatureExtractor, config: MarkConfig, n: int = 8
) -> Marked[Tensor]:
    return mark(digits[0][:n], digits[1][:n], extractor, unit_rows(10, 16), config=config, **NORMAL)


@pytest.fixture
def grey_images() -> Tensor:
    # Far from black and white, so that no change is clipped there.
    return torch.full((2, 3, 8, 8), 128, dtype=torch.uint8)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_linear_marks_use_the_whole_psnr_in_the_best_direction(
    grey_images: Tensor, optimizer: str
) -> None:
    extractor = FeatureExtractor(Linear(8, 6), input_size=(3, 8, 8))
    u, psnr = unit_rows(2, 6), 30.0
    config = MarkConfig(
        iterations=60,
        radius=100,
        target_psnr=psnr,
        lambda_image=0,
        lambda_feature=0,
        optimizer=optimizer,
        lr=3.0,
        augment=Identity(),
    )
    labels = torch.tensor([0, 1])
    marked = mark(grey_images, labels, extractor, u, config=config, **NORMAL)
    # In grey levels phi = M x / (255 std). SGD climbs along the gradient in normalised units,
    # Adam along its sign, each up to the length that the PSNR allows.
    std = 255 * torch.tensor(STD)[:, None]
    gradient = (u.float() @ extractor.model.features.weight).view(2, 3, 64) / std
    way = (gradient * std.square() if optimizer == "sgd" else gradient.sign()).flatten(1)
    length = (3 * 64 * 255**2 * 10 ** (-psnr / 10)) ** 0.5
    best = length * (gradient.flatten(1) * way).sum(1) / way.norm(dim=1)
    np.testing.assert_allclose(marked.plain_dot, best, rtol=0.015)
    np.testing.assert_allclose(marked.dot, marked.plain_dot, rtol=1e-4)


def test_the_image_term_alone_stops_where_the_gradients_meet(grey_images: Tensor) -> None:
    extractor = FeatureExtractor(Linear(8, 6), input_size=(3, 8, 8))
    u, weight = unit_rows(2, 6), 0.2
    config = MarkConfig(
        iterations=200,
        radius=100,
        lambda_image=weight,
        lambda_feature=0,
        augment=Identity(),
        straight_through=False,
    )
    core = Perturbation(extractor, MEAN, STD, config, 0, None)
    (change,) = core.minimise([grey_images.float()], u.float(), [0, 1])
    # min -(M d) . u + w |d|^2 has d = M' u / (2 w), in normalised units.
    best = (u.float() @ extractor.model.features.weight).view(2, 3, 8, 8) / (2 * weight)
    torch.testing.assert_close(
        change / (255 * torch.tensor(STD)[:, None, None]), best, atol=1e-4, rtol=1e-3
    )


def test_one_sgd_step_is_the_papers_on_normalised_images(grey_images: Tensor) -> None:
    extractor = FeatureExtractor(Linear(8, 6), input_size=(3, 8, 8))
    u = unit_rows(2, 6)
    config = MarkConfig(iterations=1, radius=200, lr=0.1, augment=Identity())
    core = Perturbation(extractor, MEAN, STD, config, 0, None)
    (change,) = core.minimise([grey_images.float()], u.float(), [0, 1])
    step = 0.1 * (u.float() @ extractor.model.features.weight).view(2, 3, 8, 8)
    torch.testing.assert_close(change / (255 * torch.tensor(STD)[:, None, None]), step)


@pytest.mark.parametrize(
    "config",
    [
        LONG,
        replace(LONG, target_psnr=48.0, radius=2.5),
        replace(LONG, optimizer="sgd", lr=0.3, target_psnr=None, lambda_feature=0.01),
        CROPS,
        replace(CROPS, reference="center"),
    ],
    ids=["small", "tight", "sgd", "crops", "centre"],
)
def test_marks_move_features_within_their_bounds(digits, extractor, config: MarkConfig) -> None:
    marked = mark_digits(digits, extractor, config)
    change = marked.images.int() - digits[0][:8].int()
    assert marked.images.dtype == torch.uint8
    assert marked.images.shape == digits[0][:8].shape
    # The optimiser never saw these crops, so that a single image may come out unlucky.
    assert (marked.loss_after < marked.loss_before).mean() >= 7 / 8
    assert marked.loss_after.mean() < marked.loss_before.mean()
    assert (marked.dot > 0).mean() >= 7 / 8
    assert change.abs().max() <= config.radius
    assert np.array_equal(marked.linf, change.abs().amax((1, 2, 3)).numpy())
    psnr = 10 * np.log10(255**2 / change.double().square().mean((1, 2, 3)).numpy())
    np.testing.assert_allclose(marked.psnr, psnr)
    assert psnr.min() >= (config.target_psnr or 0) - 1e-3


def test_reported_dot_is_that_of_the_exported_pixels(digits, extractor) -> None:
    marked = mark_digits(digits, extractor, LONG)
    model = extractor.model[:9]
    moved = model(normalised(marked.images)) - model(normalised(digits[0][:8]))
    dot = (moved * unit_rows(10, 16)[digits[1][:8]]).sum(1)
    np.testing.assert_allclose(marked.plain_dot, dot.detach().numpy(), atol=1e-5)
    assert marked.checks[0].holds


@pytest.mark.parametrize("config", [SMALL, CROPS, replace(SMALL, precision="float64")])
def test_an_image_is_marked_the_same_alone_and_in_any_batch(
    digits, extractor, config: MarkConfig
) -> None:
    images, labels, u = digits[0][:9], digits[1][:9], unit_rows(10, 16)
    whole = mark(images, labels, extractor, u, config=config, **NORMAL).images
    for i in (0, 4, 8):
        alone = mark(
            images[i : i + 1],
            labels[i : i + 1],
            extractor,
            u,
            config=config,
            ids=[i],
            **NORMAL,
        )
        assert torch.equal(alone.images[0], whole[i])
    order = torch.tensor([8, 2, 5, 1, 7, 0, 3, 6, 4])
    other = mark(
        images[order],
        labels[order],
        extractor,
        u,
        config=config,
        ids=order.tolist(),
        batch_size=4,
        **NORMAL,
    )
    assert torch.equal(other.images, whole[order])


def test_one_image_has_the_feature_bits_that_it_has_in_a_batch(digits, extractor) -> None:
    # Convolutions only: a linear layer sums in another order for every number of images.
    pooled = FeatureExtractor(extractor.model, layer="7", input_size=(3, 32, 32))
    core = Perturbation(pooled, MEAN, STD, SMALL, 0, None)
    images = digits[0][:40].float()
    whole = core.features([images], core.plain([images]))
    for i in range(40):
        one = images[i : i + 1]
        assert torch.equal(core.features([one], core.plain([one]))[0], whole[i])


def test_images_of_many_sizes_are_marked_as_if_alone(extractor) -> None:
    images = [noise(1, h, w)[0] for h, w in ((24, 40), (33, 30), (24, 40), (50, 26), (24, 24))]
    labels, u = torch.tensor([3, 1, 4, 1, 5]), unit_rows(10, 16)
    whole = mark(images, labels, extractor, u, config=CROPS, **NORMAL)
    assert isinstance(whole.images, list)
    assert (whole.dot > 0).all()
    for i, image in enumerate(images):
        alone = mark([image], labels[i : i + 1], extractor, u, config=CROPS, ids=[i], **NORMAL)
        assert torch.equal(alone.images[0], whole.images[i])
        assert alone.psnr[0] == whole.psnr[i]


def test_views_of_many_sizes_never_share_a_batch(extractor) -> None:
    images = [noise(1, 20, 20)[0], noise(1, 24, 24)[0], noise(1, 20, 20)[0]]
    config = replace(SMALL, iterations=2, augment=Identity())
    done: list[tuple[int, int]] = []
    marked = mark(
        images,
        torch.tensor([0, 1, 2]),
        extractor,
        unit_rows(10, 16),
        config=config,
        progress=lambda *state: done.append(state),
        **NORMAL,
    )
    assert [tuple(image.shape) for image in marked.images] == [
        (3, 20, 20),
        (3, 24, 24),
        (3, 20, 20),
    ]
    assert done == [(2, 3), (3, 3)]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(digits, extractor) -> None:
    def marked(seed: int, ids: list[str]) -> Tensor:
        return mark(
            digits[0][:3],
            digits[1][:3],
            extractor,
            unit_rows(10, 16),
            config=SMALL,
            ids=ids,
            seed=seed,
            **NORMAL,
        ).images

    first = marked(0, ["a", "b", "c"])
    assert torch.equal(first, marked(0, ["a", "b", "c"]))
    assert not torch.equal(first, marked(1, ["a", "b", "c"]))
    assert not torch.equal(first, marked(0, ["x", "y", "z"]))


def test_every_image_and_iteration_is_seen_through_its_own_crop(digits, extractor) -> None:
    seen: list[Windows] = []

    class Recording(PadCropFlip):
        def sample(self, shape, generators) -> Windows:
            seen.append(super().sample(shape, generators))
            return seen[-1]

    mark_digits(digits, extractor, replace(SMALL, augment=Recording(32, 4)))
    corners = torch.stack([windows.start for windows in seen])  # (T, N, 2)
    assert len(seen) == SMALL.iterations + 4
    assert (corners.flatten(1).std(dim=1) > 0).all()
    assert (corners.flatten(1).std(dim=0) > 0).all()


def test_an_image_that_nothing_moves_comes_back_byte_for_byte() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(0 * x.flatten(1)[:, :4])

    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    blind = FeatureExtractor(Blind(), input_size=(3, 16, 16))
    marked = mark(
        levels,
        torch.tensor([0, 1]),
        blind,
        unit_rows(2, 4),
        config=replace(SMALL, augment=Identity()),
        **NORMAL,
    )
    assert torch.equal(marked.images, levels)
    assert np.isposinf(marked.psnr).all()
    assert (marked.linf == 0).all()
    assert marked.checks[0].holds is False


@pytest.mark.parametrize("psnr", [30.0, 42.0, 52.0, 60.0])
def test_export_rounds_and_keeps_the_psnr(extractor, psnr: float) -> None:
    core = Perturbation(extractor, MEAN, STD, MarkConfig(target_psnr=psnr, radius=9.5), 0, None)
    images = noise(4).float()
    torch.manual_seed(0)
    change = core.project(images, 30 * torch.randn_like(images))
    exported = core.export(images, change)
    error = (exported - images).square().mean((1, 2, 3))
    achieved = 10 * torch.log10(255**2 / error)
    assert (achieved >= psnr - 1e-4).all()
    # All changes are about as large, so that they would round to 0 together.
    assert achieved.max() < psnr + 0.05
    assert (exported - images).abs().max() <= 9
    assert torch.equal(exported, exported.round())
    assert exported.min() >= 0
    assert exported.max() <= 255


def test_export_rounds_to_nearest(extractor) -> None:
    core = Perturbation(extractor, MEAN, STD, MarkConfig(), 0, None)
    images = torch.full((1, 3, 2, 2), 127.0)
    for change, level in ((0.6, 128), (-0.4, 127), (-0.6, 126), (0.4, 127)):
        assert (core.export(images, torch.full_like(images, change)) == level).all()


def test_the_image_weight_of_photographs_scales_to_small_images(digits, extractor) -> None:
    config = replace(SMALL, optimizer="sgd", lr=1.0, target_psnr=None, radius=30.0)
    loose = mark_digits(digits, extractor, config)
    scaled = mark_digits(digits, extractor, replace(config, scale_lambda=True))
    assert (scaled.psnr > loose.psnr + 1).all()
    factor = 3 * 375 * 500 / (3 * 32 * 32)
    by_hand = replace(config, lambda_image=config.lambda_image * factor)
    assert np.abs(scaled.psnr - mark_digits(digits, extractor, by_hand).psnr).max() < 0.01


def test_only_the_centre_reference_charges_for_the_crop(digits, extractor) -> None:
    config = replace(CROPS, lambda_feature=1.0)
    assert (mark_digits(digits, extractor, config).loss_before == 0).all()
    centre = mark_digits(digits, extractor, replace(config, reference="center"))
    assert (centre.loss_before != 0).all()


def test_half_precision_marks_too(digits, extractor) -> None:
    full = mark_digits(digits, extractor, SMALL)
    half = mark_digits(digits, extractor, replace(SMALL, precision="bfloat16"))
    np.testing.assert_allclose(half.dot.mean(), full.dot.mean(), rtol=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_marks_as_far_as_the_cpu(digits, extractor, precision: str) -> None:
    config = replace(SMALL, precision=precision)
    given = (digits[0][:8], digits[1][:8], extractor, unit_rows(10, 16))
    cpu = mark(*given, config=SMALL, **NORMAL)
    gpu = mark(*given, config=config, device="cuda", **NORMAL)
    again = mark(*given, config=config, device="cuda", **NORMAL)
    assert torch.equal(gpu.images, again.images)
    assert gpu.images.device.type == "cpu"
    np.testing.assert_allclose(gpu.dot.mean(), cpu.dot.mean(), rtol=0.1)


def test_the_callers_network_is_left_as_it_is(digits, extractor) -> None:
    before = copy.deepcopy(extractor.state_dict())
    mark_digits(digits, extractor, replace(SMALL, precision="float64"))
    assert all(p.dtype == torch.float32 for p in extractor.parameters())
    assert all(torch.equal(before[k], v) for k, v in extractor.state_dict().items())
    assert not any(p.requires_grad for p in extractor.parameters())


def test_features_that_cannot_follow_their_carrier_are_told() -> None:
    class OneDirection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(1, 200)
            self.head = nn.Linear(200, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.wide(x.mean((1, 2, 3))[:, None]))

    extractor = FeatureExtractor(OneDirection(), input_size=(3, 32, 32))
    with pytest.warns(MarkingInfeasible, match="median cosine"):
        marked = mark(
            noise(4),
            torch.tensor([0, 1, 0, 1]),
            extractor,
            unit_rows(2, 200),
            config=SMALL,
            **NORMAL,
        )
    assert marked.checks[0].holds is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": noise(2, 16, 40)}, "image 0 of 16 x 40 is smaller than the crop of 32"),
        ({"images": noise(2).float()}, "give uint8"),
        ({"images": [noise(1)[0], noise(1)[0, :1]]}, "image 1 is torch.uint8"),
        ({"images": noise(0), "labels": torch.zeros(0, dtype=torch.long)}, "no images"),
        ({"labels": torch.tensor([0, 10])}, "labels span 0 to 10 but there are 10 carriers"),
        ({"labels": torch.tensor([-1, 0])}, "labels span -1"),
        ({"labels": torch.tensor([0])}, "2 images, 1 labels"),
        ({"ids": ["a"]}, "1 ids"),
        ({"carriers": unit_rows(10, 12)}, r"carriers \(10, 12\) do not fit features of 16"),
        ({"carriers": 2 * unit_rows(10, 16)}, "divide each row"),
        ({"std": (0.1, 0.0, 0.1)}, "std above 0"),
        ({"batch_size": 0}, "batch size"),
    ],
)
def test_what_cannot_be_marked_is_refused_with_the_mend(extractor, change, message: str) -> None:
    given = {
        "images": noise(2),
        "labels": torch.tensor([0, 1]),
        "carriers": unit_rows(10, 16),
        "config": SMALL,
        **NORMAL,
    } | change
    with pytest.raises(InputError, match=message):
        mark(given.pop("images"), given.pop("labels"), extractor, given.pop("carriers"), **given)


def test_broken_features_name_the_image() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1)[:, :4].log())

    dark = noise(2) // 2 + 128
    dark[1] = 0
    with pytest.raises(InputError, match="image 'b' are not finite"):
        mark(
            dark,
            torch.tensor([0, 1]),
            FeatureExtractor(Breaks(), input_size=(3, 32, 32)),
            unit_rows(2, 4),
            config=replace(SMALL, augment=Identity()),
            ids=["a", "b"],
            **NORMAL,
        )


@pytest.mark.parametrize(
    "change",
    [
        {"iterations": 0},
        {"radius": 0.5},
        {"target_psnr": -1.0},
        {"lambda_image": -1.0},
        {"lr": float("nan")},
        {"optimizer": "lbfgs"},
        {"reference": "crop"},
        {"precision": "float16"},
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        MarkConfig(**change)


def test_presets() -> None:
    paper = MarkConfig.preset("paper")
    assert paper == MarkConfig()
    assert (paper.iterations, paper.radius, paper.lr, paper.optimizer) == (90, 10, 1.0, "sgd")
    assert (paper.lambda_image, paper.lambda_feature) == (0.0005, 0.01)
    assert MarkConfig.preset("small").target_psnr == 34
    assert MarkConfig.preset("fast", iterations=3).iterations == 3
    with pytest.raises(InputError, match="unknown"):
        MarkConfig.preset("small32")


def test_draws_do_not_depend_on_the_number_of_iterations_left() -> None:
    augment = PadCropFlip(32, 4)
    long, short = ([image_generator(0, "a")] for _ in range(2))
    first = [augment.sample((32, 32), long).start for _ in range(5)]
    assert torch.equal(augment.sample((32, 32), short).start, first[0])
