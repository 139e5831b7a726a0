import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from remanence.cli import main
from remanence.errors import InputError
from remanence.jobs.search import match_report
from remanence.jobs.search.describe import describe
from remanence.jobs.search.match import match
from remanence.jobs.search.match_report import draw_overlay
from remanence.jobs.search.pictures import look
from remanence.search.kernel_descriptor.homography import transform

SIZE = 320, 213
H_TRUE = np.array([[0.93, 0.12, 4.0], [-0.09, 0.98, 22.0], [1.5e-4, -1e-4, 1.0]])
FLIP = np.array([[-1.0, 0, SIZE[0] - 1], [0, 1, 0], [0, 0, 1]])


def photograph(name):
    return Image.fromarray(load_sample_image(f"{name}.jpg")).resize(SIZE, Image.Resampling.LANCZOS)


def corner_error(found, truth, size=SIZE):
    width, height = size
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]]) - 0.5
    return np.hypot(*(transform(found, corners) - transform(truth, corners)).T).max()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    china, flower = photograph("china"), photograph("flower")
    china.save(root / "china.png")
    flower.save(root / "flower.png")
    pixels = np.asarray(china)
    seen = cv2.warpPerspective(pixels, H_TRUE, SIZE, borderMode=cv2.BORDER_REFLECT)
    seen = cv2.GaussianBlur(255 * (seen / 255.0) ** 1.4, (0, 0), 0.8)
    Image.fromarray(seen.round().astype(np.uint8)).save(root / "warped.png")
    Image.fromarray(pixels[:, ::-1]).save(root / "mirrored.png")
    china.transpose(Image.Transpose.ROTATE_270).save(root / "turned.png")
    Image.new("RGB", SIZE, (90, 90, 90)).save(root / "grey.png")
    china.resize((12, 9)).save(root / "tiny.png")
    (root / "text.jpg").write_text("no picture")
    buffer = io.BytesIO()
    china.save(buffer, "JPEG")
    (root / "broken.jpg").write_bytes(buffer.getvalue()[:3000])
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Draw small pictures: encoding them takes most of a test's time."""
    monkeypatch.setattr(match_report, "SIDE", 100)
    monkeypatch.setattr(match_report, "DPI", 30)


def refused(words, *arguments, out, **options):
    before = sorted(out.parent.iterdir())
    with pytest.raises(InputError, match=words) as error:
        match(*arguments, out=out, **options)
    assert "\n" not in str(error.value)
    assert sorted(out.parent.iterdir()) == before


@pytest.fixture(scope="module")
def warped(files, tmp_path_factory):
    return match(
        files / "china.png", files / "warped.png", out=tmp_path_factory.mktemp("runs") / "warped"
    )


def test_a_warped_blurred_and_darkened_copy_matches_within_two_pixels(warped):
    assert warped.matched
    assert warped.results["answer"].startswith("one scene: ")
    assert corner_error(warped.homography, H_TRUE) < 2
    written = np.loadtxt(warped.out / "homography.txt")
    assert written.shape == (3, 3)
    assert corner_error(written, H_TRUE) < 2
    assert {"rotation", "perspective"} <= set(warped.edit.parts)


def test_the_folder_holds_the_matches_and_the_pictures(warped):
    with np.load(warped.out / "matches.npz", allow_pickle=False) as found:
        count = len(found["indices"])
        assert count == warped.results["matches"]
        assert found["indices"].shape == found["xy_first"].shape == found["xy_second"].shape
        assert found["inlier"].sum() == warped.results["inliers"]
        inlier = found["inlier"]
        there = transform(H_TRUE, found["xy_first"][inlier])
        assert np.median(np.hypot(*(there - found["xy_second"][inlier]).T)) < 1
        assert (found["similarity"][inlier] > 0).all()
    with Image.open(warped.out / "matches.png") as drawn, Image.open(warped.out / "overlay.png"):
        assert drawn.width == 1200
    page = (warped.out / "report.html").read_text()
    assert "false alarms" in page
    assert page.count("<svg") == 2
    results = json.loads((warped.out / "results.json").read_text())
    assert results["matched"] is True


