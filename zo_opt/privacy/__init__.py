"""Differential privacy of the training rows: each row's derivative along a direction is clipped, and noise is added to their sum."""

from zo_opt.privacy.gaussian import (
    GRID,
    INTERVAL,
    GaussianPrivacy,
    check_delta,
    check_epsilon,
    check_sampling,
    epsilon_of,
    noise_for,
)

__all__ = [
    "GRID",
    "INTERVAL",
    "GaussianPrivacy",
    "check_delta",
    "check_epsilon",
    "check_sampling",
    "epsilon_of",
    "noise_for",
]
