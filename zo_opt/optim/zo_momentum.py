"""ZO-SGD with momentum (ZO-Bench, arXiv 2402.11592)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zo_opt.optim.base import ZerothOrderOptimizer
from zo_opt.optim.update_rules import Momentum


class ZOMomentum(ZerothOrderOptimizer):
    """m <- beta m + mean_q g_q z_q;  theta <- theta - lr * m.

    Source: ZO-SGD-MMT in ZO-Bench, arXiv 2402.11592; the convention is :class:`~zo_opt.optim.update_rules.Momentum`'s. Keeps one
    float32 tensor a parameter. Other arguments as in :class:`~zo_opt.optim.base.ZerothOrderOptimizer`.

    Args:
        beta: decay of the momentum, in [0, 1).

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = ZOMomentum([theta], lr=0.005, seed=0)
    >>> for _ in range(500):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> bool(theta.abs().max() < 1e-2)
    True
    """

    name = "zo-momentum"
    own_update_rule = True

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-6, beta: float = 0.9, **options: Any) -> None:
        super().__init__(params, lr=lr, update_rule=Momentum(beta), **options)
