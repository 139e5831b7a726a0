"""Attacks on membership; every score is higher for what looks more like a member."""

from collections.abc import Callable

from remanence.audit.membership.attacks.base import Attack, Need
from remanence.audit.membership.attacks.gaussian import BaVarIA, LiRA
from remanence.audit.membership.attacks.reference_signals import (
    References,
    references_from_logits,
)
from remanence.audit.membership.attacks.rmia import RMIA, rmia_score
from remanence.audit.membership.attacks.thresholds import MALT, MAST, ZeroOne

ATTACKS: dict[str, Callable[[], Attack]] = {
    "zero-one": ZeroOne,
    "malt": MALT,
    "malt-loss": lambda: MALT(signal="loss"),
    "mast-out": lambda: MAST(tau="out"),
    "mast-mid": lambda: MAST(tau="mid"),
    "mast-all": lambda: MAST(tau="all"),
    "mast": MAST,
    "lira": LiRA,
    "lira-offline": lambda: LiRA(online=False),
    "rmia": RMIA,
    "bavaria": BaVarIA,
}
"""The attacks of one audit by name, each with the options of its paper."""

__all__ = [
    "ATTACKS",
    "MALT",
    "MAST",
    "RMIA",
    "Attack",
    "BaVarIA",
    "LiRA",
    "Need",
    "References",
    "ZeroOne",
    "references_from_logits",
    "rmia_score",
]
