"""What AdaLoRA and AFLoRA share: scores from smoothed sensitivities, and the cubic schedule between warm-up and final phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from zo_opt.errors import ZOError


class Phases(NamedTuple):
    """Optimizer steps: t_i of warm-up, t_f of the final phase, T in all; steps count from 0."""

    warmup: int
    final: int
    total: int

    @property
    def end(self) -> int:
        """The step at which the final phase begins, T - t_f."""
        return self.total - self.final


def make_phases(warmup: int | None, final: int | None, total: int | None) -> Phases:
    """Phases with what is left open filled in.

    [choice] An open warm-up takes an eighth of the steps and an open final phase half of them: about the shares in AdaLoRA's
    published settings for GLUE (arXiv 2303.10512, appendix).

    Raises:
        ZOError: the number of steps is missing, or leaves nothing between warm-up and final phase.

    >>> make_phases(None, None, 80)
    Phases(warmup=10, final=40, total=80)
    """
    if total is None:
        raise ZOError("this adapter changes over the steps of training; set total_steps in its configuration.")
    phases = Phases(total // 8 if warmup is None else warmup, total // 2 if final is None else final, total)
    if phases.warmup >= phases.end:
        raise ZOError(
            f"total_steps={total} leaves no step between warmup_steps={phases.warmup} and final_steps={phases.final}; "
            "train for more steps or shorten these."
        )
    return phases


def cubic(step: int, phases: Phases) -> float:
    """(1 - (t - t_i) / (T - t_i - t_f))^3: 1 in warm-up, 0 in the final phase (arXiv 2303.10512, equation 12).

    >>> [cubic(t, Phases(2, 4, 10)) for t in (0, 2, 4, 6, 9)]
    [1.0, 1.0, 0.125, 0.0, 0.0]
    """
    if step <= phases.warmup:
        return 1.0
    passed = (step - phases.warmup) / (phases.end - phases.warmup)
    return max(1 - passed, 0.0) ** 3


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


def check_beta(name: str, value: object) -> None:
    """Whether a smoothing factor is in (0, 1).

    Raises:
        ZOError: it is not.
    """
    if not isinstance(value, float) or not 0 < value < 1:
        raise ZOError(f"{name}={value!r} is not possible; give a number above 0 and below 1.")


def check_steps(name: str, value: object, least: int = 0) -> None:
    """Whether an option is a number of steps, or left open.

    Raises:
        ZOError: it is not.
    """
    if value is not None and (type(value) is not int or value < least):
        raise ZOError(f"{name}={value!r} is not possible; give a whole number of at least {least}, or None.")
