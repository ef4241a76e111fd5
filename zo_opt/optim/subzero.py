"""SubZero: directions in a random subspace of every matrix (arXiv 2410.08989)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zo_opt.directions import Directions, Subspace
from zo_opt.optim.base import ZerothOrderOptimizer


class SubZero(ZerothOrderOptimizer):
    """MeZO along z_W = U Z V^T for every matrix W, U and V with orthonormal columns refreshed every F steps, Z (r, r) fresh.

    Source: arXiv 2410.08989, algorithm 1; parameters of one axis get Gaussian directions. The directions are
    :class:`~zo_opt.directions.Subspace`. Other arguments as in :class:`~zo_opt.optim.base.ZerothOrderOptimizer`.

    Args:
        rank: r.
        interval: F, in steps.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.ones(4, 3))
    >>> optimizer = SubZero([theta], lr=0.05, rank=2, interval=10, seed=0)
    >>> for _ in range(400):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> bool(loss < 0.1)
    True
    """

    name = "subzero"
    own_directions = True

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-6,
        rank: int = 32,
        interval: int = 500,
        directions: str | Directions | None = None,
        **options: Any,
    ) -> None:
        kind = directions if directions is not None else Subspace(rank, interval)
        super().__init__(params, lr=lr, directions=kind, **options)
