"""HiZOO: directions scaled by a running diagonal of the Hessian (arXiv 2402.15173)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from zo_opt.choices import Range, check_numbers
from zo_opt.estimators import Estimate, TwoSidedWithCurvature
from zo_opt.optim.axis import Directed
from zo_opt.optim.choices import Method
from zo_opt.optim.machine import ZerothOrderOptimizer
from zo_opt.optim.records import Update
from zo_opt.queries.perturbation import Transform
from zo_opt.queries.trainables import Piece


class HiZOO(ZerothOrderOptimizer):
    """Perturb along z / sqrt(H);  H <- (1-s) H + s * mean_q |l+ + l- - 2 l0| H z_q^2 / (2 eps^2);  step g_q z_q / sqrt(H).

    Use it where numbers of very different curvature are trained together, as in whole models.

    Source: arXiv 2402.15173, algorithm 1: H (its inverse Sigma) is updated before the step uses it, and starts at one. Three
    forwards a query (one more a step than MeZO: l0 is shared). Keeps one float32 tensor a parameter. Other arguments as in
    :class:`~zo_opt.optim.machine.ZerothOrderOptimizer`.

    Args:
        smoothing: s, in (0, 1].

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> scale = torch.tensor([10.0, 0.1])
    >>> optimizer = HiZOO([theta], lr=0.05, zo_eps=1e-2, smoothing=0.02, seed=0)
    >>> for _ in range(600):
    ...     loss = optimizer.step(lambda: (scale * theta.square()).sum())
    >>> bool(loss < 0.05)
    True
    """

    method = Method(
        "hizoo",
        {"lr": 1e-6, "estimator": TwoSidedWithCurvature()},
        frozenset({"estimator", "line_search"}),
        ("smoothing",),
    )
    own_estimates: ClassVar[bool] = True
    own_gradient: ClassVar[bool] = True
    own_arithmetic: ClassVar[bool] = True
    FLOOR: ClassVar[float] = 1e-8  # [choice] of H: where the loss looks straight, steps must not grow without bound
    slot_values: ClassVar[Mapping[str, float]] = {"hessian": 1.0}

    def __init__(self, params: Iterable[Any], *, smoothing: float = 1e-6, **options: Any) -> None:
        check_numbers(Range(above=0, most=1), smoothing=smoothing)
        super().__init__(params, **options)
        self.smoothing = smoothing

    def transform(self) -> Transform:
        slots = self.slots()
        return lambda z, start, stop, weights: z / slots.range("hessian", start, stop).sqrt()

    def update_from(self, estimate: Estimate, update: Update) -> Update:
        assert estimate.curvatures is not None
        return replace(update, curvatures=tuple(estimate.curvatures.nan_to_num(0.0).tolist()))

    def absorb(self, piece: Piece, update: Update, directions: Directed) -> None:
        """H <- (1-s) H + s * mean_q |c_q| H z_q^2 / 2, before the step uses it."""
        hessian = self.slots().range("hessian", piece.start, piece.stop)
        mean = hessian.new_zeros(len(hessian))
        for query in update.kept:
            z = directions[update.step].range(query, piece.start, piece.stop)
            mean.add_(z.square(), alpha=abs(update.curvatures[query]) / (2 * len(update.kept)))
        hessian.mul_(1 - self.smoothing + self.smoothing * mean).clamp_(min=self.FLOOR)
