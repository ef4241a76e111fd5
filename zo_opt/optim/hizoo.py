"""HiZOO: directions scaled by a running diagonal of the Hessian (arXiv 2402.15173)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor

from zo_opt.directions import StepDirections
from zo_opt.errors import ZOError
from zo_opt.estimators import Estimate, two_sided
from zo_opt.optim.base import ZerothOrderOptimizer
from zo_opt.optim.records import Update
from zo_opt.queries.modes import Evaluator
from zo_opt.queries.trainables import Piece


class HiZOO(ZerothOrderOptimizer):
    """Perturb along z / sqrt(H);  H <- (1-s) H + s * mean_q |l+ + l- - 2 l0| H z_q^2 / (2 eps^2);  step g_q z_q / sqrt(H).

    Source: arXiv 2402.15173, algorithm 1: H (its inverse Sigma) is updated before the step uses it, and starts at one. Three
    forwards a query (one more a step than MeZO: l0 is shared). Keeps one float32 tensor a parameter. Other arguments as in
    :class:`~zo_opt.optim.base.ZerothOrderOptimizer`.

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

    name = "hizoo"
    searchable = False
    FLOOR = 1e-8  # [choice] of H: where the loss looks straight, steps must not grow without bound
    slot_values: ClassVar[dict[str, float]] = {"hessian": 1.0}

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-6, smoothing: float = 1e-6, **options: Any) -> None:
        if not 0 < smoothing <= 1:
            raise ZOError(f"smoothing={smoothing} is not possible; give a share of the new curvature, such as 1e-6.")
        super().__init__(params, lr=lr, **options)
        self.smoothing = smoothing

    def _estimate(self, evaluator: Evaluator, queries: int) -> Estimate:
        return two_sided(evaluator, queries, self.zo_eps, curvature=True)

    def _transform(self) -> Callable[[Tensor, int, int, Tensor], Tensor]:
        slots = self.slots()
        return lambda z, start, stop, weights: z / slots.range("hessian", start, stop).sqrt()

    def _update(self, estimate: Estimate, coefficients: tuple[float, ...]) -> Update:
        assert estimate.curvatures is not None
        curvatures = tuple(estimate.curvatures.nan_to_num(0.0).tolist())
        return Update(self.step_count, self._lrs(), coefficients, curvatures)

    def _gradient(
        self, piece: Piece, update: Update, directions: dict[int, StepDirections], scale: float
    ) -> tuple[Tensor, float]:
        hessian = self.slots().range("hessian", piece.start, piece.stop)
        kept = [(q, abs(c)) for q, c in enumerate(update.curvatures) if (update.coefficients[q], c) != (0, 0)]
        mean = hessian.new_zeros(len(hessian))
        for query, curvature in kept:
            z = directions[update.step].range(query, piece.start, piece.stop)
            mean.add_(z.square(), alpha=curvature / (2 * len(kept)))
        hessian.mul_(1 - self.smoothing + self.smoothing * mean).clamp_(min=self.FLOOR)
        return super()._gradient(piece, update, directions, scale)

    def _applied_gradient(
        self, piece: Piece, update: Update, directions: dict[int, StepDirections], scale: float
    ) -> tuple[Tensor, float]:
        return super()._gradient(piece, update, directions, scale)  # H has taken the update's curvature in
