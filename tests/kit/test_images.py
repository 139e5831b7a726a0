import io
import pickle
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from remanence.errors import InputError
from remanence.kit import sources
from remanence.kit.images import Images, open_images, open_splits


def picture(seed, size=(9, 7), mode="RGB"):
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def class_folders(root, classes=("cat", "dog"), each=3, start=0):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            picture(start + 100 * label + i).save(root / name / f"{i}.png")
    return root


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class Blobs:
    """A store of encoded images in memory."""

    def __init__(self, blobs):
        self.blobs = blobs

    def read(self, index):
        return self.blobs[index]


def collection(blobs, labels=None):
    labels = np.zeros(len(blobs), np.int64) if labels is None else np.asarray(labels)
    ids = tuple(f"img{i}" for i in range(len(blobs)))
    return Images("mem", ("a", "b"), labels, ids, Blobs(blobs), np.arange(len(blobs)))


# Digits


def test_digits_are_scikit_learns_and_their_splits_divide_them():
    whole = open_images("digits")
    bunch = load_digits()
    assert len(whole) == 1797
    assert (whole.labels == bunch.target).all()
    grey = np.asarray(whole.image(5))[..., 0]
    assert np.array_equal(grey, np.rint(bunch.images[5] * 255 / 16).astype(np.uint8))
    train, test = open_images("digits@train"), open_images("digits", split="test")
    assert len(test) == 360
    assert sorted(train.ids + test.ids) == sorted(whole.ids)


# Folders


def test_class_folders_are_opened_with_their_pixels(tmp_path):
    opened = open_images(str(class_folders(tmp_path / "pets")))
    assert opened.classes == ("cat", "dog")
    assert opened.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert opened.ids == tuple(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3))
    assert np.array_equal(np.asarray(opened.image(4)), np.asarray(picture(101)))


def test_class_10_comes_after_class_9(tmp_path):
    class_folders(tmp_path, [str(i) for i in range(12)], each=1)
    assert open_images(str(tmp_path)).classes == tuple(str(i) for i in range(12))


def test_class_names_that_differ_in_a_superscript_or_a_zero_keep_their_order(tmp_path):
    class_folders(tmp_path, ["m²", "01", "1", "a"], each=1)
    assert open_images(str(tmp_path)).classes == ("01", "1", "a", "m²")


def test_hidden_files_and_folders_are_left_out_and_nested_ones_read(tmp_path):
    root = class_folders(tmp_path / "pets", each=1)
    (root / "cat" / "._0.png").write_bytes(b"resource fork of a Mac")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / ".git").mkdir()
    (root / "cat" / ".ipynb_checkpoints").mkdir()
    picture(7).save(root / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (root / "cat" / "a" / "b").mkdir(parents=True)
    picture(8).save(root / "cat" / "a" / "b" / "deep.JPG")
    assert open_images(str(root)).ids == ("cat/0.png", "cat/a/b/deep.JPG", "dog/0.png")


@pytest.mark.parametrize("word", ["validation", "val", "valid", "dev", "Val"])
def test_split_folders_go_by_their_usual_names(tmp_path, word):
    class_folders(tmp_path / "train", each=4)
    class_folders(tmp_path / word, each=2, start=5000)
    assert sources.splits(str(tmp_path)) == ["train", "validation"]
    train, validation, test = open_splits(str(tmp_path))
    assert (len(train), len(validation), test) == (8, 4, None)
    assert len(open_images(f"{tmp_path}@{word}")) == 4
    with pytest.raises(InputError, match=r"holds the splits .* name one"):
        open_images(str(tmp_path))


def test_a_class_called_train_is_not_a_split(tmp_path):
    class_folders(tmp_path, ("bus", "train", "tram", "crash-test"))
    assert sources.splits(str(tmp_path)) == []
    assert open_images(str(tmp_path)).classes == ("bus", "crash-test", "train", "tram")


def test_splits_without_class_folders_are_not_taken_for_classes(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "0.png")
    with pytest.raises(InputError, match="holds no class folders"):
        open_splits(str(tmp_path))


def test_images_without_class_folders_open_where_labels_are_not_needed(tmp_path):
    for number in range(20):
        picture(number).save(tmp_path / f"{number}.png")
    train, validation, test = open_splits(str(tmp_path), labels=False)
    assert (len(train), len(validation), test) == (18, 2, None)
    assert train.classes == sources.UNLABELLED
    with pytest.raises(InputError, match="holds no class folders"):
        open_images(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="class folder without images"):
        open_images(str(tmp_path), labels=False)


def test_a_folder_without_any_image_is_refused_also_without_labels(tmp_path):
    with pytest.raises(InputError, match="holds no images"):
        open_images(str(tmp_path), labels=False)


def test_a_path_may_hold_an_at_sign_of_its_own(tmp_path):
    root = tmp_path / "me@host"
    class_folders(root / "set@v2" / "train", each=4)
    class_folders(root / "set@v2" / "test", each=1, start=5000)
    source = str(root / "set@v2")
    assert [part and len(part) for part in open_splits(source)] == [7, 1, 2]
    assert len(open_images(f"{source}@test")) == 2
    assert len(open_images(str(root / "set@v2" / "test"))) == 2
    with pytest.raises(InputError, match="no such file"):
        open_images(str(root / "absent" / "x"))


def test_an_existing_folder_is_a_path_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "torch" / "pets")
    assert len(open_images("torch/pets")) == 6
    assert open_images("wds/torch/pets").classes == ("cat", "dog")


