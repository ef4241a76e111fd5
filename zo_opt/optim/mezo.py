"""MeZO: SPSA with seeds instead of stored directions (arXiv 2305.17333)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zo_opt.optim.base import ZerothOrderOptimizer


class MeZO(ZerothOrderOptimizer):
    """theta <- theta - lr * mean_q g_q z_q, with g_q from two forward passes along the seeded direction z_q.

    Source: arXiv 2305.17333, algorithms 1 and 2. Released values: whole model lr 1e-6, zo_eps 1e-3 (the defaults here); LoRA
    lr 1e-4, zo_eps 1e-2. One query a step unless a schedule is given. Arguments as in
    :class:`~zo_opt.optim.base.ZerothOrderOptimizer`.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = MeZO([theta], lr=0.05, seed=0)
    >>> for _ in range(300):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> bool(theta.abs().max() < 1e-3)
    True
    """

    name = "mezo"

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-6, **options: Any) -> None:
        super().__init__(params, lr=lr, **options)
