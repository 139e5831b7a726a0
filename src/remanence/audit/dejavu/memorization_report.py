"""What a memoriser is reported to hold: rates on every group of images, bits, yardsticks."""

from dataclasses import dataclass

from remanence.audit.dejavu.bits import (
    LANGUAGE_MODEL_BITS_PER_PARAMETER,
    bloom_bits,
    perceptron_bits,
    set_bits,
    stored_bits,
)
from remanence.audit.dejavu.intervals import (
    Scores,
    auc_estimate,
    delong,
    mean_of_two,
    proportion,
)
from remanence.audit.dejavu.sampling import MembershipTask
from remanence.audit.evidence import Estimate


@dataclass(frozen=True)
class View:
    """How the network answers on the images seen in one way.

    Attributes:
        name: "clean", or the name of the transform.
        tpr: share of the set answered "in".
        tnr_seen: share of the negatives shown in training answered "out".
        tnr_unseen: share of the images never shown answered "out".
        balanced_accuracy: mean of `tpr` and `tnr_unseen`.
        auc: area under the ROC curve of the logit, set against unseen.
    """

    name: str
    tpr: Estimate
    tnr_seen: Estimate
    tnr_unseen: Estimate
    balanced_accuracy: Estimate
    auc: Estimate


@dataclass(frozen=True)
class Yardsticks:
    """What else holds as much, in bits.

    Attributes:
        set_bits: an ideal code of the set, log2 C(N, n).
        bloom_filter: a Bloom filter of n elements with the network's false positive rate on the
            seen negatives, at least half a false positive among them.
        perceptron: random labels that a perceptron of as many weights learns.
        language_model: random strings that a GPT-style model of as many parameters holds.
    """

    set_bits: float
    bloom_filter: float
    perceptron: float
    language_model: float


@dataclass(frozen=True)
class MemorizationReport:
    """What a network remembers of the set.

    Attributes:
        n: images in the set.
        pool: N, the set and the negatives shown.
        unseen: images kept out of training.
        steps: training steps made.
        positive_epochs: times that each image of the set was shown.
        train_accuracy: on the last (at most 100) batches, as trained: transform, train mode.
        clean: the answers on the images as they are.
        views: the answers on transformed images, one per transform.
        reestimated: `clean` once more, with batch statistics taken from clean half-and-half
            batches; None where the network has no batch normalisation. Far above `clean`: the
            running statistics do not fit evaluation.
        parameters: of the network.
        stored_bits: held about the set, at most log2 C(N, n).
        bits_per_image: `stored_bits` / n.
        bits_per_parameter: `stored_bits` / parameters.
        yardsticks: to compare with.
    """

    n: int
    pool: int
    unseen: int
    steps: int
    positive_epochs: float
    train_accuracy: float
    clean: View
    views: tuple[View, ...]
    reestimated: View | None
    parameters: int
    stored_bits: float
    bits_per_image: float
    bits_per_parameter: float
    yardsticks: Yardsticks


def view(
    name: str,
    positives: Scores,
    seen: Scores,
    unseen: Scores,
) -> View:
    """Rates of one view, from the logits of its three groups of images."""
    tpr = proportion("TPR", int((positives > 0).sum()), len(positives))
    tnr_seen = proportion("TNR, seen", int((seen <= 0).sum()), len(seen))
    tnr_unseen = proportion("TNR, unseen", int((unseen <= 0).sum()), len(unseen))
    auc, covariance = delong(positives[None], unseen[None])
    return View(
        name,
        tpr,
        tnr_seen,
        tnr_unseen,
        mean_of_two("balanced accuracy", tpr, tnr_unseen),
        auc_estimate("AUC", float(auc[0]), float(covariance[0, 0]), len(positives), len(unseen)),
    )


def report(
    task: MembershipTask,
    *,
    shown: int,
    steps: int,
    positive_epochs: float,
    train_accuracy: float,
    clean: View,
    views: tuple[View, ...],
    reestimated: View | None,
    parameters: int,
) -> MemorizationReport:
    """Put the figures together; arguments as the report's attributes, `shown` negatives seen."""
    n = len(task.positives)
    pool = n + shown
    fpr = 1 - clean.tnr_seen.value
    ideal = set_bits(pool, n)
    bits = min(stored_bits(n, pool, clean.tpr.value, fpr), ideal)
    return MemorizationReport(
        n=n,
        pool=pool,
        unseen=len(task.unseen),
        steps=steps,
        positive_epochs=positive_epochs,
        train_accuracy=train_accuracy,
        clean=clean,
        views=views,
        reestimated=reestimated,
        parameters=parameters,
        stored_bits=bits,
        bits_per_image=bits / n,
        bits_per_parameter=bits / parameters,
        yardsticks=Yardsticks(
            set_bits=ideal,
            bloom_filter=bloom_bits(n, max(fpr, 0.5 / shown)),
            perceptron=perceptron_bits(parameters),
            language_model=LANGUAGE_MODEL_BITS_PER_PARAMETER * parameters,
        ),
    )
