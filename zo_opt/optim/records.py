"""What a step leaves behind: a record for logs, an update for journals."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """What the last step did: for logs, never needed by the mathematics."""

    step: int
    epoch: int
    loss: float
    queries: int
    dropped: int
    forwards: int
    projected_grads: tuple[float, ...]
    tokens: int = 0


@dataclass(frozen=True)
class Update:
    """All that the next weights depend on, besides the weights and the optimizer's state: what a journal keeps of a step.

    Attributes:
        step: the step whose directions are meant.
        lrs: learning rate of every parameter group.
        coefficients: of each direction in the gradient estimate sum_q c_q z_q; 0 where a query was lost. Empty if all were.
        curvatures: second derivatives along the directions, for methods that use them.
        older: (step, coefficients) of earlier directions that enter too (control variates).
        lost: numbers of the queries whose losses were not finite.
        gradient: the gradient itself, of estimators that give one; a journal cannot keep it.
    """

    step: int
    lrs: tuple[float, ...]
    coefficients: tuple[float, ...]
    curvatures: tuple[float, ...] = ()
    older: tuple[tuple[int, tuple[float, ...]], ...] = ()
    lost: tuple[int, ...] = ()
    gradient: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def kept(self) -> list[int]:
        """Numbers of the queries that were measured."""
        return [query for query in range(len(self.coefficients)) if query not in self.lost]
