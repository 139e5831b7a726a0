"""FixRes and FixEfficientNet: the train-test resolution discrepancy, measured and mended.

arXiv 1906.06423 and 2003.08237. Random resized crops make objects look larger in training than in
testing; a classifier is best tested larger than it was trained, with its last layers tuned there.
"""

from remanence.learn.fixres.activations import activation_statistics
from remanence.learn.fixres.batchnorm import recalibrate_bn_
from remanence.learn.fixres.cost import Cost, measure_cost
from remanence.learn.fixres.equalize import Affine, Equalizer, fit_equalizer, fold_into_head_
from remanence.learn.fixres.frechet import Frechet, fit_frechet
from remanence.learn.fixres.geometry import (
    RatioReport,
    apparent_size_ratio,
    equalising_test_size,
    recommend_test_size,
    sample_crop_boxes,
    sigma_moments,
)
from remanence.learn.fixres.layers import (
    find_head,
    find_last_norms,
    fixed_input_size,
    forward_embedding,
    set_input_size_,
    total_stride,
)
from remanence.learn.fixres.multiresolution import MultiResolution, relative_cost
from remanence.learn.fixres.scopes import (
    SCOPES,
    Adaptation,
    changed_tensors,
    check_batch,
    hash_state,
)
from remanence.learn.fixres.search import Candidate, choose, pareto
from remanence.learn.fixres.train_scale import train_scale_factors
from remanence.learn.fixres.transforms import EvalTransform, FinetuneTransform

__all__ = [
    "SCOPES",
    "Adaptation",
    "Affine",
    "Candidate",
    "Cost",
    "Equalizer",
    "EvalTransform",
    "FinetuneTransform",
    "Frechet",
    "MultiResolution",
    "RatioReport",
    "activation_statistics",
    "apparent_size_ratio",
    "changed_tensors",
    "check_batch",
    "choose",
    "equalising_test_size",
    "find_head",
    "find_last_norms",
    "fit_equalizer",
    "fit_frechet",
    "fixed_input_size",
    "fold_into_head_",
    "forward_embedding",
    "hash_state",
    "measure_cost",
    "pareto",
    "recalibrate_bn_",
    "recommend_test_size",
    "relative_cost",
    "sample_crop_boxes",
    "set_input_size_",
    "sigma_moments",
    "total_stride",
    "train_scale_factors",
]
