"""AFLoRA: low-rank factors that are frozen one after the other, vectors that stay trained (arXiv 2403.13269)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.adapted import Delta, Draw, ParallelAdapter, numbers
from zo_opt.adapters.options import SEED, option
from zo_opt.adapters.schedule import AdapterSchedule
from zo_opt.adapters.sensitivity import Sensitivity, SensitivityConfig, cubic
from zo_opt.adapters.targets import ATTENTION, Target

if TYPE_CHECKING:
    from zo_opt.adapters.model import AdapterModel


@dataclass(frozen=True)
class AFLoRAConfig(SensitivityConfig):
    """h = W0 x + diag(b) B diag(d) A x (arXiv 2403.13269), A (rank, in), B (out, rank), d (rank,), b (out,), all trained at first.

    Use it by backpropagation, for comparison; few numbers move in the end.

    After every optimizer step each A and each B has a freezing score, the mean over its entries of AdaLoRA's s = Ibar * U
    (:class:`~zo_opt.adapters.sensitivity.Sensitivity`). From warm-up to final phase the share 1 - (1 - (t - t_i) / (T - t_i - t_f))^3 of all these
    matrices is frozen, lowest scores first; a frozen one stays frozen. In the final phase d and b alone are trained.

    [choice] A and B start Kaiming-uniform, in +-1 / sqrt(columns); d starts at ``d_initial`` and b at zero, as in VeRA: an exact identity.
    [choice] A and B of all layers are ranked together, and the phases left open are AdaLoRA's. Call ``model.step(global_step)`` after
    every ``optimizer.step()`` and before ``zero_grad()``. It merges into the weights. Linear layers only.

    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> model = get_adapter_model(nn.Sequential(nn.Linear(64, 32)), AFLoRAConfig(rank=4, target_modules=["0"]))
    >>> [tuple(p.shape) for p in trainable_parameters(model)]
    [(4, 64), (32, 4), (4,), (32,)]
    """

    default_targets: ClassVar[Mapping[str, Sequence[str]]] = ATTENTION

    rank: int = option(4, "rank of the weight's update")
    d_initial: float = option(0.1, "initial value of d")
    seed: int = option(0, "of the initial A and B", SEED)

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        return ParallelAdapter(target.module, AFLoRA(self, target, number))

    def schedule(self, model: AdapterModel) -> AFLoRASchedule:
        adapters = {n: m.adapter for n, m in model.adapted_modules().items() if isinstance(m.adapter, AFLoRA)}
        matrices = {f"{n}.{which}": getattr(a, which) for n, a in adapters.items() for which in ("lora_A", "lora_B")}
        trained = sum(p.numel() for p in model.wrapped.parameters() if p.requires_grad)
        return AFLoRASchedule(self, matrices, trained)


class AFLoRA(Delta):
    """diag(b) B diag(d) A x, float32; A is ``lora_A``, B ``lora_B``, d ``lambda_d``, b ``lambda_b``."""

    def __init__(self, config: AFLoRAConfig, target: Target, number: int) -> None:
        super().__init__()
        rank, inputs, outputs = config.rank_of(target.name), target.in_features, target.out_features
        draw = Draw(target.device, config.seed_of(number))
        self.lora_A = nn.Parameter(draw.uniform(rank, inputs) / math.sqrt(inputs))
        self.lora_B = nn.Parameter(draw.uniform(outputs, rank) / math.sqrt(rank))
        self.lambda_d = numbers(target.device, rank, value=config.d_initial)
        self.lambda_b = numbers(target.device, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A) * self.lambda_d, self.lora_B) * self.lambda_b

    def dense(self) -> Tensor:
        return (self.lora_A.T * self.lambda_d) @ (self.lora_B.T * self.lambda_b)

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_A)}"


class AFLoRASchedule(AdapterSchedule):
    """Scores every A and B after each step and freezes the lowest ones. A frozen matrix no longer requires grad: no optimizer touches it.

    Args:
        config: betas and phases.
        matrices: path -> A or B.
        trained: parameters that are trained at the start, these included.
    """

    needs_grad: ClassVar[bool] = True

    def __init__(self, config: AFLoRAConfig, matrices: dict[str, nn.Parameter], trained: int) -> None:
        self._config, self._matrices, self._trained = config, matrices, trained
        self._sensitivity = Sensitivity(matrices, config.beta1, config.beta2)
        self._frozen = torch.zeros(len(matrices), dtype=torch.bool)

    def share(self, global_step: int) -> float:
        """How much of all matrices is frozen after this step."""
        return 1 - cubic(global_step, self._config.phases())

    def step(self, global_step: int) -> None:
        if self._frozen.all():
            return
        if global_step < self._config.phases().end:
            self._sensitivity.update()
        count = int(self.share(global_step) * len(self._matrices)) - int(self._frozen.sum())
        if count > 0:
            scores = torch.stack([self._sensitivity.score(name).mean().cpu() for name in self._matrices])
            lowest = scores.masked_fill(self._frozen, torch.inf).argsort(stable=True)[:count]
            self._frozen[lowest] = True
            self._apply()

    def moving(self) -> int:
        return self._trained - sum(m.numel() for m in self._matrices.values() if not m.requires_grad)

    def state(self) -> dict[str, Tensor]:
        return self._sensitivity.state() | {"frozen": self._frozen}

    def restored(self) -> None:
        self._apply()

    def _apply(self) -> None:
        for matrix, frozen in zip(self._matrices.values(), self._frozen.tolist(), strict=True):
            matrix.requires_grad_(not frozen)
            if frozen:
                matrix.grad = None
