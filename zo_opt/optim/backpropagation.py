"""Backpropagation in the training loop's own terms, so that first-order and zeroth-order runs differ in nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from zo_opt.errors import ZOError
from zo_opt.optim.choices import CHOICES, Method
from zo_opt.optim.counting import CountingOptimizer, check_closure, check_finite
from zo_opt.optim.records import StepRecord
from zo_opt.queries.losses import taken

FORWARDS_PER_STEP = 3  # a forward pass, and a backward pass that costs as much as two


class Backpropagation(CountingOptimizer, AdamW):
    """AdamW (arXiv 1711.05101) on clipped gradients. A step counts as three forward passes.

    A loss or gradient that is not finite never reaches the weights: the step is dropped and counted.

    Args:
        params: parameters or groups of ``torch.optim``; those without a gradient are left alone.
        lr: learning rate, in parameter units a step.
        beta1, beta2: decay of the first and second moments.
        weight_decay: decoupled.
        max_grad_norm: bound on the norm of the whole gradient; 0 for none.
        steps_per_epoch: optimizer steps in an epoch.
        max_failed_steps: so many dropped steps in a row raise :class:`~zo_opt.errors.NonFiniteLossError`.

    Raises:
        ZOError: a trainable that is not finite, or a negative bound.

    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = Backpropagation([theta], lr=0.1)
    >>> for _ in range(100):
    ...     loss = optimizer.step(lambda batch: (theta - batch).square().sum(), torch.tensor(1.0))
    >>> bool((theta - 1).abs().max() < 0.1), optimizer.history.forwards
    (True, 300)
    """

    method: Method = Method(
        "adamw", fixes=frozenset(CHOICES) - {"lr", "weight_decay"}, own=("beta1", "beta2", "max_grad_norm")
    )

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        steps_per_epoch: int = 1,
        max_failed_steps: int = 10,
    ) -> None:
        if not max_grad_norm >= 0:
            raise ZOError(f"max_grad_norm={max_grad_norm} is not possible; give 0 for no bound, or a positive number.")
        super().__init__(params, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)
        # A learning-rate scheduler warns unless AdamW stepped before it, which it does not if the first step is dropped.
        self._opt_called = True
        check_finite(self._parameters())
        self.max_grad_norm = max_grad_norm
        self.start_counting(steps_per_epoch, max_failed_steps)

    def step(self, closure: Callable[..., Tensor] | None = None, batch: Any = None) -> Tensor:  # type: ignore[override]
        """One step on one batch; gradients stay in ``.grad`` until ``zero_grad``.

        Returns:
            The loss, without gradient.

        Raises:
            ZOError: no closure.
            NonFiniteLossError: as said of ``max_failed_steps``; the weights are untouched.
        """
        if closure is None:
            raise ZOError("step() was called without a closure; pass one that returns the loss.")
        check_closure(closure)
        self.zero_grad()
        with torch.enable_grad():
            loss = taken(closure(batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else "a number"
            raise ZOError(
                f"the closure returned {given}; return one loss (a scalar tensor), whose gradient is followed."
            )
        finite = bool(loss.isfinite())
        if finite and not loss.requires_grad:
            raise ZOError(
                "the closure returned a loss without a gradient; make it from the parameters by torch functions, outside of no_grad."
            )
        if finite:
            loss.backward()
            finite = self._clip()
        if finite:
            with torch.no_grad():
                # Without the hooks that torch puts around it once any AdamW is made: this step has them already.
                inspect.unwrap(AdamW.step)(self)
        self._record(float(loss.detach()), dropped=not finite)
        return loss.detach()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _clip(self) -> bool:
        """Bound the gradient; returns whether it is finite."""
        parameters = [p for p in self._parameters() if p.grad is not None]
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        return bool(torch.nn.utils.clip_grad_norm_(parameters, limit).isfinite())

    def _record(self, loss: float, *, dropped: bool) -> None:
        self.last_record = StepRecord(self.step_count, self.epoch, loss, 0, int(dropped), FORWARDS_PER_STEP, ())
        self.history.forwards += FORWARDS_PER_STEP
        self.step_count += 1
        self.dropped_queries += dropped
        if not dropped:
            self.failed_steps = 0
            return
        self.count_failure()
