"""Update rules: gradient estimate -> new parameters. Pure elementwise functions, so that they work chunk by chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from zo_opt.errors import ZOError


class UpdateRule(ABC):
    """How a gradient estimate moves the parameters. ``state_names`` are tensors of the parameter's shape, zero at first."""

    state_names: tuple[str, ...] = ()

    @abstractmethod
    def apply(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        """Update a flat chunk of a parameter and of its state in place; ``step`` counts updates from 1."""


@dataclass(frozen=True)
class SGD(UpdateRule):
    """theta <- theta - lr * g (arXiv 2305.17333, algorithm 1)."""

    def apply(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        parameter.sub_(gradient.to(parameter.dtype), alpha=lr)


@dataclass(frozen=True)
class Adam(UpdateRule):
    """m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  theta <- theta - lr * m^ / (sqrt(v^) + eps), with bias correction.

    Source: Kingma & Ba, arXiv 1412.6980, algorithm 1, on the zeroth-order estimate g.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    state_names = ("exp_avg", "exp_avg_sq")

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ZOError(f"{name}={getattr(self, name)} is outside [0, 1); give a decay such as 0.9.")

    def apply(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(gradient, 1 - self.beta1)
        v.lerp_(gradient.square(), 1 - self.beta2)
        m_hat, v_hat = m / (1 - self.beta1**step), v / (1 - self.beta2**step)
        parameter.sub_((m_hat / (v_hat.sqrt() + self.eps)).to(parameter.dtype), alpha=lr)


UPDATE_RULES: dict[str, type[UpdateRule]] = {"sgd": SGD, "adam": Adam}
