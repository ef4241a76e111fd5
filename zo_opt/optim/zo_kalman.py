"""Zeroth order with a memory: a Kalman filter over past projected gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_opt.choices import Range, check_numbers
from zo_opt.errors import ZOError
from zo_opt.estimators import Estimate
from zo_opt.optim.axis import Directed
from zo_opt.optim.choices import Method
from zo_opt.optim.machine import ZerothOrderOptimizer
from zo_opt.optim.records import Update
from zo_opt.queries.trainables import Piece


class ZOKalman(ZerothOrderOptimizer):
    """The gradient as a hidden state g, seen along one direction at a time: y_q = z_q . g + noise; the update rule follows its mean m.

    Use it for a thousand trained numbers or fewer, such as spectral gains, where old measurements are worth keeping.

    Predict: m <- a m, P <- a^2 P + (1 - a^2) I (the gradient drifts, and is forgotten, with correlation a from step to step).
    Correct: S = Z P Z^T + R I, K = P Z^T S^-1, m <- m + K (y - Z m), P <- P - K Z P.

    Source: Kalman 1960, with a stationary first-order autoregressive state; for a -> 1 this is recursive least squares. [choice]
    P and R are in units of a gradient entry's own variance, which cancels from K: only their ratio matters. d entries are pinned
    down by about d queries within 1 / (1 - a) steps, so keep d at a thousand or so: P holds d^2 numbers. Other arguments as
    in :class:`~zo_opt.optim.machine.ZerothOrderOptimizer`.

    Args:
        memory: a, in [0, 1).
        noise: R, variance of a measurement relative to that of one gradient entry (batch noise, curvature).

    Raises:
        ZOError: there are more than ``LIMIT`` trainable numbers.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.0]))
    >>> optimizer = ZOKalman([theta], lr=0.05, seed=0)
    >>> for _ in range(200):
    ...     loss = optimizer.step(lambda: theta.square().sum())
    >>> bool(theta.abs().max() < 1e-2)
    True
    """

    method = Method("zo-kalman", {"lr": 1e-4}, frozenset({"line_search"}), ("memory", "noise"))
    own_gradient: ClassVar[bool] = True
    own_arithmetic: ClassVar[bool] = True
    axis_state: ClassVar[frozenset[str]] = frozenset({"gradient", "covariance"})
    LIMIT: ClassVar[int] = 1 << 13

    def __init__(self, params: Iterable[Any], *, memory: float = 0.95, noise: float = 1.0, **options: Any) -> None:
        check_numbers(Range(least=0, below=1), memory=memory)
        check_numbers(Range(above=0), noise=noise)
        super().__init__(params, **options)
        self.memory, self.noise = memory, noise

    def update_from(self, estimate: Estimate, update: Update) -> Update:
        """The measurements y_q themselves in the place of their shares in a mean."""
        kept = estimate.projected_grads.isfinite()
        shares = (estimate.weights / estimate.weights[kept].sum()).tolist()
        y = [c / share if k else 0.0 for c, share, k in zip(update.coefficients, shares, kept.tolist(), strict=True)]
        return replace(update, coefficients=tuple(y))

    def prepare(self, update: Update) -> None:
        trainables = self.trainables()
        if trainables.total > self.LIMIT:
            raise ZOError(
                f"the Kalman filter holds d x d numbers and takes up to {self.LIMIT} trainables; there are "
                f"{trainables.total}. Tune fewer, or use another optimizer."
            )
        state = self.state[trainables.parameters[0]]
        if "gradient" not in state or len(state["gradient"]) != trainables.total:
            state["gradient"] = torch.zeros(trainables.total)
            state["covariance"] = torch.eye(trainables.total)
        directions = self.directions_of(update.step)
        if update.kept:
            z = torch.stack([directions.range(q, 0, trainables.total).cpu() for q in update.kept])
            self._measure(state, z, torch.tensor([update.coefficients[q] for q in update.kept]))

    def _measure(self, state: dict[str, Tensor], z: Tensor, y: Tensor) -> None:
        m, p = state["gradient"], state["covariance"]
        m.mul_(self.memory)
        p.mul_(self.memory**2).diagonal().add_(1 - self.memory**2)
        pz = p @ z.T
        gain = torch.linalg.solve(z @ pz + self.noise * torch.eye(len(y)), pz.T).T
        m += gain @ (y - z @ m)
        p -= gain @ pz.T
        p.copy_((p + p.T) / 2)

    def gradient(self, piece: Piece, update: Update, directions: Directed, scale: float) -> tuple[Tensor, float]:
        m: Tensor = self.state[self.trainables().parameters[0]]["gradient"]
        return m[piece.start : piece.stop].to(piece.values.device), scale
