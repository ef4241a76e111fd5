"""The gradient estimate in ``.grad``, for what looks for gradients there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zo_opt.errors import ZOError
from zo_opt.optim.records import Update
from zo_opt.queries.trainables import Piece


class WritesGrad:
    """What a zeroth-order optimizer can do in the place of ``loss.backward()``."""

    @torch.no_grad()
    def write_grad(self: Any, closure: Callable[..., Any] | None = None, batch: Any = None) -> Tensor:
        """Add the gradient estimate to ``.grad`` of every trainable, for any ``torch.optim`` optimizer to consume.

        Takes the place of ``loss.backward()`` in a first-order loop; this optimizer's own lr, weight decay and update rule
        are not used.

        >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> from zo_opt import MeZO
        >>> spsa, adamw = MeZO([theta], lr=0.0), torch.optim.AdamW([theta], lr=0.05)
        >>> for _ in range(200):
        ...     adamw.zero_grad()
        ...     loss = spsa.write_grad(lambda: theta.square().sum())
        ...     adamw.step()
        >>> bool(theta.abs().max() < 0.1)
        True
        """
        if closure is not None:
            self.estimate(closure, batch)
        loss, update = self.plan()
        if update.coefficients:
            self.failed_steps = 0
            self.prepare(update)
            _add_grad(self, update, absorb=True)
        self.step_count += 1
        if not update.coefficients:
            self.count_failure()
        return torch.tensor(loss)

    @torch.no_grad()
    def write_last_grad(self: Any) -> None:
        """Add the gradient estimate that the last ``step`` applied to ``.grad`` of every trainable; zeros if its losses were not finite.

        For what looks at gradients after a step, such as an adapter that scores its parameters by them. Call it right after
        ``step``: where directions depend on the weights (Sparse-MeZO), these are the weights by now.

        Raises:
            ZOError: no step was made yet.

        >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> from zo_opt import MeZO
        >>> optimizer = MeZO([theta], lr=0.5)
        >>> loss = optimizer.step(lambda: theta.square().sum())
        >>> optimizer.write_last_grad()
        >>> torch.allclose(theta + 0.5 * theta.grad, torch.tensor([3.0, -2.0]))
        True
        """
        if self.last_update is None:
            raise ZOError("write_last_grad() was called before a step; call step() first.")
        _add_grad(self, self.last_update, absorb=False)  # the step has taken the update in


def _add_grad(optimizer: Any, update: Update, *, absorb: bool) -> None:
    """Add an update's gradient estimate to ``.grad``, in the parameters' dtype."""
    trainables, directions = optimizer.trainables(), optimizer.all_directions(update)
    for i, parameter in enumerate(trainables.parameters):
        start, memory = trainables.starts[i], trainables.memory(i)
        piece = Piece(start, start + len(memory), memory, i)
        if absorb:
            optimizer.absorb(piece, update, directions)
        gradient, factor = optimizer.gradient(piece, update, directions, 1.0)
        gradient = (gradient * factor).view(parameter.shape).to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
