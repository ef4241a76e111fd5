"""Two-sided differences of every example, of which only clipped and noisy sums are released."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_opt.errors import ZOError
from zo_opt.estimators.base import Estimate, Estimator
from zo_opt.privacy.gaussian import GaussianPrivacy
from zo_opt.queries.modes import Evaluator
from zo_opt.queries.perturbation import Point


class PrivateTwoSided(Estimator):
    """As :class:`~zo_opt.estimators.TwoSided`, for closures that return a loss for each example.

    Source: DPZero, arXiv 2310.09639, algorithm 2. The raw losses stay here: the estimate's loss is nan, and no query is dropped.

    Args:
        privacy: clips and hides, and keeps the account.

    Raises:
        ZOError: the closure's losses are no vector, or of another length on the other side.
    """

    query_modes: ClassVar[tuple[str, ...] | None] = ("sequential",)
    own_closure: ClassVar[bool] = True

    def __init__(self, privacy: GaussianPrivacy) -> None:
        self.privacy = privacy

    def __call__(self, evaluate: Evaluator, queries: int, zo_eps: float) -> Estimate:
        directions = evaluate.perturbed.directions
        found: list[Tensor] = []

        def call() -> float:
            losses = evaluate.closure() if evaluate.batch is None else evaluate.closure(evaluate.batch)
            if not isinstance(losses, Tensor) or losses.ndim != 1:
                given = (
                    f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
                )
                raise ZOError(
                    f"the closure returned {given}; with privacy it must return a loss for each example, a tensor of shape (examples,)."
                )
            found.append(losses.detach().double())
            return 0.0

        points = [Point(((query, scale),)) for query in range(queries) for scale in (zo_eps, -zo_eps)]
        losses = []
        for _ in evaluate.perturbed.losses(call, points):
            losses.append(found[-1])  # the first point may have been evaluated twice
            found.clear()
        if len({len(values) for values in losses}) > 1:
            raise ZOError(
                "the closure returned losses of different numbers of examples within a step; give it one batch."
            )
        self.charge(directions.step, queries)
        grads = [
            self.privacy.release((up - down) / (2 * zo_eps), directions.step, query)
            for query, (up, down) in enumerate(zip(losses[::2], losses[1::2], strict=True))
        ]
        ones = torch.ones(queries, dtype=torch.float64)
        return Estimate(float("nan"), torch.tensor(grads, dtype=torch.float64), ones, 2 * queries)

    def charge(self, step: int, queries: int) -> None:
        self.privacy.charge(step, queries)

    def state_dict(self) -> dict[str, Any]:
        return self.privacy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.privacy.load_state_dict(state)
