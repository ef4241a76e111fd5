"""Backpropagation in the training loop's own terms, so that first-order and zeroth-order runs differ in nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from zo_opt.errors import NonFiniteLossError, ZOError
from zo_opt.optim import StepRecord
from zo_opt.schedules import History

NAME = "adamw"
FORWARDS_PER_STEP = 3  # a forward pass, and a backward pass that costs as much as two


class FirstOrder:
    """AdamW (arXiv 1711.05101) on clipped gradients, with what the loop asks of a zeroth-order optimizer.

    A step counts as three forward passes. A loss or gradient that is not finite never reaches the weights: the step is dropped and counted.

    Args:
        params: parameters or groups of ``torch.optim``; those without a gradient are left alone.
        lr: learning rate, in parameter units a step.
        betas: decay of the first and second moments.
        weight_decay: decoupled.
        max_grad_norm: bound on the norm of the whole gradient; 0 for none.
        steps_per_epoch: optimizer steps in an epoch.
        max_failed_steps: so many dropped steps in a row raise :class:`~zo_opt.errors.NonFiniteLossError`.

    Attributes:
        adamw: the ``torch.optim.AdamW`` that makes the steps, for learning-rate schedulers.

    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = FirstOrder([theta], lr=0.1)
    >>> for _ in range(100):
    ...     loss = optimizer.step(lambda batch: (theta - batch).square().sum(), torch.tensor(1.0))
    >>> bool((theta - 1).abs().max() < 0.1), optimizer.history.forwards
    (True, 300)
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        steps_per_epoch: int = 1,
        max_failed_steps: int = 10,
    ) -> None:
        self.adamw = AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay)
        # A learning-rate scheduler warns unless AdamW stepped before it, which it does not if the first step is dropped.
        self.adamw._opt_called = True  # type: ignore[attr-defined]
        parameters = [p for group in self.adamw.param_groups for p in group["params"]]
        if not all(p.isfinite().all() for p in parameters):
            raise ZOError("a trainable holds NaN or infinity before training; load sound weights first.")
        self.max_grad_norm, self.steps_per_epoch, self.max_failed_steps = (
            max_grad_norm,
            steps_per_epoch,
            max_failed_steps,
        )
        self.history = History()
        self.step_count = 0
        self.failed_steps = 0
        self.dropped_queries = 0
        self.last_record: StepRecord | None = None

    def step(self, closure: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """One step on one batch; gradients stay in ``.grad`` until :meth:`zero_grad`.

        Returns:
            The loss, without gradient.

        Raises:
            NonFiniteLossError: as said of ``max_failed_steps``; the weights are untouched.
        """
        self.zero_grad()
        with torch.enable_grad():
            loss = closure(batch)
        finite = bool(loss.isfinite())
        if finite:
            loss.backward()
            finite = self._clip()
        if finite:
            self.adamw.step()
        self._record(float(loss.detach()), dropped=not finite)
        return loss.detach()

    def zero_grad(self) -> None:
        """Free the gradients."""
        self.adamw.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, and under "zo" all else that the next step depends on."""
        progress = {
            "step": self.step_count,
            "history": asdict(self.history),
            "failed_steps": self.failed_steps,
            "dropped_queries": self.dropped_queries,
        }
        return self.adamw.state_dict() | {"zo": progress}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, to the same bits."""
        progress = state_dict["zo"]
        self.adamw.load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        self.step_count, self.history = progress["step"], History(**progress["history"])
        self.failed_steps, self.dropped_queries = progress["failed_steps"], progress["dropped_queries"]

    def _clip(self) -> bool:
        """Bound the gradient; returns whether it is finite."""
        parameters = [p for group in self.adamw.param_groups for p in group["params"] if p.grad is not None]
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        return bool(torch.nn.utils.clip_grad_norm_(parameters, limit).isfinite())

    def _record(self, loss: float, *, dropped: bool) -> None:
        epoch = self.step_count // self.steps_per_epoch
        self.last_record = StepRecord(self.step_count, epoch, loss, 0, int(dropped), FORWARDS_PER_STEP, ())
        self.history.forwards += FORWARDS_PER_STEP
        self.step_count += 1
        self.dropped_queries += dropped
        self.failed_steps = self.failed_steps + 1 if dropped else 0
        if self.failed_steps >= self.max_failed_steps:
            raise NonFiniteLossError(
                f"no loss and gradient was finite in {self.failed_steps} steps in a row; the trainables keep their last good values. "
                "Lower lr, or run the frozen model in a wider dtype."
            )
