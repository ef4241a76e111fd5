"""The same number of learning rates for every method, tried on training rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from zo_opt.comparison.runs import Run
from zo_opt.planning import make_skeleton, read_config
from zo_opt.training.config import TrainConfig
from zo_opt.training.recipe import own_lr

RATIO = math.sqrt(10)


def lr_grid(config: TrainConfig, trials: int, parameters: int) -> list[float]:
    """Learning rates a factor sqrt(10) apart around the method's own; an even number has one more below it.

    A factor of two separates learning from divergence for some methods, so that the smaller side is the safer one. ``parameters``:
    of the model (:func:`model_parameters`).

    >>> [float(f"{lr:.2g}") for lr in lr_grid(TrainConfig(optimizer="adamw", adapter="tt"), 3, parameters=10**8)]
    [0.0032, 0.01, 0.032]
    """
    centre = own_lr(config, parameters=parameters)
    return [float(f"{centre * RATIO ** (i - trials // 2):.3g}") for i in range(trials)]


def model_parameters(config: TrainConfig) -> int:
    """How many parameters the model has, from its config alone."""
    skeleton = make_skeleton(read_config(config.model_name_or_path), config.head, config.model_name_or_path)
    return sum(p.numel() for p in skeleton.parameters())


def best_lr(trials: Sequence[Run]) -> float | None:
    """The learning rate whose trial has the lowest loss on the validation rows; None where no trial has a finite one."""
    measured = [(results["after"]["loss"], run.config.lr) for run in trials if (results := run.results()) is not None]
    finite = {lr: loss for loss, lr in measured if loss is not None}
    return min(finite, key=lambda lr: finite[lr], default=None)
