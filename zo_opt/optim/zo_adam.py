"""ZO-AdaMM: AMSGrad on the estimate (arXiv 1910.06513)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zo_opt.optim.base import ZerothOrderOptimizer
from zo_opt.optim.update_rules import AMSGrad


class ZOAdam(ZerothOrderOptimizer):
    """m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  w <- max(w, v);  theta <- theta - lr * m / (sqrt(w) + eps).

    g = mean_q g_q z_q. Source: ZO-AdaMM, arXiv 1910.06513, algorithm 1 (no bias correction); ZO-Bench's ZO-Adam. Keeps three
    float32 tensors a parameter. Other arguments as in :class:`~zo_opt.optim.base.ZerothOrderOptimizer`.

    Args:
        beta1, beta2: decays, in [0, 1).
        adam_eps: added to the denominator.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = ZOAdam([theta], lr=0.02, beta2=0.99, seed=0)
    >>> for _ in range(600):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> bool(theta.abs().max() < 0.1)
    True
    """

    name = "zo-adam"
    own_update_rule = True
    lr_is_a_length = True

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-4,
        beta1: float = 0.9,
        beta2: float = 0.999,
        adam_eps: float = 1e-8,
        **options: Any,
    ) -> None:
        super().__init__(params, lr=lr, update_rule=AMSGrad(beta1, beta2, adam_eps), **options)
