"""What an estimator is, and what it finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_opt.queries.modes import Evaluator, Losses

# A derivative along a direction beyond this is as good as infinite: its square, times a direction's, must fit in float32 (Adam's state).
LARGEST = 1e17


@dataclass(frozen=True)
class Estimate:
    """What one estimate found.

    Attributes:
        loss: mean loss over the queries with finite losses (nan where there is none).
        projected_grads: float64, shape (queries,); the derivative along each direction, nan where a loss was not finite or it is beyond
            ``LARGEST``.
        weights: float64, shape (queries,); the weight of each direction in the mean gradient, ones unless split unevenly.
        forwards: forward passes spent.
        curvatures: float64, shape (queries,): (l+ + l- - 2 l0) / zo_eps^2, the second derivative along each direction; None
            where it was not asked for.
        gradient: float32, shape (trainables,): the gradient itself, of estimators that do not move along directions of weights.
        tokens: token evaluations: tokens that went through the adapted part, over all forwards; 0: those of whole batches.
    """

    loss: float
    projected_grads: Tensor
    weights: Tensor
    forwards: int
    curvatures: Tensor | None = None
    gradient: Tensor | None = None
    tokens: int = 0

    def __post_init__(self) -> None:
        usable = torch.where(self.projected_grads.abs() <= LARGEST, self.projected_grads, torch.nan)
        object.__setattr__(self, "projected_grads", usable)

    @property
    def dropped(self) -> int:
        """Queries whose losses were not finite, or too far apart."""
        return int(self.projected_grads.isnan().sum())


@dataclass(frozen=True)
class Estimator(ABC):
    """Losses at perturbed points -> derivatives along directions. Options are the fields; what it can do is declared.

    Attributes:
        forwards_per_query, forwards_per_step: what its queries cost (:class:`~zo_opt.schedules.RunLength`), sequentially.
        forwards_at_start: what its first step costs besides.
        forwards_split: what a step costs in split mode, whatever its queries.
        query_modes: the modes it can be evaluated in; None: all.
        differentiates: whether it needs a loss that torch can differentiate.
        own_closure: whether its closure returns something else than the loss of the batch.
        gives_gradient: whether it gives a gradient, not derivatives along directions of weights: no step control or line search acts on
            it, and its steps cannot be replayed from a few numbers.
    """

    forwards_per_query: ClassVar[int] = 2
    forwards_per_step: ClassVar[int] = 0
    forwards_at_start: ClassVar[int] = 0
    forwards_split: ClassVar[int] = 2
    query_modes: ClassVar[tuple[str, ...] | None] = None
    differentiates: ClassVar[bool] = False
    own_closure: ClassVar[bool] = False
    gives_gradient: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, evaluate: Evaluator, queries: int, zo_eps: float) -> Estimate:
        """Evaluate so many directions.

        Args:
            evaluate: maps (queries, scales) to :class:`~zo_opt.queries.modes.Losses`.
            queries: directions.
            zo_eps: perturbation scale, in parameter units.
        """

    def charge(self, step: int, queries: int) -> None:  # noqa: B027 (most keep no account)
        """Told of every step that moved the weights, one that is redone from a record included."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, as plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        del state


def estimate_of(
    losses: Losses, projected_grads: Tensor, loss_of_query: Tensor, curvatures: Tensor | None = None
) -> Estimate:
    """The estimate that these losses amount to; its loss is the mean over the queries with finite derivatives."""
    weights = losses.weights * projected_grads.isfinite()
    mean = (loss_of_query.nan_to_num(0, 0, 0) * weights).sum() / weights.sum()
    return Estimate(float(mean), projected_grads, losses.weights, losses.forwards, curvatures)


def combine(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of estimates along the same directions (micro-batches of equal size); a query dropped in one is dropped."""
    losses = [e.loss for e in estimates if e.loss == e.loss]
    curvatures = [e.curvatures for e in estimates if e.curvatures is not None]
    gradients = [e.gradient for e in estimates if e.gradient is not None]
    return Estimate(
        sum(losses) / len(losses) if losses else float("nan"),
        torch.stack([e.projected_grads for e in estimates]).mean(dim=0),
        torch.stack([e.weights for e in estimates]).mean(dim=0),
        sum(e.forwards for e in estimates),
        torch.stack(curvatures).mean(dim=0) if curvatures else None,
        torch.stack(gradients).mean(dim=0) if gradients else None,
        sum(e.tokens for e in estimates),
    )
