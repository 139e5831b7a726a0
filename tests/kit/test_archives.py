import io
import json
import pickle
import sys
import tarfile
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10

from remanence.errors import InputError
from remanence.kit import sources
from remanence.kit.archives import natural
from remanence.kit.images import open_images, open_splits


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def table(seeds, labels, *, image="image", label="label", names=None, plain=False):
    blobs = [png(seed) if isinstance(seed, int) else seed for seed in seeds]
    cells = blobs if plain else [{"bytes": blob, "path": None} for blob in blobs]
    made = pa.table({image: cells, label: pa.array(labels)})
    if names is None:
        return made
    feature = {"_type": "ClassLabel", "names": list(names)}
    info = {"info": {"features": {image: {"_type": "Image"}, label: feature}}}
    return made.replace_schema_metadata({"huggingface": json.dumps(info)})


def same(image, seed):
    return np.array_equal(np.asarray(image), np.asarray(picture(seed)))


# Parquet


@pytest.mark.parametrize("plain", [False, True], ids=["struct", "bytes"])
@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "labels")])
def test_a_parquet_file_gives_its_rows(tmp_path, image, label, plain):
    path = tmp_path / "data.parquet"
    pq.write_table(
        table(range(7), [2, 0, 1, 2, 0, 1, 2], image=image, label=label, plain=plain),
        path,
        row_group_size=3,
    )
    opened = open_images(str(path), cache_bytes=0)
    assert opened.classes == ("0", "1", "2")
    assert opened.labels.tolist() == [2, 0, 1, 2, 0, 1, 2]
    assert opened.ids == tuple(f"data.parquet:{row}" for row in range(7))
    assert all(same(opened.image(row), row) for row in (6, 0, 3, 2))


def test_class_names_come_from_the_metadata(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(range(2), [1, 0], names=["cat", "dog", "cow"]), path)
    assert open_images(str(path)).classes == ("cat", "dog", "cow")


def hub_layout(root):
    names = ["cat", "dog"]
    (root / "data").mkdir(parents=True)
    (root / "README.md").write_text("# card")
    for shard in range(12):
        rows = range(2 * shard, 2 * shard + 2)
        file = root / "data" / f"train-{shard}-of-12.parquet"
        pq.write_table(table(rows, [0, 1], names=names), file)
    pq.write_table(
        table(range(90, 93), [0, 1, 1], names=names), root / "data" / "test-0-of-1.parquet"
    )
    return root


def test_splits_of_the_hub_layout_are_kept_apart_and_shards_in_order(tmp_path):
    root = hub_layout(tmp_path)
    assert sources.splits(str(root)) == ["train", "test"]
    train, validation, test = open_splits(str(root))
    assert len(train) + len(validation) == 24
    assert len(test) == 3
    assert same(test.image(2), 92)
    whole = open_images(f"{root}@train")
    assert [int(name.split("-")[1]) for name in whole.ids[::2]] == list(range(12))
    with pytest.raises(InputError, match="holds the splits test, train; name one"):
        open_images(str(root))
    with pytest.raises(InputError, match="@extra: no file of that split"):
        open_images(f"{root}@extra")


