"""Estimators: losses at perturbed points -> derivatives along directions. They know nothing of update rules.

One file a kind; add a line to ESTIMATORS for a new one.
"""

from zo_opt.choices import Table
from zo_opt.estimators.activations import Activations, LearnedFeedback
from zo_opt.estimators.base import Estimate, Estimator, combine, estimate_of
from zo_opt.estimators.forward_mode import ForwardMode, directional_derivative
from zo_opt.estimators.spsa import OneSided, TwoSided, TwoSidedWithCurvature, control_variate

ESTIMATORS: Table[Estimator] = Table(
    "estimator",
    Estimator,
    {
        "two-sided": TwoSided,
        "two-sided-curvature": TwoSidedWithCurvature,
        "one-sided": OneSided,
        "forward-mode": ForwardMode,
        "activations": Activations,
        "learned-feedback": LearnedFeedback,
    },
)

__all__ = [
    "ESTIMATORS",
    "Activations",
    "Estimate",
    "Estimator",
    "ForwardMode",
    "LearnedFeedback",
    "OneSided",
    "TwoSided",
    "TwoSidedWithCurvature",
    "combine",
    "control_variate",
    "directional_derivative",
    "estimate_of",
]
