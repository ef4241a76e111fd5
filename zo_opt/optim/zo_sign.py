"""ZO-SGD-Sign: the sign of the estimate (ICLR 2019; ZO-Bench, arXiv 2402.11592)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zo_opt.optim.base import ZerothOrderOptimizer
from zo_opt.optim.update_rules import Sign


class ZOSign(ZerothOrderOptimizer):
    """theta <- theta - lr * sign(mean_q g_q z_q): every entry moves by lr.

    Source: Liu et al., "signSGD via zeroth-order oracle", ICLR 2019; in ZO-Bench, arXiv 2402.11592. lr is in parameter units a
    step. Arguments as in :class:`~zo_opt.optim.base.ZerothOrderOptimizer`.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = ZOSign([theta], lr=0.02, seed=0)
    >>> for _ in range(400):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> bool(theta.abs().max() < 0.2)
    True
    """

    name = "zo-sign"
    own_update_rule = True
    lr_is_a_length = True

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-6, **options: Any) -> None:
        super().__init__(params, lr=lr, update_rule=Sign(), **options)