def test_the_overlay_shows_the_first_where_the_second_has_it(files, monkeypatch):
    monkeypatch.setattr(match_report, "SIDE", 320)
    photographs = [photograph("china"), Image.open(files / "warped.png").convert("RGB")]
    right = draw_overlay(photographs, H_TRUE).axes[0].images[0].get_array()
    wrong = draw_overlay(photographs, np.eye(3)).axes[0].images[0].get_array()
    truth = np.asarray(photographs[1], dtype=float)
    lifted = 255 * (truth / 255) ** (1 / 1.4)
    assert np.abs(right - lifted).mean() < 0.75 * np.abs(wrong - lifted).mean()


def test_other_scenes_do_not_match(files, tmp_path):
    found = match(files / "china.png", files / "flower.png", out=tmp_path / "o")
    assert not found.matched
    assert found.homography is None
    assert found.results["answer"].startswith("do not match: ")
    assert not (found.out / "homography.txt").exists()
    assert not (found.out / "overlay.png").exists()
    assert (found.out / "matches.png").exists()


def test_the_same_picture_is_named_identical(files, tmp_path):
    found = match(files / "china.png", files / "china.png", out=tmp_path / "o")
    assert found.edit.parts == ("identity",)
    assert corner_error(found.homography, np.eye(3)) < 0.1


def test_a_mirror_image_is_found_when_asked_for(files, tmp_path):
    pair = files / "china.png", files / "mirrored.png"
    assert not match(*pair, out=tmp_path / "plain").matched
    found = match(*pair, out=tmp_path / "o", mirror=True)
    assert found.matched
    assert found.results["mirrored"]
    assert "mirrored" in found.results["answer"]
    assert "flip" in found.edit.parts
    assert corner_error(found.homography, FLIP) < 1


def test_asking_for_a_mirror_image_too_keeps_the_plain_answer(files, warped, tmp_path):
    found = match(files / "china.png", files / "warped.png", out=tmp_path / "o", mirror=True)
    assert not found.results["mirrored"]
    assert np.array_equal(found.homography, warped.homography)


def test_a_quarter_turn_clockwise(files, tmp_path):
    found = match(files / "china.png", files / "turned.png", out=tmp_path / "o")
    assert found.edit.parts == ("rotation",)
    assert found.edit.rotation == pytest.approx(90, abs=0.2)
    truth = np.array([[0.0, -1, SIZE[1] - 1], [1, 0, 0], [0, 0, 1]])
    assert corner_error(found.homography, truth) < 1


def test_exif_orientation_is_followed(files, tmp_path):
    turned = Image.open(files / "turned.png")
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned a quarter anticlockwise
    turned.save(tmp_path / "exif.jpg", quality=95, exif=exif)
    found = match(files / "china.png", tmp_path / "exif.jpg", out=tmp_path / "o")
    assert found.edit.parts == ("identity",)
    assert corner_error(found.homography, np.eye(3)) < 1


def test_large_photographs_are_reduced_and_answered_in_their_own_pixels(files, tmp_path):
    large = photograph("china").resize((960, 639), Image.Resampling.BICUBIC)
    large.save(tmp_path / "large.png")
    seen = look(large, 320)
    assert seen.grey.shape == (213, 320)
    corners = np.array([[-0.5, -0.5, 1], [319.5, 212.5, 1]])
    assert np.allclose(corners @ seen.enlarge.numpy().T, [[-0.5, -0.5, 1], [959.5, 638.5, 1]])
    found = match(files / "china.png", tmp_path / "large.png", out=tmp_path / "o", longest=320)
    truth = np.array([[3.0, 0, 1], [0, 3, 1], [0, 0, 1]])
    assert corner_error(found.homography, truth) < 3
    assert found.edit.parts == ("scale",)
    with np.load(found.out / "matches.npz") as held:
        assert held["xy_second"].max() > 700