def test_splits_with_other_classes_are_refused(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "test", ("cat", "cow"))
    with pytest.raises(InputError, match=r"different classes \(cow, dog\)"):
        open_splits(str(tmp_path))


# Splitting


@settings(deadline=None, max_examples=40)
@given(labels=st.lists(st.integers(0, 1), min_size=2, max_size=60), seed=st.integers(0, 5))
def test_halves_and_the_held_out_tenth_are_disjoint_whole_and_stratified(labels, seed):
    whole = collection([b""] * len(labels), labels)
    for parts, share in ((whole.halves(seed), 0.5), (whole.hold_out(seed)[::-1], 0.1)):
        assert sorted(parts[0].ids + parts[1].ids) == sorted(whole.ids)
        assert all(len(part) for part in parts)
        if share * len(labels) >= 1:
            for label in (0, 1):
                count = labels.count(label)
                assert abs((parts[0].labels == label).sum() - share * count) <= 1
    first = whole.halves(seed)[0]
    assert first.ids == whole.halves(seed)[0].ids


def test_one_image_cannot_be_split():
    with pytest.raises(InputError, match="too few"):
        collection([b""]).halves(0)


def test_a_subset_keeps_order_pixels_and_names(tmp_path):
    whole = open_images(str(class_folders(tmp_path)))
    cached, encoded_only = whole, open_images(str(tmp_path), cache_bytes=0)
    for images in (cached, encoded_only):
        part = images.subset([4, 0]).subset([1, 0])
        assert part.ids == ("cat/0.png", "dog/1.png")
        assert np.array_equal(np.asarray(part.image(1)), np.asarray(picture(101)))


def test_limit_is_the_same_draw_each_time():
    ids = open_images("digits", limit=50).ids
    assert len(set(ids)) == 50
    assert open_images("digits", limit=50).ids == ids
    with pytest.raises(InputError, match="--limit 0"):
        open_images("digits", limit=0)


# Decoding


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_the_cache_changes_no_pixel(tmp_path, kind):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(40):
            suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
            picture(i).save(tmp_path / name / f"{i}.{suffix}", kind)
    cached, read = open_images(str(tmp_path)), open_images(str(tmp_path), cache_bytes=0)
    assert cached.decoded is not None
    assert read.decoded is None
    assert all(
        np.array_equal(np.asarray(cached.image(i)), np.asarray(read.image(i))) for i in range(80)
    )
    assert cached.sizes().tolist() == read.sizes().tolist() == [[7, 9]] * 80


