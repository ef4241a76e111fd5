"""AdaZeta: zeroth-order tuning of tensor trains with a growing number of queries (arXiv 2406.18060)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zo_opt.optim.base import ZerothOrderOptimizer
from zo_opt.schedules import QuerySchedule, adazeta_queries


class AdaZeta(ZerothOrderOptimizer):
    """theta <- theta - lr * (1/Q_k) sum_q g_q z_q with Q_k = min(max(int(alpha * e_k^beta), 1), Q_max).

    Source: arXiv 2406.18060, algorithm 1 and section 3.3. Released values are the defaults (alpha 0.85, beta 0.4, Q_max 15, lr 1e-4,
    zo_eps 1e-3, weight decay 0.01). Arguments as in :class:`~zo_opt.optim.base.ZerothOrderOptimizer`.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = AdaZeta([theta], lr=0.05, seed=0, steps_per_epoch=20)
    >>> for _ in range(300):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> bool(theta.abs().max() < 1e-2), optimizer.last_record.queries
    (True, 2)
    """

    name = "adazeta"

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        query_schedule: QuerySchedule | None = None,
        **options: Any,
    ) -> None:
        schedule = query_schedule if query_schedule is not None else adazeta_queries()
        super().__init__(params, lr=lr, weight_decay=weight_decay, query_schedule=schedule, **options)
