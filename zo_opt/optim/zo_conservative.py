"""ZO-SGD-Cons: the best of staying, stepping and stepping back (ZO-Bench, arXiv 2402.11592)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zo_opt.optim.base import ZerothOrderOptimizer
from zo_opt.optim.line_search import LineSearch


class ZOConservative(ZerothOrderOptimizer):
    """theta <- argmin of the loss over {theta, theta - lr g, theta + lr g}, g = mean_q g_q z_q.

    Source: ZO-SGD-Cons in ZO-Bench, arXiv 2402.11592, after Kim et al., arXiv 2109.13391. Three forwards a step more than MeZO.
    [choice] Weight decay is applied after the choice. Arguments as in :class:`~zo_opt.optim.base.ZerothOrderOptimizer`.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = ZOConservative([theta], lr=0.5, seed=0)  # ten times the lr that MeZO bears here
    >>> for _ in range(200):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> bool(theta.abs().max() < 1e-2)
    True
    """

    name = "zo-conservative"

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-6, **options: Any) -> None:
        super().__init__(params, lr=lr, line_search=LineSearch((0.0, 1.0, -1.0)), **options)
