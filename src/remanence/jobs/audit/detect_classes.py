"""Which of the suspect's classes is which of the owner's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from remanence.audit import radioactive as ra
from remanence.audit.evidence import Check
from remanence.errors import InputError
from remanence.kit.images import Images

_NAMED = "The suspect's classes are matched with the owner's."


@dataclass(frozen=True)
class ClassMap:
    """The owner's classes in the suspect.

    Attributes:
        map: (K,) the suspect's class for each of the owner's, -1 for none.
        check: How they were matched, as an assumption of the test.
    """

    map: NDArray[np.int64]
    check: Check


def owner_labels(images: Images, owner: Sequence[str]) -> NDArray[np.int64]:
    """Return the owner's class of each image, by name, or by number where there are no names.

    Raises:
        InputError: The images have classes that the owner's marking does not.
    """
    if images.classes == tuple(owner):
        return images.labels
    if int(images.labels.max()) >= len(owner):
        raise InputError(
            f"{images.source}: labels up to {int(images.labels.max())}, but {len(owner)} classes "
            "were marked; give images of the same classes"
        )
    if images.classes == tuple(str(i) for i in range(len(images.classes))):
        return images.labels
    number = {name: k for k, name in enumerate(owner)}
    odd = [name for name in images.classes if name not in number]
    if odd:
        raise InputError(
            f"{images.source}: classes {', '.join(odd[:5])} were not marked; give images of the "
            "same classes, with the same names"
        )
    return np.array([number[name] for name in images.classes])[images.labels]


def match(
    option: str | None,
    owner: Sequence[str],
    suspect: Sequence[str],
    outputs: Tensor,
    labels: NDArray[np.int64],
) -> ClassMap:
    """Match the classes: as told, by name, or by what the suspect answers.

    Nothing here looks at the carriers, so a poor match costs detections but makes none up.

    Args:
        option: "match" to match by the answers, a JSON file, or None.
        owner: The owner's class names (K).
        suspect: The suspect's class names, empty where unknown.
        outputs: (N, C) the suspect's logits.
        labels: (N,) the owner's labels.

    Raises:
        InputError: The file is missing or broken, or there is no way to tell.
    """
    count = outputs.shape[1]
    if option == "match":
        found = ra.match_classes(outputs, from_numpy(labels), len(owner))
        return _told(found, f"{(found >= 0).sum()} of {len(owner)} by its answers on the images")
    if option is not None:
        found = _read(Path(option), owner, suspect, count)
        return _told(found, f"{(found >= 0).sum()} of {len(owner)} by {option}")
    if len(suspect) == count and set(suspect) & set(owner):
        number = {name: k for k, name in enumerate(suspect)}
        found = np.array([number.get(name, -1) for name in owner], dtype=np.int64)
        return _told(found, f"{(found >= 0).sum()} of {len(owner)} by name")
    if count == len(owner):
        check = Check(_NAMED, None, "taken to be in the same order, for want of common names")
        return ClassMap(np.arange(count), check)
    raise InputError(
        f"the suspect has {count} classes without the owner's names, the marking has {len(owner)}: "
        "the class map is missing; pass --classes match, or a JSON file of names"
    )


def _told(found: NDArray[np.int64], how: str) -> ClassMap:
    return ClassMap(found, Check(_NAMED, holds=True, finding=how))


def _read(
    path: Path, owner: Sequence[str], suspect: Sequence[str], count: int
) -> NDArray[np.int64]:
    try:
        given: Any = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: class map cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON") from error
    if not isinstance(given, dict):
        raise InputError(
            f'{path}: give an object such as {{"{owner[0]}": 0}}, of the owner\'s class names and '
            "the suspect's names or numbers"
        )
    odd = sorted(set(given) - set(owner))
    if odd:
        raise InputError(f"{path}: {odd[0]} is none of the owner's classes")
    number: dict[object, int] = {name: k for k, name in enumerate(suspect)}
    number |= {k: k for k in range(count)} | {None: -1}
    for name, there in given.items():
        if isinstance(there, (list, dict, bool)) or there not in number:
            raise InputError(
                f"{path}: {name} is mapped to {there!r}, which the suspect lacks; give one of its "
                f"names, a number from 0 to {count - 1}, or null"
            )
    return np.array([number[given.get(name)] for name in owner], dtype=np.int64)
