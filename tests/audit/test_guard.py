"""The exchangeability guard: brute-force oracles, false alarms, and differences it must see."""

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import fft, stats
from sklearn.datasets import load_digits
from torchvision.transforms.functional import gaussian_blur, hflip, resize

from remanence.audit.duplicates import clusters, duplicates, perceptual_hash
from remanence.audit.evidence import Check
from remanence.audit.guard import ImageSet, guard, image_features
from remanence.errors import InputError

CIFAR = Path(__file__).parents[3] / "shared/data/cifar10/test.parquet"


def pictures(n: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth random colour fields with the 1/f spectrum of photographs, (n, 3, size, size)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) + 0.5 / size
    waves = rng.normal(size=(n, 3, size, len(frequency[0]), 2)) @ [1, 1j] / frequency**1.2
    waves += 1.5 * waves.mean(1, keepdims=True)
    fields = np.fft.irfft2(waves, s=(size, size))
    fields *= rng.uniform(25, 60, (n, 1, 1, 1)) / fields.std((1, 2, 3), keepdims=True)
    fields += rng.uniform(70, 180, (n, 3, 1, 1))
    return torch.from_numpy(fields.clip(0, 255).astype(np.uint8))


def brighter(images: torch.Tensor, by: int = 20) -> torch.Tensor:
    return (images.int() + by).clamp(max=255).to(torch.uint8)


def failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.assumption for check in checks if check.holds is False]


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    xor = np.bitwise_xor.outer(a, b)
    return np.unpackbits(xor[..., None].view(np.uint8), axis=-1).sum(-1)


# Perceptual hash


def test_hash_is_the_median_cut_of_scipys_cosine_transform() -> None:
    images = pictures(50)
    grey = np.einsum("nchw,c->nhw", images.numpy().astype(float), [0.299, 0.587, 0.114])
    low = fft.dctn(grey, axes=(1, 2))[:, 1:9, 1:9].reshape(50, 64)
    bits = low > np.sort(low, axis=1)[:, 31:32]
    expected = [int("".join("01"[int(bit)] for bit in row), 2) for row in bits]
    assert perceptual_hash(images).tolist() == expected


def test_hash_survives_edits_and_tells_pictures_apart() -> None:
    images = pictures(200, size=64)
    hashes = perceptual_hash(images)
    noise = torch.randint(-3, 4, images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images.int() + noise).clamp(0, 255).to(torch.uint8)
    for edited in (brighter(images), resize(images, [48, 48], antialias=True), noisy):
        near = np.diag(hamming(perceptual_hash(edited), hashes)) <= 4
        assert near.mean() > 0.97
    others = hamming(hashes, hashes)[np.triu_indices(200, 1)]
    assert others.min() > 4
    assert (np.diag(hamming(perceptual_hash(hflip(images)), hashes)) > 4).all()


def test_blank_and_small_images_have_no_hash() -> None:
    flat = torch.full((3, 3, 32, 32), 200, dtype=torch.uint8)
    flat[1] += torch.randint(0, 2, (3, 32, 32), dtype=torch.uint8)
    assert perceptual_hash(flat).tolist() == [0, 0, 0]
    assert (perceptual_hash(pictures(5, size=16)) == 0).all()
    assert (perceptual_hash(pictures(5, size=24)) != 0).all()
    zeros = np.zeros(5, dtype=np.uint64)
    assert len(duplicates(zeros, zeros)) == 0
    assert clusters(zeros).tolist() == [0, 1, 2, 3, 4]


# Duplicates and clusters