def test_every_colour_mode_becomes_8_bit_rgb():
    grey = picture(1, mode="L")
    ramp = np.arange(0, 63 * 1040, 1040, dtype=np.uint16).reshape(7, 9)
    palette = picture(2).quantize(8)
    blobs = {
        "RGB": (encoded(picture(3)), np.asarray(picture(3))),
        "RGBA": (encoded(picture(3, mode="RGBA")), np.asarray(picture(3))),
        "L": (encoded(grey), np.asarray(grey.convert("RGB"))),
        "1": (encoded(grey.convert("1")), np.asarray(grey.convert("1").convert("RGB"))),
        "P": (encoded(palette), np.asarray(palette.convert("RGB"))),
        "CMYK": (
            encoded(picture(4, mode="CMYK"), "TIFF"),
            np.asarray(picture(4, mode="CMYK").convert("RGB")),
        ),
        # 65,535 is white: Pillow alone would clip all above 255.
        "I;16": (
            encoded(Image.fromarray(ramp)),
            np.repeat((ramp // 257).astype(np.uint8)[..., None], 3, -1),
        ),
    }
    images = collection([blob for blob, _ in blobs.values()])
    for index, (mode, (_, expected)) in enumerate(blobs.items()):
        found = np.asarray(images.image(index))
        assert found.dtype == np.uint8, mode
        assert np.array_equal(found, expected), mode


def test_a_transparent_palette_gives_its_pixels_without_a_warning():
    palette = picture(5).quantize(4)
    blob = encoded(palette, transparency=bytes([0, 255, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = collection([blob]).image(0)
    assert np.array_equal(np.asarray(found), np.asarray(palette.convert("RGB")))


def png_bomb(side=20000):
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def damaged():
    jpeg = encoded(picture(6, (64, 64)), "JPEG")
    png = encoded(picture(6, (64, 64)))
    tiff = encoded(picture(6, (64, 64)), "TIFF")
    return {
        "empty": b"",
        "text": b"<html>404</html>",
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "header of a jpeg": jpeg[:30],
        "half a png": png[: len(png) // 2],
        "png with a flipped byte": png[:60] + bytes([png[60] ^ 255]) + png[61:],
        "half a tiff": tiff[:40],
        "decompression bomb": png_bomb(),
    }


@pytest.mark.filterwarnings("ignore")  # Pillow speaks of the damage too
@pytest.mark.parametrize("what", damaged())
def test_a_damaged_image_is_named_in_one_line(what):
    with pytest.raises(InputError) as caught:
        collection([damaged()[what]]).image(0)
    message = str(caught.value)
    assert message.startswith("img0: unreadable image (")
    assert "--skip-broken" in message
    assert "\n" not in message


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_whatever_the_bytes_an_image_opens_or_is_refused(data):
    whole = data.draw(st.sampled_from([encoded(picture(1), kind) for kind in KINDS]))
    cut = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4)) if cut else 0):
        cut[data.draw(st.integers(0, len(cut) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert collection([bytes(cut)]).image(0).mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017  # either outcome is right


KINDS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")


@pytest.mark.parametrize("cache_bytes", [2**30, 0], ids=["cached", "not cached"])
def test_skip_broken_goes_on_and_counts_once(tmp_path, capsys, cache_bytes):
    class_folders(tmp_path, each=10)
    (tmp_path / "dog" / "5.png").write_bytes(b"broken")
    if cache_bytes:
        with pytest.raises(InputError, match=r"dog/5\.png: unreadable image"):
            open_images(str(tmp_path), cache_bytes=cache_bytes)
    opened = open_images(str(tmp_path), skip_broken=True, cache_bytes=cache_bytes)
    assert (len(opened), opened.skipped) == (19, 1)
    assert "left out 1 unreadable of 20 images, first dog/5.png" in capsys.readouterr().err
    assert np.array_equal(np.asarray(opened.image(15)), np.asarray(picture(106)))
    for first, second in (opened.halves(0), opened.hold_out()):
        assert first.skipped + second.skipped == 1


def test_without_the_cache_skip_broken_keeps_no_pixels(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(130):
        Image.new("RGB", (300, 300), (i, 0, 0)).save(tmp_path / "a" / f"{i}.png")
    tracemalloc.start()
    open_images(str(tmp_path), skip_broken=True, cache_bytes=0, limit=128)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.4 * 128 * 300 * 300 * 3


def test_all_images_broken_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"x")
    with pytest.raises(InputError, match="none of its 1 images can be read"):
        open_images(str(tmp_path), skip_broken=True)


def test_a_collection_survives_pickling_for_loader_workers(tmp_path):
    opened = open_images(str(class_folders(tmp_path)), cache_bytes=0)
    again = pickle.loads(pickle.dumps(opened))  # noqa: S301  # our own bytes
    assert np.array_equal(np.asarray(again.image(3)), np.asarray(opened.image(3)))
