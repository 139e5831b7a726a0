"""Stored predictions: round trips, pairing, reassessed labels and the class-order trap."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from remanence.errors import InputError
from remanence.kit.predictions import (
    Predictions,
    check_class_order,
    read_real_labels,
    real_accuracy,
)


def toy(n: int = 50, classes: int = 12, seed: int = 0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += 2
    return Predictions.from_logits([f"img/{i}.png" for i in range(n)], labels, logits)


def guesses(labels: np.ndarray, top1: np.ndarray, ids: list[str] | None = None) -> Predictions:
    n = len(labels)
    return Predictions(
        ids or [str(i) for i in range(n)],
        labels.astype(np.int64),
        top1.astype(np.int32)[:, None],
        np.full(n, 0.5, dtype=np.float32),
    )


# From logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_from_logits_is_sort_and_softmax(dtype: torch.dtype) -> None:
    logits = (torch.rand(40, 9, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    labels = torch.arange(40) % 9
    got = Predictions.from_logits([str(i) for i in range(40)], labels, logits)
    exact = logits.double().numpy()
    np.testing.assert_array_equal(
        np.take_along_axis(exact, got.top5.astype(np.int64), axis=1), -np.sort(-exact, 1)[:, :5]
    )
    softmax = np.exp(exact) / np.exp(exact).sum(1, keepdims=True)
    np.testing.assert_allclose(got.p1, softmax.max(1), rtol=1e-5)
    assert got.labels.dtype == np.int64
    assert got.p1.dtype == np.float32
    assert got.accuracy == np.mean(got.top5[:, 0] == labels.numpy())
    np.testing.assert_array_equal(got.correct5, (got.top5 == labels.numpy()[:, None]).any(1))
    assert got.correct.dtype == np.bool_


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0]], dtype=torch.float16)
    assert Predictions.from_logits(["a"], torch.tensor([0]), logits).p1[0] == 1


def test_fewer_than_five_classes_and_more_than_int16() -> None:
    narrow = Predictions.from_logits(["a"], torch.tensor([1]), torch.tensor([[0.0, 1.0, 0.5]]))
    assert narrow.top5.tolist() == [[1, 2, 0]]
    assert narrow.top5.dtype == np.int16
    logits = torch.zeros(1, 40_000)
    logits[0, 39_999] = 1
    wide = Predictions.from_logits(["a"], torch.tensor([39_999]), logits)
    assert wide.top5[0, 0] == 39_999
    assert wide.correct.all()


@pytest.mark.parametrize(
    ("ids", "labels", "logits", "message"),
    [
        (["a", "b"], [0], torch.zeros(1, 3), "2 ids, 1 labels"),
        (["a"], [3], torch.zeros(1, 3), "label 3.*3 classes"),
        (["a"], [-1], torch.zeros(1, 3), "label -1.*3 classes"),
        (["a"], [0], torch.tensor([[0.0, float("nan")]]), "NaN"),
        (["a"], [0], torch.tensor([[0.0, float("inf")]]), "infinity"),
        (["a"], [0], torch.zeros(3), r"\(N, C\)"),
        (["a", "a"], [0, 1], torch.zeros(2, 3), "'a'.*twice"),
        ([], [], torch.zeros(0, 3), "no predictions"),
    ],
)
def test_bad_logits(ids: list[str], labels: list[int], logits: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Predictions.from_logits(ids, torch.tensor(labels, dtype=torch.int64), logits)
    assert "\n" not in str(error.value)


def test_calibration_error_of_predictions() -> None:
    labels = np.array([0, 1, 2, 3])
    sure = guesses(labels, np.array([0, 1, 9, 9]))  # says 0.5, is right half of the time
    assert sure.calibration_error() == 0
    assert guesses(labels, labels).calibration_error() == pytest.approx(0.5)


# Parquet


def test_round_trip(tmp_path: Path) -> None:
    before = toy()
    before.write(tmp_path / "preds.parquet")
    after = Predictions.read(tmp_path / "preds.parquet")
    assert after.ids == before.ids
    for name in ("labels", "top5", "p1"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
        assert getattr(after, name).dtype == getattr(before, name).dtype
    schema = pq.read_schema(tmp_path / "preds.parquet")
    assert schema.names == ["id", "label", "top5", "p1"]
    assert schema.field("top5").type == pa.list_(pa.int16(), 5)
    assert schema.field("p1").type == pa.float32()


def test_reads_what_other_writers_produce(tmp_path: Path) -> None:
    table = pa.table(
        {
            "p1": pa.array([0.5, 0.25], pa.float64()),
            "top5": pa.array([[1, 0], [0, 1]], pa.list_(pa.int64())),
            "id": pa.array(["x", "y"], pa.large_string()),
            "label": pa.array([1, 1], pa.int32()),
            "extra": ["kept", "out"],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    got = Predictions.read(tmp_path / "p.parquet")
    assert got.ids == ["x", "y"]
    assert got.correct.tolist() == [True, False]
    assert got.top5.shape == (2, 2)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("id", None, "no column 'id'"),
        ("top5", None, "no column 'top5'"),
        ("label", ["cat", "dog"], "'label'.*string"),
        ("label", [0, None], "'label'.*empty"),
        ("top5", [[1, 0], [1]], "'top5'.*same length"),
        ("top5", [[1, 0], [1, None]], "'top5'.*empty"),
        ("top5", [0, 1], "'top5'"),
        ("label", [0, -1], "negative"),
        ("p1", [0.5, 1.5], "p1.*between 0 and 1"),
        ("p1", [0.5, float("nan")], "p1.*between 0 and 1"),
        ("id", ["x", "x"], "'x'.*twice"),
    ],
)
def test_broken_columns(tmp_path: Path, column: str, values: Any, message: str) -> None:
    columns: dict[str, Any] = {
        "id": ["x", "y"],
        "label": [0, 1],
        "top5": [[0, 1], [1, 0]],
        "p1": [0.5, 0.5],
    }
    if values is None:
        del columns[column]
    else:
        columns[column] = values
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=message) as error:
        Predictions.read(tmp_path / "p.parquet")
    assert str(tmp_path / "p.parquet") in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_or_foreign_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.parquet"):
        Predictions.read(tmp_path / "nowhere.parquet")
    (tmp_path / "text.parquet").write_text("not parquet\n" * 9)
    with pytest.raises(InputError, match=r"text\.parquet.*not a parquet file") as error:
        Predictions.read(tmp_path / "text.parquet")
    assert "\n" not in str(error.value)


# Pairing


def test_aligned_reorders_by_id() -> None:
    mine, theirs = toy(), toy(seed=0)
    assert mine.aligned(theirs) is theirs
    order = np.random.default_rng(0).permutation(50)
    shuffled = Predictions(
        [theirs.ids[i] for i in order], theirs.labels[order], theirs.top5[order], theirs.p1[order]
    )
    back = mine.aligned(shuffled)
    assert back.ids == mine.ids
    for name in ("labels", "top5", "p1"):
        np.testing.assert_array_equal(getattr(back, name), getattr(theirs, name))


def test_aligned_counts_what_differs() -> None:
    labels = np.zeros(3)
    one = guesses(labels, labels, ["a", "b", "c"])
    with pytest.raises(InputError, match="3 ids differ"):
        one.aligned(guesses(np.zeros(4), np.zeros(4), ["b", "a", "d", "e"]))
    with pytest.raises(InputError, match="1 labels differ"):
        one.aligned(guesses(np.array([0, 0, 1]), labels, ["c", "b", "a"]))


# Reassessed labels


def test_real_accuracy_by_hand(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("[[1, 4], [], [2], [0]]")
    sets = read_real_labels(tmp_path / "real.json")
    assert sets == [[1, 4], [], [2], [0]]
    # Labels play no part: right in the set, excluded, wrong, right.
    predictions = guesses(np.array([7, 7, 7, 7]), np.array([4, 7, 7, 0]))
    assert real_accuracy(predictions, sets) == (2, 3)


def test_real_accuracy_goes_by_image_number_where_ids_have_one() -> None:
    # An image folder lists the validation set by class, not in the file order of the label file.
    ids = [f"val/n0{c}/ILSVRC2012_val_{k:08d}.JPEG" for c, k in [(1, 3), (1, 4), (2, 1)]]
    predictions = guesses(np.zeros(3), np.array([30, 40, 10]), ids)
    assert real_accuracy(predictions, [[10], [20], [30], [41]]) == (2, 3)
    with pytest.raises(InputError, match=r"image 4 .*3 images"):
        real_accuracy(predictions, [[10], [20], [30]])


def test_real_labels_must_fit() -> None:
    predictions = guesses(np.zeros(2), np.zeros(2))
    with pytest.raises(InputError, match=r"3 images.*2 predictions"):
        real_accuracy(predictions, [[0], [0], [0]])
    with pytest.raises(InputError, match="no image"):
        real_accuracy(predictions, [[], []])


@pytest.mark.parametrize("text", ['{"a": 1}', "[1, 2]", '[["cat"]]', "[[1.5]]", "[[true]]", "[["])
def test_broken_real_labels(tmp_path: Path, text: str) -> None:
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(InputError, match=r"real\.json") as error:
        read_real_labels(tmp_path / "real.json")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"gone\.json"):
        read_real_labels(tmp_path / "gone.json")


def test_real_labels_of_the_published_size(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json.dumps([[i % 1000] for i in range(50_000)]))
    assert len(read_real_labels(tmp_path / "real.json")) == 50_000


# Class order


def loaded(names: list[str], accuracy: float, per_class: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Labels as positions in `names`, and guesses of a model whose class k is the folder "k"."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(names)), per_class)
    true_class = np.array([int(name) for name in names])[labels]
    right = rng.random(len(labels)) < accuracy
    return labels, np.where(right, true_class, rng.integers(len(names), size=len(labels)))


@pytest.mark.parametrize("classes", [12, 100, 1000])
@pytest.mark.parametrize("accuracy", [1.0, 0.7, 0.3])
def test_string_sorted_folders_are_found(classes: int, accuracy: float) -> None:
    names = sorted(str(k) for k in range(classes))
    predictions = guesses(*loaded(names, accuracy))
    assert predictions.accuracy < 0.3  # the trap: nothing else would tell
    with pytest.raises(InputError, match="numeric order") as error:
        check_class_order(predictions, names)
    assert "\n" not in str(error.value)


def test_numerically_sorted_folders_pass() -> None:
    names = [str(k) for k in range(1000)]
    predictions = guesses(*loaded(names, 0.7))
    assert predictions.accuracy > 0.69
    check_class_order(predictions, names)


def test_the_reverse_mistake_is_found() -> None:
    # A model trained on string-sorted folders, tested by a loader that sorts numerically.
    names = [f"class{k}" for k in range(100)]
    labels = np.repeat(np.arange(100), 10)
    top1 = np.array([sorted(names).index(name) for name in names])[labels]
    with pytest.raises(InputError, match="string order"):
        check_class_order(guesses(labels, top1), names)


def test_a_poor_model_is_not_accused() -> None:
    rng = np.random.default_rng(0)
    names = sorted(str(k) for k in range(100))
    labels = rng.integers(100, size=5000)
    check_class_order(guesses(labels, rng.integers(100, size=5000)), names)  # untrained
    # Collapsed onto one class, which happens to be frequent under the other order.
    labels = np.where(rng.random(5000) < 0.6, names.index("42"), labels)
    check_class_order(guesses(labels, np.full(5000, 42)), names)
    check_class_order(guesses(*loaded(names, 0.9, per_class=1)), [f"{k:03d}" for k in range(100)])
    check_class_order(guesses(np.zeros(3), np.ones(3)), ["cat", "dog"])


def test_class_names_must_cover_the_labels() -> None:
    with pytest.raises(InputError, match=r"label 5.*2 class names"):
        check_class_order(guesses(np.array([0, 5]), np.array([0, 0])), ["0", "1"])
