"""Forward gradient: exact directional derivatives by forward-mode differentiation (arXiv 2202.08587)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zo_opt.errors import ZOError
from zo_opt.estimators import Estimate, forward_gradient
from zo_opt.optim.base import ZerothOrderOptimizer
from zo_opt.queries.modes import Evaluator


class ForwardGradient(ZerothOrderOptimizer):
    """theta <- theta - lr * mean_q (dL/dtheta . z_q) z_q, the derivative exact: no zo_eps, no backward pass.

    Source: Baydin et al., arXiv 2202.08587; in ZO-Bench, arXiv 2402.11592. Needs a model whose operations all have forward-mode
    derivatives and a closure that returns the loss as a tensor. Counted as two forwards a query; activations carry tangents,
    twice the memory of a forward. Arguments as in :class:`~zo_opt.optim.base.ZerothOrderOptimizer`; sequential only.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = ForwardGradient([theta], lr=0.05, seed=0)
    >>> for _ in range(300):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> bool(theta.abs().max() < 1e-3)
    True
    """

    name = "forward-gradient"

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-6, **options: Any) -> None:
        super().__init__(params, lr=lr, **options)
        if self.query_mode not in ("sequential", "auto"):
            raise ZOError(f'query_mode="{self.query_mode}" does not apply to forward gradients; leave it sequential.')

    def _estimate(self, evaluator: Evaluator, queries: int) -> Estimate:
        closure, batch = evaluator.closure, evaluator.batch
        call = closure if batch is None else lambda: closure(batch)
        return forward_gradient(evaluator.perturbed, call, range(queries))
