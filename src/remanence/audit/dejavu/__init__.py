"""Deja Vu: data sets in training, memorised sets, membership in lower layers (arXiv 1809.06396).

Three questions, three groups of tools:

- Was a data set, or a part of it, in training? `detect`, `detect_many`, `leaked_fraction`,
  `detectable`, `PairedBettingTest`, `null_rejections`.
- How many arbitrary images can an architecture store? `MembershipTask`, `fit_memorizer`,
  `capacity`, `stored_bits`.
- Does a backbone without its head reveal its training images? `LayerProbe`.

Not to be confused with "Do SSL models have deja vu?" (arXiv 2304.13850), another question.
"""

from remanence.audit.dejavu.betting import PairedBettingTest
from remanence.audit.dejavu.bits import bloom_bits, perceptron_bits, set_bits, stored_bits
from remanence.audit.dejavu.capacity import CapacityCurve, CapacityPoint, capacity
from remanence.audit.dejavu.contribution import contributions
from remanence.audit.dejavu.dataset_inference import blind_walk, min_gd
from remanence.audit.dejavu.depth_profile import DepthProfile, LayerResult, Protocol
from remanence.audit.dejavu.detect import Detection, detect
from remanence.audit.dejavu.detect_many import detect_many
from remanence.audit.dejavu.features import Pool
from remanence.audit.dejavu.fraction import displayed, fraction_equivalence, leaked_fraction
from remanence.audit.dejavu.kolmogorov_smirnov import KSResult, ks_two_sample
from remanence.audit.dejavu.layers import LayerProbe, Shadow
from remanence.audit.dejavu.leak import images_needed, min_detectable_fraction, top_margin
from remanence.audit.dejavu.learned_test import LearnedResult, learned_test
from remanence.audit.dejavu.memorization_report import MemorizationReport, View, Yardsticks
from remanence.audit.dejavu.memorize import Memorizer, fit_memorizer
from remanence.audit.dejavu.named_tests import Outcome, Test, run_test
from remanence.audit.dejavu.null_check import null_rejections
from remanence.audit.dejavu.pixels import distinct
from remanence.audit.dejavu.power import Power, detectable, images_needed_by_rank
from remanence.audit.dejavu.rank_test import RankResult, auc_interval, mann_whitney
from remanence.audit.dejavu.sampling import InOutBatchSampler, MembershipTask
from remanence.audit.dejavu.transforms import EVALUATION, TRAINING

__all__ = [
    "EVALUATION",
    "TRAINING",
    "CapacityCurve",
    "CapacityPoint",
    "DepthProfile",
    "Detection",
    "InOutBatchSampler",
    "KSResult",
    "LayerProbe",
    "LayerResult",
    "LearnedResult",
    "MembershipTask",
    "MemorizationReport",
    "Memorizer",
    "Outcome",
    "PairedBettingTest",
    "Pool",
    "Power",
    "Protocol",
    "RankResult",
    "Shadow",
    "Test",
    "View",
    "Yardsticks",
    "auc_interval",
    "blind_walk",
    "bloom_bits",
    "capacity",
    "contributions",
    "detect",
    "detect_many",
    "detectable",
    "displayed",
    "distinct",
    "fit_memorizer",
    "fraction_equivalence",
    "images_needed",
    "images_needed_by_rank",
    "ks_two_sample",
    "leaked_fraction",
    "learned_test",
    "mann_whitney",
    "min_detectable_fraction",
    "min_gd",
    "null_rejections",
    "perceptron_bits",
    "run_test",
    "set_bits",
    "stored_bits",
    "top_margin",
]
