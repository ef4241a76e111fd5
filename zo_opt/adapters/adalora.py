"""AdaLoRA: a low-rank update in the form of an SVD whose ranks are allocated while training (arXiv 2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.adapted import AdaptedModule, Delta, Draw, ParallelAdapter, numbers
from zo_opt.adapters.options import SEED, option
from zo_opt.adapters.schedule import AdapterSchedule
from zo_opt.adapters.sensitivity import Phases, Sensitivity, SensitivityConfig, cubic
from zo_opt.adapters.targets import ATTENTION, Target
from zo_opt.choices import Range
from zo_opt.errors import ZOError

if TYPE_CHECKING:
    from zo_opt.adapters.model import AdapterModel


@dataclass(frozen=True)
class AdaLoRAConfig(SensitivityConfig):
    """h = W0 x + alpha / (rank + 1e-5) P diag(Lambda) Q x, whose ranks fall from ``rank`` to ``target_rank`` on average.

    Use it by backpropagation for long runs, where ranks should go to the layers that need them.

    P (out, rank) and Q (rank, in) start Gaussian with standard deviation 0.02 and Lambda at zero [code]: an exact identity. Triplet i
    is (P_:i, lambda_i, Q_i:). After every optimizer step triplets are scored by their smoothed sensitivity; every ``interval`` steps
    between warm-up and final phase the lambdas of the lowest ones are set to zero, so many that a cubic budget is kept. They
    train on and may come back. In the final phase those that are zero stay zero, to the bit.

    The loss has gamma * mean over all P and Q of ||P^T P - I||_F and ||Q Q^T - I||_F added [code], with ``squared_penalty`` their squares
    (equation 4).
    [choice] gamma = 0.1 as in the authors' code; PEFT's default is 0.5. [code] The scaling divides by the initial rank at all times.

    Call ``model.step(global_step)`` after every ``optimizer.step()`` and before ``zero_grad()``. With warm-up and final phase left
    open, see :class:`~zo_opt.adapters.sensitivity.SensitivityConfig`. Linear layers only, as in PEFT.

    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> config = AdaLoRAConfig(
    ...     rank=4, target_rank=2, total_steps=8, warmup_steps=1, final_steps=2, target_modules=["0", "1"]
    ... )
    >>> model = get_adapter_model(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), config)
    >>> adamw = torch.optim.AdamW(trainable_parameters(model), lr=0.1)
    >>> x, y = torch.eye(6), torch.arange(18.0).view(6, 3)
    >>> for step in range(8):
    ...     loss = (model(x) - y).square().mean() + model.penalty()
    ...     loss.backward()
    ...     adamw.step()
    ...     model.step(step)
    ...     adamw.zero_grad()
    >>> sum(int((m.adapter.lora_E != 0).sum()) for m in model.adapted_modules().values())
    4
    """

    default_targets: ClassVar[Mapping[str, Sequence[str]]] = ATTENTION

    rank: int = option(12, "initial rank of every matrix")
    target_rank: int = option(8, "rank at the end, on average over the matrices")
    alpha: float = option(16.0, "the update is multiplied by alpha / rank")
    interval: int = option(1, "steps between prunings")
    orthogonality: float = option(0.1, "gamma, weight of the penalty on P and Q; 0: none", Range(least=0))
    squared_penalty: bool = option(False, "squared norms in the penalty, as in the paper")
    seed: int = option(0, "of the initial P and Q", SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_rank > self.rank:
            raise ZOError(
                f"target_rank={self.target_rank} is above rank={self.rank}, and ranks only fall; give a smaller one."
            )

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        return ParallelAdapter(target.module, AdaLoRA(self, target, number))

    def penalty(self, model: AdapterModel) -> Tensor | None:
        if self.orthogonality == 0:
            return None
        power = 2 if self.squared_penalty else 1
        norms = [norm**power for adapter in _adapters(model.adapted_modules()).values() for norm in adapter.distances()]
        return self.orthogonality * torch.stack(norms).mean() if norms else None

    def schedule(self, model: AdapterModel) -> AdaLoRASchedule:
        trained = sum(p.numel() for p in model.wrapped.parameters() if p.requires_grad)
        return AdaLoRASchedule(self, _adapters(model.adapted_modules()), trained)


class AdaLoRA(Delta):
    """alpha / (ranknum + 1e-5) * P diag(Lambda) Q x, float32; Q is ``lora_A``, Lambda ``lora_E``, P ``lora_B``, as in PEFT."""

    def __init__(self, config: AdaLoRAConfig, target: Target, number: int) -> None:
        super().__init__()
        rank, draw = config.rank_of(target.name), Draw(target.device, config.seed_of(number))
        self.alpha = config.alpha
        self.lora_A = nn.Parameter(0.02 * draw.normal(rank, target.in_features))
        self.lora_E = numbers(target.device, rank, 1)
        self.lora_B = nn.Parameter(0.02 * draw.normal(target.out_features, rank))
        self.ranknum = numbers(target.device, 1, value=rank, trained=False)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A) * (self.lora_E.view(-1) * self._scaling())
        return F.linear(low, self.lora_B)

    def dense(self) -> Tensor:
        return (self.lora_A * self.lora_E).T @ self.lora_B.T * self._scaling()

    def distances(self) -> tuple[Tensor, Tensor]:
        """How far P and Q are from orthonormal: ||P^T P - I||_F, ||Q Q^T - I||_F."""
        identity = torch.eye(len(self.lora_A), device=self.lora_A.device)
        p_RR, q_RR = self.lora_B.T @ self.lora_B, self.lora_A @ self.lora_A.T
        return torch.linalg.matrix_norm(p_RR - identity), torch.linalg.matrix_norm(q_RR - identity)

    def _scaling(self) -> Tensor:
        return self.alpha / (self.ranknum + 1e-5)

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_A)}, alpha={self.alpha:g}"


class AdaLoRASchedule(AdapterSchedule):
    """Scores the triplets after every step and zeroes the lambdas of the lowest ones (arXiv 2303.10512, algorithm 1).

    Attributes:
        kept: path of the adapted module -> (rank,) bool, the triplets that were not zeroed the last time.
    """

    needs_grad: ClassVar[bool] = True

    def __init__(self, config: AdaLoRAConfig, adapters: dict[str, AdaLoRA], trained: int) -> None:
        self._config, self._adapters, self._trained = config, adapters, trained
        self._initial = sum(len(a.lora_E) for a in adapters.values())
        self._target = min(config.target_rank * len(adapters), self._initial)
        named = {f"{m}.{n}": p for m, a in adapters.items() for n, p in a.named_parameters() if p.requires_grad}
        self._sensitivity = Sensitivity(named, config.beta1, config.beta2)
        self.kept = {
            name: torch.ones(len(a.lora_E), dtype=torch.bool, device=a.lora_E.device) for name, a in adapters.items()
        }
        self._fixed = torch.zeros((), dtype=torch.bool)

    def budget(self, global_step: int) -> int:
        """b(t): how many triplets may be other than zero after this step."""
        return budget(global_step, self._initial, self._target, self._config.phases())

    def step(self, global_step: int) -> None:
        phases = self._config.phases()
        if global_step < phases.end:
            self._sensitivity.update()
            if global_step > phases.warmup and global_step % self._config.interval == 0:
                self._allocate(self.budget(global_step))
            return
        if not self._fixed:
            self._allocate(self._target)
            self._fixed.fill_(True)
        self._zero()  # what momentum has moved since

    def state(self) -> dict[str, Tensor]:
        kept = {f"{name}.kept": mask for name, mask in self.kept.items()}
        return self._sensitivity.state() | kept | {"fixed": self._fixed}

    def moving(self) -> int | None:
        """In the final phase without the pruned triplets, whose P and Q no longer have an effect."""
        if not self._fixed:
            return None
        pruned = ((int((~self.kept[n]).sum()), a) for n, a in self._adapters.items())
        return self._trained - sum(count * (len(a.lora_B) + a.lora_A.shape[1] + 1) for count, a in pruned)

    def _allocate(self, kept: int) -> None:
        score = self._sensitivity.score
        scores = [
            triplet_scores(score(f"{n}.lora_E"), score(f"{n}.lora_B"), score(f"{n}.lora_A")) for n in self._adapters
        ]
        for name, mask in zip(self._adapters, keep(scores, kept), strict=True):
            self.kept[name] = mask
        self._zero()

    def _zero(self) -> None:
        for name, adapter in self._adapters.items():
            adapter.lora_E.masked_fill_(~self.kept[name].to(adapter.lora_E.device)[:, None], 0.0)


def _adapters(adapted: Mapping[str, AdaptedModule]) -> dict[str, AdaLoRA]:
    """Modules of ``modules_to_tensorize`` are no part of it."""
    return {name: m.adapter for name, m in adapted.items() if isinstance(m.adapter, AdaLoRA)}


def budget(step: int, initial: int, target: int, phases: Phases) -> int:
    """b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3 in triplets, rounded down (arXiv 2303.10512, equation 12).

    Args:
        step: t, from 0.
        initial, target: b_0 and b_T, triplets of all matrices together.

    >>> [budget(t, 24, 16, Phases(2, 4, 10)) for t in range(10)]
    [24, 24, 24, 19, 17, 16, 16, 16, 16, 16]
    """
    return int((initial - target) * cubic(step, phases) + target)


def triplet_scores(s_lambda_R1: Tensor, s_P_OR: Tensor, s_Q_RI: Tensor) -> Tensor:
    """S_i = s(lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij) (equation 7): (r,) from the entries' scores."""
    return s_lambda_R1.view(-1) + (s_Q_RI.mean(dim=1) + s_P_OR.mean(dim=0))


def keep(scores: Sequence[Tensor], kept: int) -> list[Tensor]:
    """Which triplets stay: those whose score is above that of the best one that has to go.

    [code] Triplets that share this score go with it, so that fewer than ``kept`` may stay.

    Args:
        scores: (r,) of each matrix.
        kept: how many may stay in all matrices together.

    Returns:
        (r,) bool for each matrix.

    >>> [m.tolist() for m in keep([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.5])], 2)]
    [[True, False], [True, False]]
    """
    together = torch.cat([s.cpu() for s in scores])
    gone = len(together) - kept
    if gone <= 0:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    threshold = float(together.kthvalue(gone).values)
    return [s > threshold for s in scores]
