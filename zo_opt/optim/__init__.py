"""Optimizers: choices (:mod:`~zo_opt.optim.choices`), the machine that runs them, and named methods. Add a line to OPTIMIZERS for a new one."""

from typing import Any

from zo_opt.choices import Table
from zo_opt.optim.agzo import AGZO
from zo_opt.optim.backpropagation import Backpropagation
from zo_opt.optim.choices import Choices, Method, Setting
from zo_opt.optim.counting import CountingOptimizer
from zo_opt.optim.hizoo import HiZOO
from zo_opt.optim.line_search import LineSearch
from zo_opt.optim.machine import ZerothOrderOptimizer
from zo_opt.optim.mezo_svrg import MeZOSVRG
from zo_opt.optim.p_gap import PGAP
from zo_opt.optim.presets import (
    FZOO,
    GRZO,
    LOZO,
    AdaZeta,
    ForwardGradient,
    MeZO,
    Preset,
    SubZero,
    ZOAdam,
    ZOConservative,
    ZOMomentum,
    ZOSign,
)
from zo_opt.optim.records import StepRecord, Update
from zo_opt.optim.redo import apply, redo
from zo_opt.optim.sparse_mezo import SparseMeZO
from zo_opt.optim.step_control import (
    STEP_CONTROLS,
    ClipProjectedGrads,
    DivideBySpread,
    StepControl,
)
from zo_opt.optim.update_rules import SGD, UPDATE_RULES, Adam, AMSGrad, Momentum, Sign, UpdateRule
from zo_opt.optim.zo_kalman import ZOKalman
from zo_opt.schedules import QueryMode

# Called with parameters and options, each makes an optimizer; ``.method`` says what it presets and fixes.
OPTIMIZERS: Table[Any] = Table(
    "optimizer",
    None,
    {
        "mezo": MeZO,
        "adazeta": AdaZeta,
        "zo-sign": ZOSign,
        "zo-momentum": ZOMomentum,
        "zo-adam": ZOAdam,
        "zo-conservative": ZOConservative,
        "sparse-mezo": SparseMeZO,
        "hizoo": HiZOO,
        "lozo": LOZO,
        "subzero": SubZero,
        "fzoo": FZOO,
        "grzo": GRZO,
        "mezo-svrg": MeZOSVRG,
        "forward-gradient": ForwardGradient,
        "zo-kalman": ZOKalman,
        "agzo": AGZO,
        "p-gap": PGAP,
        "adamw": Backpropagation,
    },
)


def method_of(name: str) -> Method:
    """What an optimizer presets and fixes; nothing is known of a function of the user's own.

    Raises:
        ZOError: the optimizer is not known.
    """
    method = getattr(OPTIMIZERS.find(name), "method", None)
    return method if isinstance(method, Method) else Method(name)


__all__ = [
    "AGZO",
    "FZOO",
    "GRZO",
    "LOZO",
    "OPTIMIZERS",
    "PGAP",
    "SGD",
    "STEP_CONTROLS",
    "UPDATE_RULES",
    "AMSGrad",
    "AdaZeta",
    "Adam",
    "Backpropagation",
    "Choices",
    "ClipProjectedGrads",
    "CountingOptimizer",
    "DivideBySpread",
    "ForwardGradient",
    "HiZOO",
    "LineSearch",
    "MeZO",
    "MeZOSVRG",
    "Method",
    "Momentum",
    "Preset",
    "QueryMode",
    "Setting",
    "Sign",
    "SparseMeZO",
    "StepControl",
    "StepRecord",
    "SubZero",
    "Update",
    "UpdateRule",
    "ZOAdam",
    "ZOConservative",
    "ZOKalman",
    "ZOMomentum",
    "ZOSign",
    "ZerothOrderOptimizer",
    "apply",
    "method_of",
    "redo",
]
