"""What a classifier said about each image, kept so that no comparison needs a second run."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from remanence.errors import InputError
from remanence.kit.statistics import expected_calibration_error, mcnemar

_NUMBER = re.compile(r"(\d+)", re.ASCII)
_IMAGENET_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
_MEND = "write it again with Predictions.write"


@dataclass(frozen=True, eq=False)
class Predictions:
    """Top predictions of one model on N images.

    Attributes:
        ids: N unique names, such as paths relative to the data's root.
        labels: (N,) int64, class indices.
        top5: (N, min(5, C)) int16 (int32 beyond 32,768 classes), best class first.
        p1: (N,) float32 in [0, 1], softmax probability of the best class.

    Raises:
        InputError: If the lengths disagree, N = 0, an id stands twice or a value is out of range.
    """

    ids: list[str]
    labels: NDArray[np.int64]
    top5: NDArray[np.int16] | NDArray[np.int32]
    p1: NDArray[np.float32]

    def __post_init__(self) -> None:
        n = len(self.ids)
        if not (self.labels.shape == self.p1.shape == self.top5.shape[:1] == (n,)):
            raise InputError(
                f"{n} ids, {len(self.labels)} labels, {len(self.top5)} top-5 rows and "
                f"{len(self.p1)} probabilities: give one of each per image"
            )
        if n == 0:
            raise InputError("no predictions: give at least one image")
        if self.top5.ndim != 2 or not 1 <= self.top5.shape[1] <= 5:
            raise InputError(f"top5 has shape {self.top5.shape}: give (N, min(5, classes))")
        if min(self.labels.min(), self.top5.min()) < 0:
            raise InputError("labels or top5 hold negative classes: number classes from 0")
        if not ((self.p1 >= 0) & (self.p1 <= 1)).all():
            raise InputError("p1 holds values that are not between 0 and 1: store probabilities")
        if len(set(self.ids)) < n:
            twice = Counter(self.ids).most_common(1)[0][0]
            raise InputError(f"id {twice!r} stands twice: name every image once")

    @classmethod
    def from_logits(cls, ids: Sequence[str], labels: torch.Tensor, logits: torch.Tensor) -> Self:
        """Keep the top five classes and the best one's probability.

        Args:
            ids: N unique names.
            labels: (N,) integer tensor, class indices in [0, C).
            logits: (N, C) float tensor, any precision, on any device.

        Raises:
            InputError: If shapes disagree, a label is no class of the model or a logit is NaN.
        """
        if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(ids) != len(logits):
            raise InputError(
                f"{len(ids)} ids, {labels.numel()} labels and logits of shape "
                f"{tuple(logits.shape)}: give N, (N,) and (N, C)"
            )
        if logits.numel() == 0:
            raise InputError("no predictions: give at least one image")
        classes = logits.shape[1]
        strange = labels[(labels < 0) | (labels >= classes)]
        if len(strange):
            raise InputError(
                f"label {int(strange[0])} where the model has {classes} classes, 0 to "
                f"{classes - 1}: use the class list that the model was trained with"
            )
        top, index = logits.detach().topk(min(5, classes), dim=1)
        if not top[:, 0].isfinite().all():
            raise InputError("the logits hold NaN or infinity: check the weights and precision")
        return cls(
            list(ids),
            labels.cpu().numpy().astype(np.int64),
            _narrowest(index.cpu().numpy()),
            _top_probability(logits.detach()).cpu().numpy(),
        )

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) bool, whether the best class is the label."""
        return np.equal(self.top5[:, 0], self.labels)

    @property
    def correct5(self) -> NDArray[np.bool_]:
        """(N,) bool, whether the label is among the top five classes."""
        hits: NDArray[np.bool_] = np.any(self.top5 == self.labels[:, None], axis=1)
        return hits

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy, a fraction in [0, 1]."""
        return float(self.correct.mean())

    def calibration_error(self, bins: int = 15) -> float:
        """Expected calibration error of `p1`, in [0, 1]; see `expected_calibration_error`."""
        return expected_calibration_error(self.p1, self.correct, bins)

    def write(self, path: Path) -> None:
        """Write a parquet file with columns id, label, top5 (fixed-size list) and p1."""
        width = self.top5.shape[1]
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "label": pa.array(self.labels),
            "top5": pa.FixedSizeListArray.from_arrays(pa.array(self.top5.reshape(-1)), width),
            "p1": pa.array(self.p1),
        }
        pq.write_table(pa.table(columns), path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote, or a file with the same columns from elsewhere.

        Raises:
            InputError: If the file is missing or not parquet, or a column is missing or broken.
        """
        if not path.is_file():
            raise InputError(f"{path} is no file: give the .parquet file of an evaluation")
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is not a parquet file: write it again") from error
        ids = _column(table, "id", path, pa.types.is_string, pa.types.is_large_string)
        labels = _column(table, "label", path, pa.types.is_integer)
        lists = _column(table, "top5", path, pa.types.is_fixed_size_list, pa.types.is_list)
        p1 = _column(table, "p1", path, pa.types.is_floating)
        flat = lists.flatten()
        if not pa.types.is_integer(flat.type) or flat.null_count:
            raise InputError(f"{path}: column 'top5' holds empty or non-integer classes: {_MEND}")
        lengths = set(lists.value_lengths().to_pylist())
        if len(lengths) > 1:
            raise InputError(f"{path}: lists in column 'top5' are not of the same length: {_MEND}")
        try:
            return cls(
                ids.to_pylist(),
                labels.to_numpy(zero_copy_only=False).astype(np.int64),
                _narrowest(flat.to_numpy(zero_copy_only=False).reshape(len(lists), -1)),
                p1.to_numpy(zero_copy_only=False).astype(np.float32),
            )
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def aligned(self, other: "Predictions") -> "Predictions":
        """Bring another model's predictions on the same images into this order of ids.

        Raises:
            InputError: If the two hold different images, or different labels for one image.
        """
        if self.ids != other.ids:
            differing = len(set(self.ids) ^ set(other.ids))
            if differing:
                raise InputError(
                    f"{differing} ids differ between the two sets of predictions: "
                    "evaluate both models on the same images"
                )
            position = {name: i for i, name in enumerate(other.ids)}
            order = np.array([position[name] for name in self.ids])
            other = Predictions(
                list(self.ids), other.labels[order], other.top5[order], other.p1[order]
            )
        relabelled = int((self.labels != other.labels).sum())
        if relabelled:
            raise InputError(
                f"{relabelled} labels differ between the two sets of predictions: "
                "evaluate both models with the same class list"
            )
        return other


