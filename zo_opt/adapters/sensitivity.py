"""What AdaLoRA and AFLoRA share: scores from smoothed sensitivities, and the cubic schedule between warm-up and final phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.options import STEPS, option
from zo_opt.choices import Range
from zo_opt.errors import ZOError

SHARE = Range(above=0, below=1)


class Phases(NamedTuple):
    """Optimizer steps: t_i of warm-up, t_f of the final phase, T in all; steps count from 0."""

    warmup: int
    final: int
    total: int

    @property
    def end(self) -> int:
        """The step at which the final phase begins, T - t_f."""
        return self.total - self.final


def cubic(step: int, phases: Phases) -> float:
    """(1 - (t - t_i) / (T - t_i - t_f))^3: 1 in warm-up, 0 in the final phase (arXiv 2303.10512, equation 12).

    >>> [cubic(t, Phases(2, 4, 10)) for t in (0, 2, 4, 6, 9)]
    [1.0, 1.0, 0.125, 0.0, 0.0]
    """
    if step <= phases.warmup:
        return 1.0
    passed = (step - phases.warmup) / (phases.end - phases.warmup)
    return max(1 - passed, 0.0) ** 3


@dataclass(frozen=True)
class SensitivityConfig(AdapterConfig):
    """Options of a method that scores by sensitivities, between a warm-up and a final phase.

    [choice] An open warm-up takes an eighth of the steps and an open final phase half of them: about the shares in AdaLoRA's
    published settings for GLUE (arXiv 2303.10512, appendix).
    """

    beta1: float = option(0.85, "smoothing of sensitivities", SHARE, kw_only=True)
    beta2: float = option(0.85, "smoothing of their uncertainties", SHARE, kw_only=True)
    total_steps: int | None = option(None, "optimizer steps in all; set by the training loop", kw_only=True)
    warmup_steps: int | None = option(None, "steps before the first change; None: an eighth", STEPS, kw_only=True)
    final_steps: int | None = option(None, "last steps, in which nothing changes; None: half", STEPS, kw_only=True)

    def phases(self) -> Phases:
        """t_i, t_f and T.

        Raises:
            ZOError: ``total_steps`` is missing, or leaves nothing between warm-up and final phase.
        """
        total = self.total_steps
        if total is None:
            raise ZOError("this adapter changes over the steps of training; set total_steps in its configuration.")
        warmup = total // 8 if self.warmup_steps is None else self.warmup_steps
        final = total // 2 if self.final_steps is None else self.final_steps
        if warmup >= total - final:
            raise ZOError(
                f"total_steps={total} leaves no step between warmup_steps={warmup} and final_steps={final}; "
                "train for more steps or shorten these."
            )
        return Phases(warmup, final, total)


class Sensitivity:
    """Scores of entries: I = |w * dL/dw|; Ibar <- b1 Ibar + (1 - b1) I; U <- b2 U + (1 - b2) |I - Ibar|; s = Ibar * U.

    Source: arXiv 2303.10512, equations 8 to 11. Keeps two float32 tensors of each parameter's shape.

    Args:
        parameters: name -> the tensor; names are those of :meth:`state`.
        beta1, beta2: in (0, 1).
    """

    def __init__(self, parameters: Mapping[str, Tensor], beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self._parameters = dict(parameters)
        self._smoothed = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._uncertainty = {name: torch.zeros_like(p) for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the gradients of all parameters that require grad.

        Raises:
            ZOError: one of them has no gradient; nothing was changed.
        """
        gradients = {}
        for name, p in self._parameters.items():
            if p.requires_grad and p.grad is None:
                raise ZOError(
                    f"{name} has no gradient to score it by; call model.step(global_step) after optimizer.step() and before "
                    "zero_grad(), with a zeroth-order optimizer after optimizer.write_last_grad()."
                )
            if p.grad is not None:
                gradients[name] = p.grad
        for name, gradient in gradients.items():
            parameter = self._parameters[name]
            smoothed, uncertainty = self._on(parameter.device, name)
            sensitivity = (parameter * gradient).abs()
            smoothed.mul_(self.beta1).add_((1 - self.beta1) * sensitivity)
            uncertainty.mul_(self.beta2).add_((1 - self.beta2) * (sensitivity - smoothed).abs())

    def score(self, name: str) -> Tensor:
        """s = Ibar * U of a parameter's entries, in its shape."""
        return self._smoothed[name] * self._uncertainty[name]

    def state(self) -> dict[str, Tensor]:
        """Ibar and U by name."""
        return {f"{name}.smoothed": t for name, t in self._smoothed.items()} | {
            f"{name}.uncertainty": t for name, t in self._uncertainty.items()
        }

    def _on(self, device: torch.device, name: str) -> tuple[Tensor, Tensor]:
        """Ibar and U, moved to where the model may have gone."""
        for tensors in (self._smoothed, self._uncertainty):
            tensors[name] = tensors[name].to(device)
        return self._smoothed[name], self._uncertainty[name]
