"""Zeroth-order optimizers: one file each; add a row here for a new one."""

from zo_opt.optim.adazeta import AdaZeta
from zo_opt.optim.base import StepRecord, ZerothOrderOptimizer
from zo_opt.optim.mezo import MeZO
from zo_opt.optim.step_control import ClipProjectedGrads, NormalizeProjectedGrads, StepControl
from zo_opt.optim.update_rules import SGD, UPDATE_RULES, Adam, UpdateRule

OPTIMIZERS: dict[str, type[ZerothOrderOptimizer]] = {"mezo": MeZO, "adazeta": AdaZeta}

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "UPDATE_RULES",
    "AdaZeta",
    "Adam",
    "ClipProjectedGrads",
    "MeZO",
    "NormalizeProjectedGrads",
    "StepControl",
    "StepRecord",
    "UpdateRule",
    "ZerothOrderOptimizer",
]
