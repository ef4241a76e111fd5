"""Two-sided differences of every example, of which only clipped and noisy sums are released."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_opt.errors import ZOError
from zo_opt.estimators.base import Estimate, Estimator
from zo_opt.estimators.spsa import TwoSided
from zo_opt.privacy.gaussian import GaussianPrivacy
from zo_opt.queries.losses import taken
from zo_opt.queries.modes import Evaluator
from zo_opt.queries.perturbation import Point


class PrivateTwoSided(Estimator):
    """As :class:`~zo_opt.estimators.TwoSided`, for closures that return a loss for each example.

    Source: DPZero, arXiv 2310.09639, algorithm 2. The raw losses stay here: the estimate's loss is nan, and no query is dropped.

    Args:
        privacy: clips and hides, and keeps the account.

    Raises:
        ZOError: the closure's losses are no vector, of another length on the other side, or not of the rows that were sampled.
    """

    query_modes: ClassVar[tuple[str, ...] | None] = ("sequential",)
    own_closure: ClassVar[bool] = True

    def __init__(self, privacy: GaussianPrivacy) -> None:
        self.privacy = privacy

    def __call__(self, evaluate: Evaluator, queries: int, zo_eps: float) -> Estimate:
        directions = evaluate.perturbed.directions
        found: list[Tensor] = []

        def call() -> float:
            losses = taken(evaluate.closure() if evaluate.batch is None else evaluate.closure(evaluate.batch))
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
        pairs = zip(losses[::2], losses[1::2], strict=True)
        grads = self.privacy.release_all([(up - down) / (2 * zo_eps) for up, down in pairs], directions.step)
        ones = torch.ones(queries, dtype=torch.float64)
        return Estimate(float("nan"), torch.tensor(grads, dtype=torch.float64), ones, 2 * queries)

    def charge(self, step: int, queries: int) -> None:
        self.privacy.charge(step, queries)

    def state_dict(self) -> dict[str, Any]:
        return self.privacy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.privacy.load_state_dict(state)


def made_private(estimator: Estimator, privacy: GaussianPrivacy, schedule: object, *, alone: bool) -> PrivateTwoSided:
    """What takes the place of an estimator with privacy.

    Args:
        estimator: the optimizer's.
        privacy: clips and hides.
        schedule: of its queries.
        alone: whether it is evaluated sequentially, in one process, and the rows are seen by nothing else.

    Raises:
        ZOError: more than clipped two-sided differences would leave a step.
    """
    if not alone or type(estimator) is not TwoSided:
        raise ZOError(
            "privacy clips each example's two-sided difference: use query_mode='sequential' in one process, no line search, "
            "and an optimizer that needs no other losses, such as MeZO or AdaZeta."
        )
    if getattr(schedule, "reads_measurements", False):
        raise ZOError(
            "with privacy the number of queries cannot depend on what was measured; give another query_schedule."
        )
    return PrivateTwoSided(privacy)
