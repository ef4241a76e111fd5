"""Update rules: gradient estimate -> new parameters. Pure elementwise functions, so that they work chunk by chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zo_opt.choices import Range, Table, check_numbers

DECAY = Range(least=0, below=1)


@dataclass(frozen=True)
class UpdateRule(ABC):
    """How a gradient estimate moves the parameters.

    Attributes:
        state_names: tensors of the parameter's shape that it keeps, zero at first.
        linear: whether the move is -lr * gradient and nothing else.
        exact_signs: whether +-1 directions give the same bits on every device: nothing but sums rounds.
        lr_is_a_length: whether lr is in parameter units a step, whatever the gradient's scale.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[bool] = False
    exact_signs: ClassVar[bool] = False
    lr_is_a_length: ClassVar[bool] = False

    @abstractmethod
    def apply(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        """Update a flat chunk of a parameter and of its state in place; ``step`` counts updates from 1."""


@dataclass(frozen=True)
class SGD(UpdateRule):
    """theta <- theta - lr * g (arXiv 2305.17333, algorithm 1).

    Use it where a journal must replay to the bit, and where memory is short: it keeps nothing.
    """

    linear: ClassVar[bool] = True
    exact_signs: ClassVar[bool] = True

    def apply(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        parameter.sub_(gradient, alpha=lr)


@dataclass(frozen=True)
class Adam(UpdateRule):
    """m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  theta <- theta - lr * m^ / (sqrt(v^) + eps), with bias correction.

    Use it where trained numbers have gradients of different scale; its lr is the length of a step.

    Source: Kingma & Ba, arXiv 1412.6980, algorithm 1, on the zeroth-order estimate g.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    lr_is_a_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(DECAY, beta1=self.beta1, beta2=self.beta2)
        check_numbers(Range(above=0), eps=self.eps)

    def apply(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(gradient, 1 - self.beta1)
        v.lerp_(gradient.square(), 1 - self.beta2)
        m_hat, v_hat = m / (1 - self.beta1**step), v / (1 - self.beta2**step)
        parameter.sub_(m_hat / (v_hat.sqrt() + self.eps), alpha=lr)


@dataclass(frozen=True)
class Sign(UpdateRule):
    """theta <- theta - lr * sign(g): every entry moves by lr.

    Use it where nothing should be kept and lr should be the length of a step.

    Source: ZO-SGD-Sign, Liu et al., ICLR 2019; in ZO-Bench, arXiv 2402.11592.
    """

    exact_signs: ClassVar[bool] = True
    lr_is_a_length: ClassVar[bool] = True

    def apply(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        parameter.sub_(gradient.sign(), alpha=lr)


@dataclass(frozen=True)
class Momentum(UpdateRule):
    """m <- beta m + g;  theta <- theta - lr * m.

    Use it to average noisy estimates over about 1 / (1 - beta) steps.

    Source: ZO-SGD-MMT in ZO-Bench, arXiv 2402.11592. [choice] ``torch.optim.SGD``'s convention (no damping), where the step in
    the long run is lr / (1 - beta) of a gradient.
    """

    beta: float = 0.9
    state_names: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        check_numbers(DECAY, beta=self.beta)

    def apply(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        parameter.sub_(state["momentum"].mul_(self.beta).add_(gradient), alpha=lr)


@dataclass(frozen=True)
class AMSGrad(UpdateRule):
    """m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  w <- max(w, v);  theta <- theta - lr * m / (sqrt(w) + eps).

    Use it for comparison with ZO-AdaMM.

    Source: ZO-AdaMM, Chen et al., arXiv 1910.06513, algorithm 1: no bias correction; eps keeps a zero estimate finite.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    lr_is_a_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(DECAY, beta1=self.beta1, beta2=self.beta2)
        check_numbers(Range(above=0), eps=self.eps)

    def apply(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        m, v, w = state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"]
        m.lerp_(gradient, 1 - self.beta1)
        v.lerp_(gradient.square(), 1 - self.beta2)
        w.copy_(w.maximum(v))
        parameter.sub_(m / (w.sqrt() + self.eps), alpha=lr)


UPDATE_RULES: Table[UpdateRule] = Table(
    "update_rule", UpdateRule, {"sgd": SGD, "adam": Adam, "sign": Sign, "momentum": Momentum, "amsgrad": AMSGrad}
)
