"""How well a network does on the test samples, beside the float network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from remanence.compress.network.calibration import logits_of
from remanence.jobs.audit.outputs import evaluation_transform
from remanence.jobs.compress.inputs import Inputs, Photographs
from remanence.jobs.compress.subject import Subject
from remanence.kit.evaluate import Normalise, evaluate
from remanence.kit.images import Images
from remanence.kit.progress import track
from remanence.kit.statistics import McNemar, mcnemar, proportion_interval

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from numpy.typing import NDArray

SURE = 0.5  # score of a detection that counts, and overlap with which it is found again


@dataclass(frozen=True)
class Answers:
    """What a network says of the test samples.

    Attributes:
        logits: (N, C); None where its outputs are no logits.
        detections: Boxes, labels and scores of each image, of a detector.
        labels: True classes (N,), where the data has them.
    """

    logits: Tensor | None = None
    detections: tuple[dict[str, Tensor], ...] = ()
    labels: NDArray[np.int64] | None = None

    @property
    def correct(self) -> NDArray[np.bool_] | None:
        """Whether each answer is right (N,)."""
        if self.logits is None or self.labels is None:
            return None
        found: NDArray[np.bool_] = self.logits.argmax(1).numpy() == self.labels
        return found


@dataclass(frozen=True)
class Measured:
    """A network beside the float one; None is what the data cannot tell.

    Attributes:
        name: Which network.
        bytes: Its size.
        accuracy: Share of right answers, with its 95 % interval.
        difference: Accuracy less the float network's, paired.
        kl: KL(float || this), nats.
        agreement: Share of samples where both name the same class; of a detector, share of the
            float network's detections that are found again.
    """

    name: str
    bytes: int
    accuracy: tuple[float, float, float] | None
    difference: McNemar | None
    kl: float | None
    agreement: float | None


def answers(
    model: nn.Module, subject: Subject, inputs: Inputs, fabric: Fabric, what: str
) -> Answers:
    """Run a network over the test samples.

    Args:
        model: The network.
        subject: What is known of it.
        inputs: The data.
        fabric: The processes.
        what: Name of the network, for the progress bar.
    """
    model = model.to(fabric.device).eval()
    test = inputs.test
    if isinstance(test, Images) and subject.network is not None:
        pre = subject.network.test
        normalise = Normalise(pre.mean, pre.std)
        logits = evaluate(
            fabric,
            {0: lambda x: _logits(model, normalise(x))},
            {0: evaluation_transform(pre)},
            test,
            what=what,
        )[0]
        known = inputs.classes and logits.shape[1] == len(test.classes)
        return Answers(logits.cpu().float(), labels=test.labels if known else None)
    with torch.no_grad():
        if isinstance(test, Images):
            found: list[dict[str, Tensor]] = []
            for batch in track(Photographs(test, 1), what, show=fabric.is_global_zero):
                images = [image.to(fabric.device) for image in batch[0]]
                found += [{k: v.cpu() for k, v in each.items()} for each in model(images)]
            return Answers(detections=tuple(found))
        outputs = [logits_of(model(part.to(fabric.device))) for part in torch.split(test, 64)]
    if any(output is None for output in outputs):
        return Answers()
    logits = torch.cat([o.flatten(0, -2).cpu().float() for o in outputs if o is not None])
    return Answers(logits)


def compare(name: str, size: int, found: Answers, reference: Answers) -> Measured:
    """Set a network's answers beside the float network's.

    Args:
        name: Which network.
        size: Its bytes.
        found: Its answers.
        reference: Those of the float network.
    """
    accuracy = difference = kl = agreement = None
    correct, right = found.correct, reference.correct
    if correct is not None and right is not None:
        n = len(correct)
        accuracy = (float(correct.mean()), *proportion_interval(int(correct.sum()), n))
        difference = mcnemar(correct, right)
    if found.logits is not None and reference.logits is not None:
        ours, theirs = found.logits.log_softmax(1), reference.logits.log_softmax(1)
        kl = float((theirs.exp() * (theirs - ours)).sum(1).mean())
        agreement = float((ours.argmax(1) == theirs.argmax(1)).float().mean())
    elif reference.detections:
        agreement = _found_again(found.detections, reference.detections)
    return Measured(name, size, accuracy, difference, kl, agreement)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    logits = logits_of(model(images))
    assert logits is not None
    return logits


def _found_again(found: Any, reference: Any) -> float | None:
    """Share of sure detections that the other network makes too: same class, enough overlap."""
    again = total = 0
    for ours, theirs in zip(found, reference, strict=True):
        sure = theirs["scores"] >= SURE
        total += int(sure.sum())
        if not (len(ours["boxes"]) and bool(sure.any())):
            continue
        overlap = box_iou(theirs["boxes"][sure], ours["boxes"])
        same = theirs["labels"][sure][:, None] == ours["labels"][None]
        again += int(((overlap >= SURE) & same).any(1).sum())
    return again / total if total else None
