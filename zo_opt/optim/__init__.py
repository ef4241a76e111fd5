"""Zeroth-order optimizers: one file each; add a row here for a new one."""

from zo_opt.optim.adazeta import AdaZeta
from zo_opt.optim.base import ZerothOrderOptimizer
from zo_opt.optim.forward_gradient import ForwardGradient
from zo_opt.optim.fzoo import FZOO
from zo_opt.optim.grzo import GRZO
from zo_opt.optim.hizoo import HiZOO
from zo_opt.optim.line_search import LineSearch
from zo_opt.optim.lozo import LOZO
from zo_opt.optim.mezo import MeZO
from zo_opt.optim.mezo_svrg import MeZOSVRG
from zo_opt.optim.records import StepRecord, Update
from zo_opt.optim.sparse_mezo import SparseMeZO
from zo_opt.optim.step_control import (
    ClipProjectedGrads,
    DivideBySpread,
    NormalizeProjectedGrads,
    StepControl,
    TrustRegion,
)
from zo_opt.optim.subzero import SubZero
from zo_opt.optim.update_rules import SGD, UPDATE_RULES, Adam, AMSGrad, Momentum, Sign, UpdateRule
from zo_opt.optim.zo_adam import ZOAdam
from zo_opt.optim.zo_conservative import ZOConservative
from zo_opt.optim.zo_kalman import ZOKalman
from zo_opt.optim.zo_momentum import ZOMomentum
from zo_opt.optim.zo_sign import ZOSign

OPTIMIZERS: dict[str, type[ZerothOrderOptimizer]] = {
    o.name: o
    for o in (
        MeZO, AdaZeta, ZOSign, ZOMomentum, ZOAdam, ZOConservative, SparseMeZO, HiZOO, LOZO, SubZero, FZOO, GRZO, MeZOSVRG,
        ForwardGradient, ZOKalman,
    )
}  # fmt: skip

__all__ = [
    "FZOO",
    "GRZO",
    "LOZO",
    "OPTIMIZERS",
    "SGD",
    "UPDATE_RULES",
    "AMSGrad",
    "AdaZeta",
    "Adam",
    "ClipProjectedGrads",
    "DivideBySpread",
    "ForwardGradient",
    "HiZOO",
    "LineSearch",
    "MeZO",
    "MeZOSVRG",
    "Momentum",
    "NormalizeProjectedGrads",
    "Sign",
    "SparseMeZO",
    "StepControl",
    "StepRecord",
    "SubZero",
    "TrustRegion",
    "Update",
    "UpdateRule",
    "ZOAdam",
    "ZOConservative",
    "ZOKalman",
    "ZOMomentum",
    "ZOSign",
    "ZerothOrderOptimizer",
]