def crowded_hashes(n: int, seed: int, spread: int = 6) -> np.ndarray:
    """Hashes with many near neighbours: a few centres, each with up to `spread` flipped bits."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**63, 5, dtype=np.uint64)
    hashes = centres[rng.integers(0, 5, n)]
    for _ in range(spread):
        flips = np.uint64(1) << rng.integers(0, 64, n, dtype=np.uint64)
        hashes = np.where(rng.random(n) < 0.5, hashes ^ flips, hashes)
    return np.where(rng.random(n) < 0.05, np.uint64(0), hashes)


@given(st.integers(0, 10_000), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_duplicates_are_all_pairs_within_the_radius(seed: int, radius: int) -> None:
    a, b = crowded_hashes(60, seed), crowded_hashes(45, seed)
    near = (hamming(a, b) <= radius) & (a != 0)[:, None] & (b != 0)
    assert duplicates(a, b, radius).tolist() == np.argwhere(near).tolist()


@given(st.integers(0, 10_000), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_clusters_are_the_connected_parts(seed: int, radius: int) -> None:
    rng = np.random.default_rng(seed)
    hashes, names = crowded_hashes(50, seed), rng.integers(0, 40, 50)
    joined = (hamming(hashes, hashes) <= radius) & (hashes != 0)[:, None] & (hashes != 0)
    joined |= names[:, None] == names
    ids = np.arange(50)
    for _ in range(50):  # each item takes the smallest id that it touches
        ids = np.where(joined, ids, 99).min(1)
    found = clusters(hashes, radius, same=[names.astype(str)])
    assert np.array_equal(found[:, None] == found, ids[:, None] == ids)
    assert np.unique(found, return_index=True)[1].tolist() == sorted(
        np.unique(found, return_index=True)[1]
    )


def test_many_hashes_need_little_memory() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 2**63, 60_000, dtype=np.uint64)
    hashes[1::2] = hashes[::2] ^ np.uint64(0b1011)
    hashes[:2000] = hashes[0]  # one picture, many times
    tracemalloc.start()
    ids = clusters(hashes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ids.max() + 1 == 1 + 29_000
    assert peak < 100e6


# False alarms


def test_halves_of_one_source_seldom_fail() -> None:
    features = image_features(pictures(2000, seed=1))
    rng = np.random.default_rng(0)
    labels, formats = rng.integers(0, 10, 2000), rng.choice(["jpeg", "png"], 2000, p=[0.97, 0.03])
    runs, alarms = 200, 0
    for seed in range(runs):
        pick = rng.permutation(2000)[:120]
        halves = [
            ImageSet(
                features=features[half],
                labels=labels[half],
                fingerprints={"format": formats[half], "width": labels[half] // 3},
            )
            for half in np.split(pick, 2)
        ]
        alarms += bool(failed(guard(*halves, seed=seed)))
    assert alarms <= stats.binom.ppf(0.99, runs, 0.05)


def test_classifier_keeps_its_level_where_the_auc_rule_does_not_help() -> None:
    """Few items and many features: chance alone carries the AUC over .55 in a third of runs."""
    rng = np.random.default_rng(1)
    runs, alarms, over = 200, 0, 0
    for seed in range(runs):
        a, b = rng.normal(size=(2, 50, 30)) * np.linspace(0.1, 3, 30)
        (check,) = guard(ImageSet(features=a), ImageSet(features=b), seed=seed, level=0.2)
        alarms += check.holds is False
        over += float(check.finding.split("AUC ")[1].split()[0]) > 0.55
    assert over / runs > 0.2
    # Half the two-sided level; DeLong's variance as it stands would give about twice as many.
    assert alarms <= stats.binom.ppf(0.99, runs, 0.1)


@pytest.mark.parametrize("by", ["copies", "groups"])
def test_copies_and_groups_are_not_evidence(by: str) -> None:
    """Forty films a side, five frames each: labels and pixels repeat, yet nothing differs."""
    rng = np.random.default_rng(2)
    runs, alarms = 60, 0
    for seed in range(runs):
        film = np.repeat(np.arange(80), 5)
        features = rng.normal(size=(80, 20))[film] + 0.1 * rng.normal(size=(400, 20))
        labels = rng.integers(0, 3, 80)[film]
        sides = []
        for own in (film < 40, film >= 40):
            names = film[own]
            bound = {"digests": names} if by == "copies" else {"groups": names}
            sides.append(ImageSet(features=features[own], labels=labels[own], **bound))
        alarms += bool(failed(guard(*sides, seed=seed)))
    assert alarms <= stats.binom.ppf(0.99, runs, 0.05)


# Differences that must be seen


@pytest.mark.parametrize(
    "edit",
    [
        brighter,
        lambda x: gaussian_blur(x, [5, 5], [1.0, 1.0]),
        lambda x: (x * torch.tensor([1.15, 1.0, 0.85])[:, None, None]).clamp(max=255).byte(),
    ],
    ids=["brightness", "blur", "tint"],
)
def test_another_source_fails(edit: object) -> None:
    images = pictures(400, seed=3)
    changed = edit(images[:200])  # type: ignore[operator]  # a function each
    checks = guard(ImageSet(images=changed), ImageSet(images=images[200:]))
    assert failed(checks) == [
        "Candidates and references look alike to a classifier that never saw the model."
    ]
    assert not failed(guard(ImageSet(images=images[:200]), ImageSet(images=images[200:])))


def test_digits_against_brightened_digits() -> None:
    pixels = torch.from_numpy(load_digits().images * 15).to(torch.uint8)[:, None]
    images = pixels.expand(-1, 3, -1, -1)[torch.randperm(1797, generator=torch.manual_seed(0))]
    a, b = images[:300], images[300:600]
    checks = guard(ImageSet(images=a), ImageSet(images=b))
    assert not failed(checks)
    assert [check.holds for check in checks] == [True, True, None]
    assert "8x8" not in checks[2].finding
    assert failed(guard(ImageSet(images=brighter(a)), ImageSet(images=b)))


def test_labels_and_fingerprints_that_differ_fail() -> None:
    rng = np.random.default_rng(0)
    a = ImageSet(labels=rng.choice(3, 300, p=[0.5, 0.3, 0.2]), fingerprints={"format": ["a"] * 300})
    b = ImageSet(labels=rng.choice(3, 300, p=[0.2, 0.3, 0.5]), fingerprints={"format": ["b"] * 300})
    assert len(failed(guard(a, b))) == 2
    few = ImageSet(labels=np.r_[np.zeros(28), np.ones(4)])
    other = ImageSet(labels=np.r_[np.zeros(8), np.ones(24)])
    (check,) = guard(few, other)
    assert check.holds is False
    assert "random tables" not in check.finding
    rare = ImageSet(labels=np.r_[np.zeros(24), np.arange(1, 9)])
    (check,) = guard(rare, ImageSet(labels=np.zeros(32)))
    assert "random tables" in check.finding


def test_random_tables_agree_with_fishers_exact_test() -> None:
    a, b = np.r_[np.zeros(30), np.ones(8)], np.r_[np.zeros(37), np.ones(1)]
    (check,) = guard(ImageSet(labels=a), ImageSet(labels=b))
    p = float(check.finding.split("p ")[1].split()[0])
    assert p == pytest.approx(stats.fisher_exact([[30, 8], [37, 1]]).pvalue, rel=0.15)


def test_tiny_difference_in_a_huge_set_does_not_spoil_a_test() -> None:
    a, b = np.repeat([0, 1], [51_000, 49_000]), np.repeat([0, 1], [50_000, 50_000])
    (check,) = guard(ImageSet(labels=a), ImageSet(labels=b))
    assert check.holds is True
    assert "p 8e-06" in check.finding or "e-0" in check.finding


def test_nearly_unique_fingerprint_cannot_tell() -> None:
    a, b = (
        ImageSet(fingerprints={"bytes": np.arange(50)}),
        ImageSet(fingerprints={"bytes": np.arange(50) + 50}),
    )
    (check,) = guard(a, b)
    assert check.holds is None
    assert "coarser" in check.finding


# Duplicates across sets


def test_shared_files_and_near_copies() -> None:
    images = pictures(360, size=48, seed=4)
    a, b, known = images[:120], images[120:240].clone(), images[240:].clone()
    checks = guard(ImageSet(images=a), ImageSet(images=b))
    assert [check.holds for check in checks] == [True, True, True]

    b[7] = a[3]
    checks = guard(ImageSet(images=a), ImageSet(images=b))
    assert failed(checks) == ["No file is among both candidates and references."]
    assert "items 3" in checks[1].finding

    b[7] = brighter(a[3:4], 9)[0]
    checks = guard(ImageSet(images=a), ImageSet(images=b))
    assert [check.holds for check in checks] == [True, True, None]
    b[10:20] = brighter(a[10:20], 9)
    assert len(failed(guard(ImageSet(images=a), ImageSet(images=b)))) == 1

    b = images[120:240]
    known[0], known[1] = a[0], b[1]
    checks = guard(ImageSet(images=a), ImageSet(images=b), ImageSet(images=known))
    assert failed(checks) == ["No file is among both references and known training items."]
    known[1] = images[250]
    checks = guard(ImageSet(images=a), ImageSet(images=b), ImageSet(images=known))
    assert not failed(checks)
    assert checks[-2].holds is None
    assert "1 of 120 candidates" in checks[-2].finding


def test_digests_rule_over_pixels() -> None:
    labels = np.zeros(40)
    a = ImageSet(labels=labels, digests=[f"a{i}" for i in range(40)])
    b = ImageSet(labels=labels, digests=[f"a{i}" for i in range(39, 79)])
    assert failed(guard(a, b)) == ["No file is among both candidates and references."]


# Features and input


def test_features_belong_to_their_image() -> None:
    images = pictures(30)
    features, order = image_features(images), torch.randperm(30, generator=torch.manual_seed(0))
    assert features.shape == (30, 249)
    assert features.dtype == np.float64
    assert np.array_equal(image_features(images[order]), features[order.numpy()])
    grey = images[0].double().mean(0) / 255
    energy = ((grey[2:] - grey[:-2]) ** 2).mean()
    assert features[0, 244] == pytest.approx(float((energy + 1e-6).log()), abs=1e-4)


def test_equal_seeds_give_equal_answers() -> None:
    a, b = (ImageSet(images=pictures(60, seed=s), labels=np.arange(60) % 7) for s in (1, 2))
    assert guard(a, b, seed=3) == guard(a, b, seed=3)


@pytest.mark.parametrize(
    ("a", "hint"),
    [
        (ImageSet(labels=np.zeros(20)), "30"),
        (ImageSet(labels=np.zeros(50), digests=["same"] * 50), "30 distinct"),
        (ImageSet(), "empty"),
        (ImageSet(labels=np.zeros(50), groups=np.zeros(49)), "49 items"),
        (ImageSet(features=np.full((50, 3), np.nan)), "finite"),
        (ImageSet(images=torch.zeros(50, 3, 32, 32)), "uint8"),
        (ImageSet(images=torch.zeros(50, 3, 4, 4, dtype=torch.uint8)), "8x8"),
        (ImageSet(features=np.zeros((50, 3))), "nothing to compare"),
        (ImageSet(groups=np.arange(50)), "nothing to compare"),
    ],
)
def test_bad_sets(a: ImageSet, hint: str) -> None:
    with pytest.raises(InputError, match=hint) as error:
        guard(a, ImageSet(labels=np.zeros(50)))
    assert "\n" not in str(error.value)


def test_bad_hashes_and_radius() -> None:
    with pytest.raises(InputError, match="uint64"):
        clusters(np.zeros(4, dtype=np.int64))
    with pytest.raises(InputError, match="radius"):
        duplicates(np.ones(4, dtype=np.uint64), np.ones(4, dtype=np.uint64), radius=64)
    with pytest.raises(InputError, match="width"):
        guard(
            ImageSet(features=np.zeros((50, 3))),
            ImageSet(features=np.zeros((50, 4))),
        )


@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10 is not at ../shared/data")
def test_photographs() -> None:
    rows = pq.read_table(CIFAR).slice(0, 600)["image"].to_pylist()
    arrays = [np.array(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    a, b = images[:300], images[300:]
    assert not failed(guard(ImageSet(images=a), ImageSet(images=b)))
    for changed in (brighter(a), gaussian_blur(a, [5, 5], [1.0, 1.0])):
        assert failed(guard(ImageSet(images=changed), ImageSet(images=b)))
