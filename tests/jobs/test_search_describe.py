import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_sample_image

from remanence.cli import main
from remanence.errors import InputError
from remanence.jobs.search.describe import describe
from remanence.kit.vectors import open_vectors
from remanence.search.kernel_descriptor.descriptor import KernelDescriptor
from remanence.search.kernel_descriptor.frames import frames_from_keypoints
from remanence.search.kernel_descriptor.keypoints import detect_keypoints
from remanence.search.kernel_descriptor.moments import Moments
from remanence.search.kernel_descriptor.patches import extract_patches
from remanence.search.kernel_descriptor.whitening import Whitening

SIZE = 256, 170
RAW = KernelDescriptor()


def photograph(name):
    return Image.fromarray(load_sample_image(f"{name}.jpg")).resize(SIZE, Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    (root / "two" / "inside").mkdir(parents=True)
    photograph("china").save(root / "two" / "china.png")
    photograph("flower").save(root / "two" / "inside" / "flower.png")
    (root / "two" / "notes.txt").write_text("not a picture")
    Image.new("RGB", SIZE, (90, 90, 90)).save(root / "grey.png")
    (root / "text.jpg").write_text("no picture")
    (root / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def both(files, tmp_path_factory):
    return describe(str(files / "two"), out=tmp_path_factory.mktemp("runs") / "both", keypoints=400)


@pytest.fixture(scope="module")
def whitened(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whitened"
    return describe(str(files / "two"), out=out, keypoints=400, learn_whitening="pcaws", dim=64)


def by_hand(image, most=400):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    points = detect_keypoints(pixels, most)
    frames = frames_from_keypoints(points.xy, points.scale, points.angle)
    return points, RAW(extract_patches(pixels, frames).patches)


def held(run):
    return load_file(run.out / "descriptors.safetensors")


def refused(words, source, out, **options):
    before = sorted(out.parent.iterdir())
    with pytest.raises(InputError, match=words) as error:
        describe(str(source), out=out, **options)
    assert "\n" not in str(error.value)
    assert sorted(out.parent.iterdir()) == before


def test_the_rows_are_the_methods_own_image_by_image(both):
    found = held(both)
    first, second = by_hand(photograph("china")), by_hand(photograph("flower"))
    assert found["vectors"].dtype == np.float32
    for name, parts in {
        "vectors": [d.vectors for _, d in (first, second)],
        "valid": [d.valid for _, d in (first, second)],
        "xy": [p.xy for p, _ in (first, second)],
        "scale": [p.scale for p, _ in (first, second)],
        "angle": [p.angle for p, _ in (first, second)],
    }.items():
        assert np.allclose(found[name], torch.cat(parts).numpy(), atol=1e-5), name
    counts = [len(p.xy) for p, _ in (first, second)]
    assert np.array_equal(found["image"], np.repeat([0, 1], counts))


def test_names_and_settings_stand_in_the_metadata(both):
    with safe_open(both.out / "descriptors.safetensors", "numpy") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["images"]) == ["china.png", "inside/flower.png"]
    settings = json.loads(metadata["settings"])
    assert settings["convention"] == RAW.convention
    assert settings["whitening"] is None


def test_the_other_commands_of_the_room_read_the_file(both):
    opened = open_vectors(f"{both.out / 'descriptors.safetensors'}@vectors")
    assert opened.shape == (both.results["descriptors"], 238)
    assert np.array_equal(opened.array(), held(both)["vectors"])


def test_only_the_artefacts_stay(both, whitened):
    plain = {"descriptors.safetensors", "report.html", "results.json", "run.json"}
    assert {path.name for path in both.out.iterdir()} == plain
    learned = {"whitening.safetensors", "whitening.json"}
    assert {path.name for path in whitened.out.iterdir()} == plain | learned
    page = (both.out / "report.html").read_text()
    assert "effective rank" in page
    assert page.count("<svg") == 2


def test_a_learned_whitening_is_that_of_all_descriptors(both, whitened):
    moments = Moments(238)
    moments.add(torch.from_numpy(held(both)["vectors"]))
    expected = Whitening.fit(moments, "pcaws", dim=64)
    raw = torch.from_numpy(held(both)["vectors"])
    found = torch.from_numpy(held(whitened)["vectors"])
    assert found.shape == (len(raw), 64)
    # Directions are unique up to sign: compare inner products.
    assert torch.allclose(found @ found.mT, expected(raw) @ expected(raw).mT, atol=1e-4)
    read = Whitening.load(whitened.out / "whitening.safetensors", RAW.convention)
    assert read.count == int(held(both)["valid"].sum())
    assert torch.allclose(read(raw), found, atol=1e-6)


def test_the_evaluation_is_on_an_image_that_was_held_out(whitened):
    card = json.loads((whitened.out / "whitening.json").read_text())
    assert card["images"] == 2
    assert card["evaluated_on"] in (["china.png"], ["inside/flower.png"])
    assert card["evaluated_on_what_it_learned_from"] is False
    assert set(card["scores"]) == {"raw", "pcaws"}
    assert 50 < card["scores"]["raw"]["map"] < 100
    assert 1 < card["effective_rank"] < 238
    assert "learned from the other images only" in (whitened.out / "report.html").read_text()


def test_one_image_is_evaluated_on_itself_and_says_so(files, tmp_path):
    found = describe(
        str(files / "two" / "china.png"), out=tmp_path / "o", keypoints=150, learn_whitening="lws"
    )
    card = found.results["whitening"]
    assert card["evaluated_on_what_it_learned_from"] is True
    assert card["pairs"] > 100
    assert card["scores"]["lws"]["map"] > card["scores"]["raw"]["map"]
    assert "from which it was also learned" in (found.out / "report.html").read_text()


def test_a_whitening_is_used_again(files, whitened, tmp_path):
    again = describe(
        str(files / "two"),
        out=tmp_path / "o",
        keypoints=400,
        whitening=whitened.out / "whitening.safetensors",
    )
    assert np.allclose(held(again)["vectors"], held(whitened)["vectors"], atol=1e-6)
    assert again.whitening is None


def test_an_image_without_key_points_gives_no_rows(files, tmp_path):
    found = describe(str(files / "grey.png"), out=tmp_path / "o")
    assert held(found)["vectors"].shape == (0, 238)
    assert held(found)["xy"].shape == (0, 2)
    assert found.results["without_keypoints"] == ["grey.png"]
    assert (found.out / "report.html").exists()


def test_nothing_to_learn_a_whitening_from_is_refused(files, tmp_path):
    refused("no vectors", files / "grey.png", tmp_path / "o", learn_whitening="pcaws")


def test_given_key_points_are_taken_as_they_are(files, tmp_path):
    china = files / "two" / "china.png"
    points, described = by_hand(photograph("china"), 50)
    table = np.column_stack([points.xy, points.scale, points.angle])
    np.savetxt(
        tmp_path / "k.csv", table, delimiter=",", header="x,y,scale,angle", comments="", fmt="%.9g"
    )
    np.save(tmp_path / "k.npy", table)
    for name in ("k.csv", "k.npy"):
        found = describe(str(china), out=tmp_path / f"{name}.o", keypoint_file=tmp_path / name)
        assert np.allclose(held(found)["vectors"], described.vectors, atol=1e-4)
        assert np.allclose(held(found)["xy"], points.xy, atol=1e-4)


def test_key_points_of_a_reduced_image_are_in_its_own_pixels(tmp_path):
    large = photograph("china").resize((768, 510), Image.Resampling.BICUBIC)
    large.save(tmp_path / "large.png")
    whole = [[300.0, 200.0, 9.0, 0.5], [500.5, 299.5, 15.0, 1.5]]
    np.save(tmp_path / "k.npy", np.array(whole))
    found = describe(
        str(tmp_path / "large.png"),
        out=tmp_path / "o",
        keypoint_file=tmp_path / "k.npy",
        longest=256,
    )
    assert np.allclose(held(found)["xy"], np.array(whole)[:, :2], atol=1e-4)
    assert np.allclose(held(found)["scale"], [9, 15], atol=1e-4)
    near = describe(
        str(tmp_path / "large.png"), out=tmp_path / "p", keypoint_file=tmp_path / "k.npy"
    )
    same = (held(found)["vectors"] * held(near)["vectors"]).sum(1)
    assert (same > 0.98).all()


def test_bad_key_points_are_refused(files, tmp_path):
    china, out = files / "two" / "china.png", tmp_path / "o"
    bad = {
        "outside": np.array([[10.0, 10, 2], [999, 10, 2]]),
        "nan": np.array([[np.nan, 10, 2]]),
        "flat": np.array([[10.0, 10, 0]]),
    }
    for name, table in bad.items():
        np.save(tmp_path / f"{name}.npy", table)
        refused(f"{name}.npy: row [01]", china, out, keypoint_file=tmp_path / f"{name}.npy")
    np.save(tmp_path / "wide.npy", np.ones((3, 7)))
    refused("give rows of x, y", china, out, keypoint_file=tmp_path / "wide.npy")
    (tmp_path / "words.csv").write_text("x,y,scale\n1,2,three\n")
    refused("not a table of numbers", china, out, keypoint_file=tmp_path / "words.csv")
    refused("no such file", china, out, keypoint_file=tmp_path / "none.csv")
    refused("single image", files / "two", out, keypoint_file=tmp_path / "flat.npy")


@pytest.fixture(scope="module")
def patches():
    return np.random.default_rng(0).integers(0, 256, (600, 16, 16), dtype=np.uint8)


def test_patches_that_are_already_cut(patches, tmp_path):
    patches = patches.copy()
    patches[7] = 50
    np.save(tmp_path / "p.npy", patches)
    found = describe(str(tmp_path / "p.npy"), out=tmp_path / "o", patches=True)
    assert np.allclose(held(found)["vectors"], RAW(torch.from_numpy(patches)).vectors, atol=1e-6)
    assert np.flatnonzero(~held(found)["valid"]).tolist() == [7]
    assert found.results["flat"] == 1
    assert "xy" not in held(found)
    assert found.results["images"] == 1
    save_file({"p": patches[:, None]}, tmp_path / "p.safetensors")
    other = describe(
        str(tmp_path / "p.safetensors"), out=tmp_path / "q", patches=True, learn_whitening="pcaws"
    )
    assert held(other)["vectors"].shape == (600, 128)
    assert other.results["whitening"]["scores"] == {}


def test_photo_tourisms_sheets_and_hpatches_columns(tmp_path):
    drawn = np.random.default_rng(1).integers(0, 256, (300, 64, 64), dtype=np.uint8)
    (tmp_path / "brown").mkdir()
    padded = np.concatenate([drawn, np.zeros((212, 64, 64), np.uint8)]).reshape(2, 16, 16, 64, 64)
    for number, sheet in enumerate(padded):
        whole = np.block([[*row] for row in sheet])
        Image.fromarray(whole).save(tmp_path / "brown" / f"patches{number:04d}.bmp")
    (tmp_path / "brown" / "info.txt").write_text("0 0\n" * 300)
    found = describe(str(tmp_path / "brown"), out=tmp_path / "o", patches=True)
    assert np.allclose(held(found)["vectors"], RAW(torch.from_numpy(drawn)).vectors, atol=1e-6)
    column = drawn[:9].reshape(-1, 64)
    Image.fromarray(column).save(tmp_path / "e1.png")
    found = describe(str(tmp_path / "e1.png"), out=tmp_path / "p", patches=True)
    assert np.allclose(held(found)["vectors"], RAW(torch.from_numpy(drawn[:9])).vectors, atol=1e-6)


def test_bad_patches_are_refused(patches, tmp_path):
    spoilt = (patches / 255).astype(np.float32)
    spoilt[3, 0, 0] = np.nan
    for name, array, words in (
        ("nan", spoilt, "nan.npy: a patch holds NaN"),
        ("large", patches.astype(np.float32), "divide by 255"),
        ("wide", patches[:, :, :12], "give square grey patches"),
        ("colour", np.zeros((5, 3, 16, 16), np.uint8), "give square grey patches"),
        ("small", patches[:, :4, :4], "at least 8"),
        ("empty", patches[:0], "no patches"),
    ):
        np.save(tmp_path / f"{name}.npy", np.ascontiguousarray(array))
        refused(words, tmp_path / f"{name}.npy", tmp_path / "o", patches=True)
    refused("no such file", tmp_path / "none.npy", tmp_path / "o", patches=True)
    refused("not a kind of patches", tmp_path / "none.txt", tmp_path / "o", patches=True)


def test_bad_images_are_refused_and_named(files, tmp_path):
    out = tmp_path / "o"
    refused("gone.png: no such file", files / "gone.png", out)
    refused("gone: no such file or folder", files / "gone", out)
    refused("text.jpg: unreadable image", files / "text.jpg", out)
    refused("holds no images", files / "empty", out)


def test_a_broken_image_is_named_or_left_out(tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    buffer = io.BytesIO()
    photograph("flower").save(buffer, "JPEG")
    (folder / "a.jpg").write_bytes(buffer.getvalue()[:2000])
    photograph("china").save(folder / "b.png")
    refused("a.jpg: unreadable image .*--skip-broken", folder, tmp_path / "o", keypoints=20)
    found = describe(str(folder), out=tmp_path / "o", keypoints=20, skip_broken=True)
    assert found.results["skipped"] == ["a.jpg"]
    assert held(found)["image"].tolist() == [0] * 20
    (folder / "b.png").unlink()
    refused("none of its 1 images", folder, tmp_path / "p", skip_broken=True)


def test_bad_options_are_refused_before_anything_is_opened(files, whitened, tmp_path):
    learned = whitened.out / "whitening.safetensors"
    for words, options in {
        "give one of them": {"learn_whitening": "pcaws", "whitening": learned},
        "give --learn-whitening": {"dim": 64},
        "cartesian descriptors have length 63": {
            "dim": 64, "learn_whitening": "pca", "kind": "cartesian"
        },
        "--patch-size 4": {"patch_size": 4},
        "--magnification nan": {"magnification": float("nan")},
        "--keypoints 0": {"keypoints": 0},
        "--seed -1": {"seed": -1},
        "--keypoint-file": {"patches": True, "keypoint_file": learned},
        "--learn-whitening lw": {"patches": True, "learn_whitening": "lw"},
        "was learned on descriptors": {"kind": "polar", "whitening": learned},
    }.items():  # fmt: skip
        refused(words, files / "two", tmp_path / "o", **options)


def test_an_existing_folder_is_left_alone(files, both):
    with pytest.raises(InputError, match="already exists"):
        describe(str(files / "two"), out=both.out)


def test_the_command(files, tmp_path):
    words = ["search", "describe", str(files / "grey.png"), "--out", str(tmp_path / "o")]
    assert main(words) == 0
    assert main(words) == 2
