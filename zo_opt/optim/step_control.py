"""Step-size control: functions of a step's projected gradients, applied before the update rule. They compose in a tuple."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from zo_opt.errors import ZOError


class StepControl(ABC):
    """Maps the finite projected gradients of one step, float64 (queries,), to those that the update uses."""

    @abstractmethod
    def __call__(self, projected_grads: Tensor) -> Tensor:
        """The controlled projected gradients, same shape."""

    def state_dict(self) -> dict[str, float]:
        """What must survive a restart, as plain numbers."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take back what ``state_dict`` gave."""
        del state


class ClipProjectedGrads(StepControl):
    """Clip at ``factor`` times the running root mean square of past projected gradients.

    [choice] One example with a huge loss difference (a query is one noisy scalar) must not decide a step. The
    running square is an exponential average with ``decay`` a step, seeded by the first step.

    >>> clip = ClipProjectedGrads(factor=2.0)
    >>> clip(torch.tensor([1.0, -1.0], dtype=torch.float64)).tolist()
    [1.0, -1.0]
    >>> clip(torch.tensor([0.5, 100.0], dtype=torch.float64)).tolist()
    [0.5, 2.0]
    """

    def __init__(self, factor: float = 3.0, decay: float = 0.95) -> None:
        if factor <= 0 or not 0 <= decay < 1:
            raise ZOError(f"clipping needs factor > 0 and decay in [0, 1); got {factor} and {decay}.")
        self.factor, self.decay = factor, decay
        self._mean_square: float | None = None

    def __call__(self, projected_grads: Tensor) -> Tensor:
        if not self._mean_square:  # the first step, or none so far told the two sides apart
            self._mean_square = float(projected_grads.square().mean())
        limit = self.factor * self._mean_square**0.5
        clipped = projected_grads.clamp(-limit, limit)
        self._mean_square = self.decay * self._mean_square + (1 - self.decay) * float(clipped.square().mean())
        return clipped

    def state_dict(self) -> dict[str, float]:
        return {} if self._mean_square is None else {"mean_square": self._mean_square}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._mean_square = state.get("mean_square")


class NormalizeProjectedGrads(StepControl):
    """Divide by the root mean square of the step's own projected gradients (as FZOO and GRZO divide by a spread).

    >>> NormalizeProjectedGrads()(torch.tensor([3.0, -3.0], dtype=torch.float64)).tolist()
    [1.0, -1.0]
    """

    def __call__(self, projected_grads: Tensor) -> Tensor:
        rms = projected_grads.square().mean().sqrt()
        return projected_grads / rms.clamp(min=torch.finfo(torch.float64).tiny)
