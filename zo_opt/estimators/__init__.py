"""Estimators: losses at perturbed points -> derivatives along directions. Pure functions; they know nothing of update rules."""

from zo_opt.estimators.spsa import (
    Estimate,
    Evaluate,
    combine,
    control_variate,
    forward_gradient,
    one_sided,
    private_two_sided,
    two_sided,
)

__all__ = [
    "Estimate",
    "Evaluate",
    "combine",
    "control_variate",
    "forward_gradient",
    "one_sided",
    "private_two_sided",
    "two_sided",
]
