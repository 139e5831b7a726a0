"""Radioactive data: marking images so that training on them can be proved.

arXiv 2002.00937. The features of marked images move along secret directions, one a class; the last
layer of a network that was trained on them leans towards these, which an exact test shows.
"""

from remanence.audit.radioactive.alignment import (
    Alignment,
    AlignmentSums,
    class_centred,
    solve_alignment,
)
from remanence.audit.radioactive.augment import (
    Augmentation,
    CenterCrop,
    Identity,
    PadCropFlip,
    RandomResizedCropFlip,
    Windows,
)
from remanence.audit.radioactive.blackbox import (
    CountDetection,
    DecoyDetection,
    detect_blackbox,
    detect_keys,
    detect_twins,
)
from remanence.audit.radioactive.calibration import Calibration, calibrate, uniform_carriers
from remanence.audit.radioactive.carriers import (
    SecretKey,
    carriers,
    decoy_carriers,
    recipient_carriers,
)
from remanence.audit.radioactive.detection import (
    Detection,
    RecipientDetection,
    detect,
    detect_logits,
    detect_recipients,
    detect_whitebox,
)
from remanence.audit.radioactive.features import FeatureExtractor
from remanence.audit.radioactive.head import (
    PreparedHead,
    Provenance,
    match_classes,
    prepare_head,
)
from remanence.audit.radioactive.marking import (
    LEAST_COSINE,
    MarkConfig,
    Marked,
    MarkingInfeasible,
    Precision,
    Preset,
    mark,
)
from remanence.audit.radioactive.null import (
    Plan,
    cosine_logp,
    expected_log10_p,
    fisher_logp,
    holm_logp,
    min_mean_cosine,
    plan,
    stouffer_logp,
    sum_statistic,
)

__all__ = [
    "LEAST_COSINE",
    "Alignment",
    "AlignmentSums",
    "Augmentation",
    "Calibration",
    "CenterCrop",
    "CountDetection",
    "DecoyDetection",
    "Detection",
    "FeatureExtractor",
    "Identity",
    "MarkConfig",
    "Marked",
    "MarkingInfeasible",
    "PadCropFlip",
    "Plan",
    "Precision",
    "PreparedHead",
    "Preset",
    "Provenance",
    "RandomResizedCropFlip",
    "RecipientDetection",
    "SecretKey",
    "Windows",
    "calibrate",
    "carriers",
    "class_centred",
    "cosine_logp",
    "decoy_carriers",
    "detect",
    "detect_blackbox",
    "detect_keys",
    "detect_logits",
    "detect_recipients",
    "detect_twins",
    "detect_whitebox",
    "expected_log10_p",
    "fisher_logp",
    "holm_logp",
    "mark",
    "match_classes",
    "min_mean_cosine",
    "plan",
    "prepare_head",
    "recipient_carriers",
    "solve_alignment",
    "stouffer_logp",
    "sum_statistic",
    "uniform_carriers",
]
