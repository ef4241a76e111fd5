"""Estimators: losses at perturbed points -> derivatives along directions. They know nothing of update rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_opt.query_modes import Losses


@dataclass(frozen=True)
class Estimate:
    """What one estimate found.

    Attributes:
        loss: mean loss over the queries with finite losses (nan where there is none).
        projected_grads: float64, shape (queries,); the derivative along each direction, nan where a loss was not finite.
        weights: float64, shape (queries,); the weight of each direction in the mean gradient, ones unless split unevenly.
        forwards: forward passes spent.
    """

    loss: float
    projected_grads: Tensor
    weights: Tensor
    forwards: int

    @property
    def dropped(self) -> int:
        """Queries whose losses were not finite."""
        return int(self.projected_grads.isnan().sum())


Evaluate = Callable[[int, Sequence[float]], Losses]


def two_sided(evaluate: Evaluate, queries: int, zo_eps: float) -> Estimate:
    """Two-sided SPSA: g_q = (L(theta + zo_eps z_q) - L(theta - zo_eps z_q)) / (2 zo_eps).

    Source: Spall 1992; MeZO, arXiv 2305.17333, definition 1. The gradient estimate is the mean of g_q z_q.

    >>> theta, z = 3.0, 1.0
    >>> def evaluate(queries, scales):
    ...     values = torch.tensor([[(theta + s * z) ** 2 for s in scales]] * queries, dtype=torch.float64)
    ...     return Losses(values, torch.ones(queries, dtype=torch.float64), queries * len(scales))
    >>> round(two_sided(evaluate, 1, 1e-3).projected_grads.item(), 6)
    6.0
    """
    losses = evaluate(queries, (zo_eps, -zo_eps))
    finite = losses.values.isfinite().all(dim=1)
    difference = losses.values[:, 0] - losses.values[:, 1]
    projected_grads = torch.where(finite, difference / (2 * zo_eps), torch.nan)
    weights = losses.weights * finite
    mean = (losses.values.mean(dim=1).nan_to_num(0, 0, 0) * weights).sum() / weights.sum()
    return Estimate(float(mean), projected_grads, losses.weights, losses.forwards)


def combine(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of estimates along the same directions (micro-batches of equal size); a query dropped in one is dropped."""
    projected_grads = torch.stack([e.projected_grads for e in estimates]).mean(dim=0)
    weights = torch.stack([e.weights for e in estimates]).mean(dim=0)
    losses = [e.loss for e in estimates if e.loss == e.loss]
    loss = sum(losses) / len(losses) if losses else float("nan")
    return Estimate(loss, projected_grads, weights, sum(e.forwards for e in estimates))
