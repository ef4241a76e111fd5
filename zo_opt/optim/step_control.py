"""Step-size control: functions of a step's projected gradients, applied before the update rule. They compose in a tuple."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from zo_opt.errors import ZOError


class StepControl(ABC):
    """Maps the finite projected gradients of one step, float64 (queries,), to those that the update uses.

    Attributes:
        least: how many it needs; a step that is left with fewer, for losses that were not finite, has failed.
    """

    least = 1

    @abstractmethod
    def __call__(self, projected_grads: Tensor) -> Tensor:
        """The controlled projected gradients, same shape."""

    def prepare(self, lr: float, trainables: int) -> None:  # noqa: B027 (most have nothing to prepare)
        """Told before each step: the (largest) learning rate and the number of trainable entries."""

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


class DivideBySpread(StepControl):
    """Divide by the standard deviation of the step's own projected gradients: FZOO's sigma, GRZO's std(d).

    Source: arXiv 2506.09034 and arXiv 2606.02857. FZOO's lr / (N sigma) * sum (l_i - l_0) z_i with sigma = std(l_i) is this on
    one-sided differences: zo_eps cancels. [choice] The sample deviation (N - 1);
    equal differences, whose spread is a rounding error, move nothing.

    Raises:
        ZOError: there is one query only.

    >>> DivideBySpread()(torch.tensor([1.0, 3.0], dtype=torch.float64)).tolist()
    [0.7071067811865475, 2.1213203435596424]
    """

    least = 2

    def __call__(self, projected_grads: Tensor) -> Tensor:
        if len(projected_grads) < 2:
            raise ZOError(
                "dividing by the spread needs at least two finite queries in a step; raise the query schedule."
            )
        spread = projected_grads.std()
        if spread <= 1e-6 * projected_grads.abs().max():
            return torch.zeros_like(projected_grads)
        return projected_grads / spread


class TrustRegion(StepControl):
    """Shrink the step so that plain SGD moves the trainables no further than ``radius`` (Euclidean, in parameter units).

    [choice] The length is lr * ||mean_q g_q z_q||, for directions with d entries of unit variance that are orthogonal in the
    mean: lr * sqrt(d * sum_q g_q^2) / Q.

    >>> region = TrustRegion(radius=0.1)
    >>> region.prepare(lr=0.1, trainables=4)
    >>> region(torch.tensor([5.0], dtype=torch.float64)).tolist()
    [0.5]
    """

    def __init__(self, radius: float) -> None:
        if not radius > 0:
            raise ZOError(f"radius={radius} is not possible; give the largest step length, above 0.")
        self.radius = radius
        self._lr, self._trainables = 1.0, 1

    def prepare(self, lr: float, trainables: int) -> None:
        self._lr, self._trainables = lr, trainables

    def __call__(self, projected_grads: Tensor) -> Tensor:
        mean = projected_grads.square().sum().sqrt() / len(projected_grads)
        length = self._lr * self._trainables**0.5 * float(mean)
        return projected_grads * min(1.0, self.radius / length) if length > 0 else projected_grads
