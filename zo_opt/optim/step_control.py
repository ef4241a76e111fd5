"""Step-size control: functions of a step's projected gradients, applied before the update rule. They compose in a tuple."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zo_opt.choices import Range, Table, check_numbers
from zo_opt.errors import ZOError


@dataclass(frozen=True)
class StepControl(ABC):
    """Maps the finite projected gradients of one step, float64 (queries,), to those that the update uses. Options are its fields.

    Attributes:
        least: how many it needs; a step that is left with fewer, for losses that were not finite, has failed.
        lr_is_a_length: whether it makes lr a length in parameter units, whatever the gradient's scale.
    """

    least: ClassVar[int] = 1
    lr_is_a_length: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, projected_grads: Tensor, memory: dict[str, float]) -> Tensor:
        """The controlled projected gradients, same shape; ``memory`` holds plain numbers that survive from step to step, and a restart."""


@dataclass(frozen=True)
class ClipProjectedGrads(StepControl):
    """Clip at ``factor`` times the running root mean square of past projected gradients.

    Use it where single queries are far off, as on noisy batches.

    [choice] One example with a huge loss difference (a query is one noisy scalar) must not decide a step. The
    running square is an exponential average with ``decay`` a step, seeded by the first step.

    >>> clip, memory = ClipProjectedGrads(factor=2.0), {}
    >>> clip(torch.tensor([1.0, -1.0], dtype=torch.float64), memory).tolist()
    [1.0, -1.0]
    >>> clip(torch.tensor([0.5, 100.0], dtype=torch.float64), memory).tolist()
    [0.5, 2.0]
    """

    factor: float = 3.0
    decay: float = 0.95

    def __post_init__(self) -> None:
        check_numbers(Range(above=0), factor=self.factor)
        check_numbers(Range(least=0, below=1), decay=self.decay)

    def __call__(self, projected_grads: Tensor, memory: dict[str, float]) -> Tensor:
        mean_square = memory.get("mean_square")
        if not mean_square:  # the first step, or none so far told the two sides apart
            mean_square = float(projected_grads.square().mean())
        limit = self.factor * mean_square**0.5
        clipped = projected_grads.clamp(-limit, limit)
        memory["mean_square"] = self.decay * mean_square + (1 - self.decay) * float(clipped.square().mean())
        return clipped


@dataclass(frozen=True)
class DivideBySpread(StepControl):
    """Divide by the standard deviation of the step's own projected gradients: FZOO's sigma, GRZO's std(d).

    Use it where lr should not depend on the scale of the loss, as FZOO and GRZO do.

    Source: arXiv 2506.09034 and arXiv 2606.02857. FZOO's lr / (N sigma) * sum (l_i - l_0) z_i with sigma = std(l_i) is this on
    one-sided differences: zo_eps cancels. [choice] The sample deviation (N - 1);
    equal differences, whose spread is a rounding error, move nothing.

    Raises:
        ZOError: there is one query only.

    >>> DivideBySpread()(torch.tensor([1.0, 3.0], dtype=torch.float64), {}).tolist()
    [0.7071067811865475, 2.1213203435596424]
    """

    least: ClassVar[int] = 2
    lr_is_a_length: ClassVar[bool] = True

    def __call__(self, projected_grads: Tensor, memory: dict[str, float]) -> Tensor:
        if len(projected_grads) < 2:
            raise ZOError(
                "dividing by the spread needs at least two finite queries in a step; raise the query schedule."
            )
        spread = projected_grads.std()
        if spread <= 1e-6 * projected_grads.abs().max():
            return torch.zeros_like(projected_grads)
        return projected_grads / spread


STEP_CONTROLS: Table[StepControl] = Table(
    "step_control",
    StepControl,
    {"clip": ClipProjectedGrads, "divide-by-spread": DivideBySpread},
)
