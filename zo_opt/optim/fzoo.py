"""FZOO: one-sided differences along signs, steps in units of the losses' spread (arXiv 2506.09034)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from zo_opt.directions import Directions
from zo_opt.estimators import Estimate, one_sided
from zo_opt.optim.base import ZerothOrderOptimizer
from zo_opt.optim.step_control import DivideBySpread, StepControl
from zo_opt.queries.modes import Evaluator
from zo_opt.schedules import QuerySchedule, constant_queries


class FZOO(ZerothOrderOptimizer):
    """theta <- theta - lr / (N sigma) * sum_i (l_i - l_0) z_i, sigma = std(l_i), z_i of signs: N + 1 forwards a step.

    Source: arXiv 2506.09034, algorithm 1. Not divided by zo_eps: lr is in parameter units a step, up to 1 / sqrt(N). In split mode
    l_0 is that of the query's slice and sigma the spread of the differences. Other arguments as in
    :class:`~zo_opt.optim.base.ZerothOrderOptimizer`.

    Args:
        query_schedule: N, at least 2; 8 by default.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.0]))
    >>> optimizer = FZOO([theta], lr=0.05, seed=0)
    >>> for _ in range(200):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> bool(theta.abs().max() < 0.3)
    True
    """

    name = "fzoo"
    own_directions = True
    lr_is_a_length = True

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-5,
        directions: str | Directions = "rademacher",
        query_schedule: QuerySchedule | None = None,
        step_control: Sequence[StepControl] = (),
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            directions=directions,
            query_schedule=query_schedule if query_schedule is not None else constant_queries(8),
            step_control=(DivideBySpread(), *step_control),
            **options,
        )

    def _estimate(self, evaluator: Evaluator, queries: int) -> Estimate:
        return one_sided(evaluator, queries, self.zo_eps)
