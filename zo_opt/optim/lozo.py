"""LOZO: directions of low rank with a lazily refreshed factor (arXiv 2410.07698)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zo_opt.directions import Directions, LowRank
from zo_opt.optim.base import ZerothOrderOptimizer


class LOZO(ZerothOrderOptimizer):
    """MeZO along z_W = U V^T / r for every matrix W, with U fresh in every step and V kept for nu steps.

    Source: arXiv 2410.07698, algorithm 1; parameters of one axis get Gaussian directions. The directions are
    :class:`~zo_opt.directions.LowRank`. Other arguments as in :class:`~zo_opt.optim.base.ZerothOrderOptimizer`.

    Args:
        rank: r.
        interval: nu, in steps.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.ones(4, 3))
    >>> optimizer = LOZO([theta], lr=0.05, interval=10, seed=0)
    >>> for _ in range(400):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> bool(loss < 0.1)
    True
    """

    name = "lozo"
    own_directions = True

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-6,
        rank: int = 2,
        interval: int = 50,
        directions: str | Directions | None = None,
        **options: Any,
    ) -> None:
        kind = directions if directions is not None else LowRank(rank, interval)
        super().__init__(params, lr=lr, directions=kind, **options)