@pytest.mark.parametrize("name", ["grey", "tiny"])
def test_a_picture_without_key_points_says_so(files, tmp_path, name):
    found = match(files / "china.png", files / f"{name}.png", out=tmp_path / "o")
    assert not found.matched
    assert found.results["matches"] == 0 or name == "tiny"
    assert found.results["answer"].startswith("do not match")
    if name == "grey":
        assert found.results["answer"] == "do not match: the second photograph has no key points"
    assert (found.out / "report.html").exists()


def test_two_flat_pictures(files, tmp_path):
    found = match(files / "grey.png", files / "grey.png", out=tmp_path / "o", mirror=True)
    assert found.results["answer"] == "do not match: neither photograph has any key points"


def test_a_whitening_of_two_pictures_serves(files, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    photograph("china").save(folder / "a.png")
    photograph("flower").save(folder / "b.png")
    learned = describe(str(folder), out=tmp_path / "learned", learn_whitening="pcaws")
    found = match(
        files / "china.png",
        files / "warped.png",
        out=tmp_path / "o",
        whitening=learned.out / "whitening.safetensors",
    )
    assert found.matched
    assert found.results["descriptors"] == "the whitening given"
    assert corner_error(found.homography, H_TRUE) < 2


def test_the_same_again(files, warped, tmp_path):
    again = match(files / "china.png", files / "warped.png", out=tmp_path / "o")
    assert np.array_equal(again.homography, warped.homography)
    for name in ("matches.npz", "homography.txt"):
        assert (again.out / name).read_bytes() == (warped.out / name).read_bytes()


def test_bad_pictures_are_refused(files, tmp_path):
    china, out = files / "china.png", tmp_path / "o"
    refused("gone.png: no such file", china, files / "gone.png", out=out)
    refused("no such file", files, china, out=out)
    refused("text.jpg: unreadable image .not an image.; give another", china, files / "text.jpg",
            out=out)  # fmt: skip
    refused("broken.jpg: unreadable image", files / "broken.jpg", china, out=out)


def test_bad_options_are_refused(files, tmp_path):
    pair = files / "china.png", files / "warped.png"
    for words, option in {
        "--ratio 1.5": {"ratio": 1.5},
        "--ratio nan": {"ratio": float("nan")},
        "--tolerance 0": {"tolerance": 0.0},
        "--keypoints 0": {"keypoints": 0},
        "--longest 4": {"longest": 4},
        "--seed -1": {"seed": -1},
        "there is no whitening": {"whitening": tmp_path / "none.safetensors"},
    }.items():
        refused(words, *pair, out=tmp_path / "o", **option)


def test_a_whitening_of_other_descriptors_is_refused(files, tmp_path):
    polar = describe(
        str(files / "china.png"), out=tmp_path / "polar", kind="polar", learn_whitening="pcaws"
    )
    refused(
        "was learned on descriptors",
        files / "china.png",
        files / "warped.png",
        out=tmp_path / "o",
        whitening=polar.out / "whitening.safetensors",
    )


def test_an_existing_folder_is_left_alone(files, warped):
    before = sorted(warped.out.iterdir())
    with pytest.raises(InputError, match="already exists"):
        match(files / "china.png", files / "warped.png", out=warped.out)
    assert sorted(warped.out.iterdir()) == before


def test_the_command_ends_with_0_on_both_answers_and_2_on_bad_input(files, tmp_path, capsys):
    china = str(files / "china.png")
    for name, status in {"flower.png": 0, "warped.png": 0, "text.jpg": 2}.items():
        out = str(tmp_path / name)
        assert main(["search", "match", china, str(files / name), "--out", out]) == status
    assert len(capsys.readouterr().err.strip().splitlines()[-1]) > 0
    assert not (tmp_path / "text.jpg").exists()