def test_in_a_path_the_last_split_word_counts(tmp_path):
    (tmp_path / "my_test_set").mkdir()
    for name, rows in (("train", range(4)), ("test", range(4, 6))):
        pq.write_table(
            table(rows, [0, 1] * (len(rows) // 2)), tmp_path / "my_test_set" / f"{name}.parquet"
        )
    assert len(open_images(f"{tmp_path}@test")) == 2
    assert len(open_images(f"{tmp_path}@train")) == 4


def test_a_split_of_a_single_file_is_refused(tmp_path):
    path = tmp_path / "train.parquet"
    pq.write_table(table(range(2), [0, 1]), path)
    with pytest.raises(InputError, match="a single file has no splits"):
        open_images(f"{path}@test")


def test_files_of_one_name_in_two_folders_keep_their_ids_apart(tmp_path):
    for fold in ("fold1", "fold2"):
        (tmp_path / fold).mkdir()
        pq.write_table(table(range(2), [0, 1]), tmp_path / fold / "0.parquet")
    ids = open_images(str(tmp_path)).ids
    assert ids == ("fold1/0.parquet:0", "fold1/0.parquet:1", "fold2/0.parquet:0", ids[3])
    assert len(set(ids)) == 4


def test_a_test_split_that_lacks_the_last_label_takes_the_training_classes(tmp_path):
    pq.write_table(table(range(20), [0, 1, 2, 1] * 5), tmp_path / "train.parquet")
    pq.write_table(table(range(2), [1, 0]), tmp_path / "test.parquet")
    assert open_splits(str(tmp_path))[2].classes == ("0", "1", "2")


def test_the_store_survives_pickling_and_reads_in_loader_workers(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(range(6), [0, 1] * 3), path, row_group_size=2)
    opened = open_images(str(path), cache_bytes=0)
    opened.image(5)  # fills the cache of row groups, which must not travel
    blob = pickle.dumps(opened)
    assert len(blob) < 5000
    assert same(pickle.loads(blob).image(5), 5)  # noqa: S301  # our own bytes

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(opened)

        def __getitem__(self, row):
            return torch.from_numpy(np.array(opened.image(row)))

    found = torch.cat(list(DataLoader(Rows(), batch_size=2, num_workers=2)))
    assert all(np.array_equal(found[i], np.asarray(picture(i))) for i in range(6))


def refused_parquet(path, made):
    pq.write_table(made, path)
    with pytest.raises(InputError) as caught:
        open_images(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_parquet_is_refused_by_name(tmp_path):
    path = tmp_path / "a.parquet"
    message = refused_parquet(path, pa.table({"picture": [b"x"], "label": [0]}))
    assert message.startswith(f"{path}: no column 'image'; it has picture, label.")
    assert "no column 'label'" in refused_parquet(path, pa.table({"image": [b"x"]}))
    assert "integer" in refused_parquet(path, table([1], ["cat"]))
    assert "integer" in refused_parquet(path, table([1, 2], [0, None]))
    assert "label -1 is out of range" in refused_parquet(path, table([1, 2], [0, -1]))
    message = refused_parquet(path, table([1, 2], [0, 2], names=["cat", "dog"]))
    assert "a.parquet:1: label 2 is out of range" in message
    assert message.endswith("go from 0 to 1")
    assert "out of range" in refused_parquet(path, table([1], [10**12]))
    assert "out of range" in refused_parquet(path, table([1], pa.array([2**64 - 1], pa.uint64())))
    assert "holds no images" in refused_parquet(path, table([1], [0]).slice(0, 0))
    assert "a.parquet:1: unreadable image (not an image)" in refused_parquet(
        path, table([1, b"broken"], [0, 1])
    )
    assert "no image bytes" in refused_parquet(path, table([1, None], [0, 1]))
    for blob in (b"", b"PAR1", path.read_bytes()[:-20]):
        path.write_bytes(blob)
        with pytest.raises(InputError, match="not a readable parquet file"):
            open_images(str(path))


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_broken_rows_are_skipped_and_counted(tmp_path, cache_bytes):
    path = tmp_path / "a.parquet"
    pq.write_table(table([0, b"broken", 2, None], [0, 1, 0, 1]), path, row_group_size=2)
    opened = open_images(str(path), skip_broken=True, cache_bytes=cache_bytes)
    assert opened.skipped == 2
    assert opened.labels.tolist() == [0, 0]
    assert same(opened.image(1), 2)


def test_files_that_disagree_are_refused(tmp_path):
    pq.write_table(table([0], [0], names=["cat", "dog"]), tmp_path / "0.parquet")
    pq.write_table(table([0], [0], names=["dog", "cat"]), tmp_path / "1.parquet")
    with pytest.raises(InputError, match=r"1\.parquet: has .* other class names than"):
        open_images(str(tmp_path))
    pq.write_table(table([0], [0], names=["cat", "dog"], image="img"), tmp_path / "1.parquet")
    with pytest.raises(InputError, match=r"1\.parquet: has another image column"):
        open_images(str(tmp_path))


def test_archives_beside_class_folders_or_of_two_kinds_are_refused(tmp_path):
    pq.write_table(table([0], [0]), tmp_path / "a.parquet")
    tar(tmp_path / "b.tar", {"cat/0.png": png(0)})
    with pytest.raises(InputError, match=r"holds \.parquet and \.tar files"):
        open_images(str(tmp_path))
    (tmp_path / "cat").mkdir()
    picture(0).save(tmp_path / "cat" / "0.png")
    with pytest.raises(InputError, match=r"holds both a\.parquet and image files"):
        open_images(str(tmp_path))


# Tar


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as opened:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return path


def test_class_folders_in_a_tar(tmp_path):
    members = {f"./pets/{i}/{j}.png": png(10 * i + j) for i in (0, 2, 10) for j in range(2)}
    members |= {"pets/._0.png": b"resource fork", "pets/readme.txt": b"text"}
    opened = open_images(str(tar(tmp_path / "a.tar", members)), cache_bytes=0)
    assert opened.classes == ("0", "2", "10")
    assert opened.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert opened.ids[4] == "a.tar/pets/10/0.png"
    assert same(opened.image(5), 101)


def test_webdataset_shards_and_their_splits(tmp_path):
    for split, shards in (("train", 3), ("val", 1)):
        for shard in range(shards):
            samples = {}
            for i in range(4):
                # Every shard has the same keys; .cls may come before or after.
                samples[f"{i:04d}.cls"] = str(i % 3).encode()
                samples[f"{i:04d}.png"] = png(100 * shard + i)
            tar(tmp_path / f"{split}-{shard:03d}.tar", samples)
    assert sources.splits(f"wds/{tmp_path}") == ["train", "validation"]
    train, validation, _ = open_splits(f"wds/{tmp_path}")
    assert (len(train), len(validation)) == (12, 4)
    assert train.labels.tolist() == [0, 1, 2, 0] * 3
    assert same(train.image(6), 102)
    assert len(set(train.ids)) == 12


def test_shards_of_one_name_in_two_folders_keep_their_labels(tmp_path):
    for fold in (0, 1):
        (tmp_path / str(fold)).mkdir()
        tar(tmp_path / str(fold) / "0.tar", {"x.png": png(fold), "x.cls": str(fold).encode()})
    assert open_images(str(tmp_path)).labels.tolist() == [0, 1]


def refused(source):
    with pytest.raises(InputError) as caught:
        open_images(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_tars_are_refused_by_name(tmp_path):
    whole = {"cat/0.png": png(0), "dog/1.png": png(1)}
    assert "a.tar.gz: not a .parquet or .tar file" in refused(
        tar(tmp_path / "a.tar.gz", whole, "w:gz")
    )
    path = tmp_path / "a.tar"
    assert "not a whole, uncompressed tar" in refused(tar(path, whole, "w:gz"))
    path.write_bytes(b"")
    assert "not a whole, uncompressed tar" in refused(path)
    tar(path, {"cat/0.png": png(0), "dog/1.png": bytes(3000)})
    path.write_bytes(path.read_bytes()[:2000])
    assert "a.tar" in refused(path)
    assert "a.tar/0.png: lies in no class folder" in refused(tar(path, {"0.png": png(0)}))
    assert "x.png: has no .cls file" in refused(
        tar(path, {"x.png": png(0), "y.png": png(1), "y.cls": b"1"})
    )
    assert "b'cat' is not a class number" in refused(tar(path, {"x.png": png(0), "x.cls": b"cat"}))
    assert "label -1 is out of range" in refused(tar(path, {"x.png": png(0), "x.cls": b"-1"}))
    assert "out of range" in refused(tar(path, {"x.png": png(0), "x.cls": b"9" * 30}))
    assert "holds no images" in refused(tar(path, {"cat/readme.txt": b""}))
    message = refused(tar(path, {"train/cat/0.png": png(0), "test/cat/0.png": png(1)}))
    assert "train/cat is also a class folder cat" in message


def test_natural_order_mixes_numbers_and_words():
    names = ["b10", "b9", "a", "10", "9", "m²", "x1y2", "x1y10"]
    assert sorted(names, key=natural) == ["9", "10", "a", "b9", "b10", "m²", "x1y2", "x1y10"]


# timm's dataset names


def test_a_torchvision_dataset_that_is_not_there_is_refused_without_a_download(tmp_path):
    assert "timm cannot open it (Dataset not found" in refused(f"torch/cifar10:{tmp_path}")
    assert "Unknown torchvision dataset" in refused(f"torch/nothing:{tmp_path}")
    assert "timm cannot open it" in refused("torch/cifar10")
    assert not list(tmp_path.iterdir())


def cifar10(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        batch = {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_a_torchvision_dataset_is_opened_through_timm(tmp_path, monkeypatch):
    root = tmp_path / "me@host"
    root.mkdir()
    cifar10(root)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = f"torch/cifar10:{root}"
    train, validation, test = open_splits(source)
    assert (len(train), len(validation), len(test)) == (18, 2, 4)
    assert test.classes == tuple("abcdefghij")
    expected = CIFAR10(root, train=False)
    assert np.array_equal(np.asarray(test.image(2)), np.asarray(expected[2][0]))
    assert len(open_images(f"{source}@test")) == 4


def test_hub_datasets_without_their_extra_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"hfds/cifar10: needs the extra 'hf'"):
        open_images("hfds/cifar10")


def test_hub_datasets_are_read_through_timm(monkeypatch):
    class Column(list):
        """A column as the library gives it."""

    class Data:
        features = types.SimpleNamespace()

        def __init__(self):
            names = types.SimpleNamespace(names=["cat", "dog"])
            self.features = {"image": None, "label": names}

        def __getitem__(self, key):
            return Column([1, 0, 1]) if key == "label" else {"image": png(key)}

    class Reader:
        dataset, label_key = Data(), "label"

        def __getitem__(self, row):
            return io.BytesIO(png(row)), [1, 0, 1][row]

    made = types.SimpleNamespace(reader=Reader())
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: made)
    opened = open_images("hfds/me/pets@train")
    assert opened.classes == ("cat", "dog")
    assert opened.labels.tolist() == [1, 0, 1]
    assert same(opened.image(2), 2)
