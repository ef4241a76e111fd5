"""SPSA: derivatives along directions from differences of losses, two-sided and one-sided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zo_opt.estimators.base import Estimate, Estimator, estimate_of
from zo_opt.queries.modes import Evaluator


@dataclass(frozen=True)
class TwoSided(Estimator):
    """g_q = (L(theta + zo_eps z_q) - L(theta - zo_eps z_q)) / (2 zo_eps); the gradient estimate is the mean of g_q z_q.

    Use it for queries on weights: its error falls with the square of zo_eps.

    Source: Spall 1992; MeZO, arXiv 2305.17333, definition 1. In split mode with as many queries as examples this is GRZO's
    estimate (arXiv 2606.02857): one direction an example.

    >>> from zo_opt.queries.modes import Losses
    >>> theta, z = 3.0, 1.0
    >>> def evaluate(queries, scales):
    ...     values = torch.tensor([[(theta + s * z) ** 2 for s in scales]] * queries, dtype=torch.float64)
    ...     return Losses(values, torch.ones(queries, dtype=torch.float64), queries * len(scales))
    >>> round(TwoSided()(evaluate, 1, 1e-3).projected_grads.item(), 6)
    6.0
    """

    def __call__(self, evaluate: Evaluator, queries: int, zo_eps: float) -> Estimate:
        losses = evaluate(queries, (zo_eps, -zo_eps))
        return estimate_of(losses, _slopes(losses.values, zo_eps), losses.values.mean(dim=1))


@dataclass(frozen=True)
class TwoSidedWithCurvature(Estimator):
    """:class:`TwoSided`, and the second derivatives (L(theta + zo_eps z_q) + L(theta - zo_eps z_q) - 2 L(theta)) / zo_eps^2.

    Use it where the optimizer needs curvature, as HiZOO does.

    Source: HiZOO, arXiv 2402.15173, algorithm 1. One forward more a step: L(theta) is shared.
    """

    forwards_per_step: ClassVar[int] = 1
    forwards_split: ClassVar[int] = 3

    def __call__(self, evaluate: Evaluator, queries: int, zo_eps: float) -> Estimate:
        losses = evaluate(queries, (zo_eps, -zo_eps), base=True)
        assert losses.base is not None
        up, down = losses.values.unbind(dim=1)
        finite = losses.values.isfinite().all(dim=1) & losses.base.isfinite()
        projected_grads = torch.where(finite, (up - down) / (2 * zo_eps), torch.nan)
        curvatures = torch.where(finite, (up + down - 2 * losses.base) / zo_eps**2, torch.nan)
        return estimate_of(losses, projected_grads, losses.values.mean(dim=1), curvatures)


@dataclass(frozen=True)
class OneSided(Estimator):
    """g_q = (L(theta + zo_eps z_q) - L(theta)) / zo_eps, in Q + 1 forwards: L(theta) is shared.

    Use it for many queries a step: each costs one forward pass, and its error falls with zo_eps alone.

    Source: FZOO, arXiv 2506.09034. In split mode a step costs two forwards and the base loss is that of the query's slice.
    """

    forwards_per_query: ClassVar[int] = 1
    forwards_per_step: ClassVar[int] = 1

    def __call__(self, evaluate: Evaluator, queries: int, zo_eps: float) -> Estimate:
        losses = evaluate(queries, (zo_eps,), base=True)
        assert losses.base is not None
        projected_grads = (losses.values[:, 0] - losses.base) / zo_eps
        projected_grads = torch.where(projected_grads.isfinite(), projected_grads, torch.nan)
        return estimate_of(losses, projected_grads, losses.base)


def control_variate(evaluate: Evaluator, anchor: Tensor, queries: int, zo_eps: float) -> Estimate:
    """Two-sided differences at theta less those at ``anchor`` along the same directions: g_q(theta) - g_q(anchor).

    Source: MeZO-SVRG, arXiv 2404.08080, algorithm 1. Four forwards a query.

    Args:
        evaluate: the losses.
        anchor: other values of all trainables, float32, shape (trainables,).
        queries: directions.
        zo_eps: perturbation scale, in parameter units.
    """
    here = TwoSided()(evaluate, queries, zo_eps)
    there = _slopes(evaluate(queries, (zo_eps, -zo_eps), anchor=anchor).values, zo_eps)
    return Estimate(here.loss, here.projected_grads - there, here.weights, 2 * here.forwards)


def _slopes(values: Tensor, zo_eps: float) -> Tensor:
    """(L+ - L-) / (2 zo_eps) of each query, nan where one of the two is not finite; ``values`` of shape (queries, 2)."""
    up, down = values.unbind(dim=1)
    return torch.where(values.isfinite().all(dim=1), (up - down) / (2 * zo_eps), torch.nan)