def read_real_labels(path: Path) -> list[list[int]]:
    """Read reassessed labels (arXiv 2006.07159): a JSON list, in file order, of label sets.

    Raises:
        InputError: If the file is missing or holds anything but lists of class indices.
    """
    try:
        sets = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as JSON: give the reassessed-labels file"
        ) from error
    # `type is int` because JSON's true would pass as an integer.
    if not isinstance(sets, list) or not all(
        isinstance(row, list) and all(type(label) is int for label in row) for row in sets
    ):
        raise InputError(f"{path} is not a JSON list of lists of class indices: give [[1, 5], ...]")
    return sets


def real_accuracy(predictions: Predictions, label_sets: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Count the images whose best class is in their reassessed label set (arXiv 2006.07159).

    Images without any label are excluded. Where every id carries an ImageNet validation number
    (`ILSVRC2012_val_00000001`), that number finds the label set, because an image folder lists
    the images by class and not in file order; otherwise the i-th prediction takes the i-th set.

    Args:
        predictions: Predictions on N images.
        label_sets: Class indices per image, in file order.

    Returns:
        `(hits, counted)`: the accuracy is hits / counted.

    Raises:
        InputError: If the two do not belong together or no image has a label.
    """
    numbers = [_IMAGENET_NUMBER.search(name) for name in predictions.ids]
    if all(numbers):
        positions = [int(match[1]) - 1 for match in numbers if match]
        if not 0 <= min(positions) <= max(positions) < len(label_sets):
            raise InputError(
                f"image {max(positions) + 1} of the predictions is beyond the reassessed labels, "
                f"which hold {len(label_sets)} images: give the full label file"
            )
    elif len(label_sets) == len(predictions.ids):
        positions = list(range(len(label_sets)))
    else:
        raise InputError(
            f"reassessed labels for {len(label_sets)} images but {len(predictions.ids)} "
            "predictions: evaluate the whole set in file order"
        )
    top1 = predictions.top5[:, 0].tolist()
    judged = [
        label in label_sets[position]
        for label, position in zip(top1, positions, strict=True)
        if label_sets[position]
    ]
    if not judged:
        raise InputError("no image has a reassessed label: check the label file")
    return sum(judged), len(judged)


def check_class_order(predictions: Predictions, class_names: Sequence[str]) -> None:
    """Catch labels numbered in the wrong order of class names, such as 0, 1, 10, 100, 2.

    Some loaders sort class folders as strings, others by the numbers within; a model trained or
    published with one order and labelled with the other looks untrained. The check looks at the
    classes whose index the two orders dispute and measures agreement beyond chance (Cohen's
    kappa), so that a poor model, or one that always answers the same class, is not accused.

    Args:
        predictions: Predictions whose labels are positions in `class_names`.
        class_names: The class names in the order that the loader numbered them.

    Raises:
        InputError: If agreement is at chance as labelled but not in the other order.
    """
    if int(predictions.labels.max()) >= len(class_names):
        raise InputError(
            f"label {predictions.labels.max()} with {len(class_names)} class names: "
            "give every class a name"
        )
    orders = {
        "string order": sorted(class_names),
        "numeric order": sorted(class_names, key=_numeric_key),
    }
    for name, order in orders.items():
        rank = {class_name: index for index, class_name in enumerate(order)}
        relabelled = np.array([rank[class_name] for class_name in class_names])[predictions.labels]
        disputed = relabelled != predictions.labels
        top1 = predictions.top5[disputed, 0].astype(np.int64)
        as_given, other = predictions.labels[disputed], relabelled[disputed]
        if not disputed.any() or mcnemar(top1 == other, top1 == as_given).p_value > 1e-3:
            continue
        if _kappa(top1, as_given) < 0.1 <= _kappa(top1, other):
            raise InputError(
                f"top-1 accuracy is {predictions.accuracy:.1%} but "
                f"{np.mean(predictions.top5[:, 0] == relabelled):.1%} with the class names in "
                f"{name} ({', '.join(order[:4])}, ...): sort the class folders that way"
            )


def _kappa(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Cohen's kappa: 1 for full agreement, 0 for what the two marginals give by chance."""
    classes = int(max(a.max(), b.max())) + 1
    share_a, share_b = (np.bincount(x, minlength=classes) / len(x) for x in (a, b))
    chance = float(share_a @ share_b)
    return float((np.mean(a == b) - chance) / (1 - chance)) if chance < 1 else 0.0


def _numeric_key(name: str) -> list[tuple[int, str]]:
    """Split "class10" into text and numbers, so that 10 follows 9."""
    parts = _NUMBER.split(name)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def _top_probability(logits: torch.Tensor) -> torch.Tensor:
    """Softmax of the best class, (N, C) -> (N,) float32, without a float32 copy of it all."""
    p1 = torch.empty(len(logits), device=logits.device)
    rows = max(1, (1 << 22) // logits.shape[1])
    for start in range(0, len(logits), rows):
        chunk = logits[start : start + rows].float()
        p1[start : start + rows] = 1 / (chunk - chunk.amax(1, keepdim=True)).exp().sum(1)
    return p1


def _narrowest(top5: NDArray[np.integer[Any]]) -> NDArray[np.int16] | NDArray[np.int32]:
    if top5.size and top5.max() > np.iinfo(np.int16).max:
        return top5.astype(np.int32)
    return top5.astype(np.int16)


def _column(table: Any, name: str, path: Path, *types: Any) -> Any:
    if name not in table.column_names:
        raise InputError(f"{path} has no column {name!r}: {_MEND}")
    column = table.column(name).combine_chunks()
    if not any(is_type(column.type) for is_type in types):
        raise InputError(f"{path}: column {name!r} is of type {column.type}: {_MEND}")
    if column.null_count:
        raise InputError(f"{path}: column {name!r} has empty cells: {_MEND}")
    return column
