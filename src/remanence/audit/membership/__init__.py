"""Membership inference: was this sample in the training set (arXiv 1908.11229).

- The theory: `free_energy`, `optimal_logit`, `membership_posterior`, `hidden_variable_posterior`,
  `posterior_bound`, and two worlds where it is exact, `GaussianMeanWorld` and `TableWorld`.
- Signals of one model: `signals_from_logits`, `model_signals`, and those of other tasks.
- Reference models: `balanced_design`, `train_references`, `ReferencePool`, `References`.
- Attacks from signals: `ATTACKS`; from parameters: `matt`, `inverse_hessian_attack`; without
  reference models: `fit_quantiles`.
- What they found: `evaluate`, `mann_whitney_log10_p`, `power_statement`, `Calibrator`,
  `epsilon_lower_bound`, `combine` for persons or patients.
"""

from remanence.audit.membership.attacks import (
    ATTACKS,
    MALT,
    MAST,
    RMIA,
    Attack,
    BaVarIA,
    LiRA,
    References,
    ZeroOne,
    references_from_logits,
    rmia_score,
)
from remanence.audit.membership.bayes import (
    GaussianMeanWorld,
    HiddenPosterior,
    TableWorld,
    free_energy,
    hidden_variable_posterior,
    membership_posterior,
    optimal_logit,
    posterior_bound,
)
from remanence.audit.membership.calibration import Calibrator, Reliability, reliability
from remanence.audit.membership.designs import PublicDesign, balanced_design, public_design
from remanence.audit.membership.groups import GroupScores, clustered_auc, combine
from remanence.audit.membership.inverse_hessian import inverse_hessian_attack
from remanence.audit.membership.power import Power, power_statement
from remanence.audit.membership.privacy import EpsilonBound, epsilon_lower_bound
from remanence.audit.membership.quantile import QuantileModel, fit_quantiles
from remanence.audit.membership.references import ReferencePool, train_references
from remanence.audit.membership.roc import (
    MIN_SIDE,
    Decision,
    RateAt,
    Roc,
    decide,
    delong,
    evaluate,
    mann_whitney_log10_p,
    tpr_at,
)
from remanence.audit.membership.signals import Signals, model_signals, signals_from_logits
from remanence.audit.membership.task_signals import (
    language_model_signals,
    multilabel_signals,
    regression_signals,
)
from remanence.audit.membership.taylor import Lineage, LineageWarning, lineage, matt

__all__ = [
    "ATTACKS",
    "MALT",
    "MAST",
    "MIN_SIDE",
    "RMIA",
    "Attack",
    "BaVarIA",
    "Calibrator",
    "Decision",
    "EpsilonBound",
    "GaussianMeanWorld",
    "GroupScores",
    "HiddenPosterior",
    "LiRA",
    "Lineage",
    "LineageWarning",
    "Power",
    "PublicDesign",
    "QuantileModel",
    "RateAt",
    "ReferencePool",
    "References",
    "Reliability",
    "Roc",
    "Signals",
    "TableWorld",
    "ZeroOne",
    "balanced_design",
    "clustered_auc",
    "combine",
    "decide",
    "delong",
    "epsilon_lower_bound",
    "evaluate",
    "fit_quantiles",
    "free_energy",
    "hidden_variable_posterior",
    "inverse_hessian_attack",
    "language_model_signals",
    "lineage",
    "mann_whitney_log10_p",
    "matt",
    "membership_posterior",
    "model_signals",
    "multilabel_signals",
    "optimal_logit",
    "posterior_bound",
    "power_statement",
    "public_design",
    "references_from_logits",
    "regression_signals",
    "reliability",
    "rmia_score",
    "signals_from_logits",
    "tpr_at",
    "train_references",
]
