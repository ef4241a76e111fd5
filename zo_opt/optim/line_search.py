"""Trying a step before taking it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite

from torch import Tensor

from zo_opt.choices import Range, check_numbers
from zo_opt.errors import ZOError
from zo_opt.optim.records import Update
from zo_opt.queries.modes import Evaluator
from zo_opt.queries.perturbation import Point


@dataclass(frozen=True)
class LineSearch:
    """Evaluates the loss at theta - m * lr * g for each multiplier m and keeps the best (weight decay left out).

    With (0, 1) a step that raises the loss is rejected; (0, 1, -1) is the conservative rule of ZO-Bench; (1, 0.5, 0.25, 0)
    shortens it. Costs a forward a multiplier on every micro-batch of the step; closures of earlier micro-batches are called
    again, so pass the batch to ``estimate`` rather than capture a loop variable. Ties go to the multiplier named first.

    Raises:
        ZOError: no multipliers.
    """

    multipliers: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.multipliers) == 0:
            raise ZOError("a line search needs at least one multiplier, such as (0.0, 1.0).")
        check_numbers(Range(), **{f"multipliers[{i}]": m for i, m in enumerate(self.multipliers)})

    def __call__(self, update: Update, parameter_lrs: Tensor, evaluators: Sequence[Evaluator]) -> tuple[Update, int]:
        """The update at its best length (0 where no loss is finite), and the forwards spent.

        Args:
            update: the step as estimated.
            parameter_lrs: a learning rate for every parameter.
            evaluators: one for each micro-batch of the step.
        """
        points = [
            Point(tuple((q, -m * c) for q, c in enumerate(update.coefficients) if m * c != 0), factors=parameter_lrs)
            for m in self.multipliers
        ]
        losses = sum(evaluator.at(points) for evaluator in evaluators)
        assert isinstance(losses, Tensor)
        finite = [(loss, i) for i, loss in enumerate(losses.tolist()) if isfinite(loss)]
        length = self.multipliers[min(finite)[1]] if finite else 0.0
        scaled = replace(update, coefficients=tuple(length * c for c in update.coefficients))
        return scaled, len(points) * len(evaluators)
