"""AdaLoRA: a low-rank update in the form of an SVD whose ranks are allocated while training (arXiv 2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.adalora_allocator import budget, keep, triplet_scores
from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.config import AdapterConfig, check_positive, register
from zo_opt.adapters.parallel import Delta, ParallelAdapter
from zo_opt.adapters.schedule import AdapterSchedule
from zo_opt.adapters.sensitivity import Phases, Sensitivity, check_beta, check_steps, make_phases
from zo_opt.adapters.targets import ATTENTION, Target
from zo_opt.errors import ZOError

if TYPE_CHECKING:
    from zo_opt.adapters.model import AdapterModel


@register
@dataclass
class AdaLoRAConfig(AdapterConfig):
    """h = W0 x + alpha / (rank + 1e-5) P diag(Lambda) Q x, whose ranks fall from ``rank`` to ``target_rank`` on average.

    P (out, rank) and Q (rank, in) start Gaussian with standard deviation 0.02 and Lambda at zero [code]: an exact identity. Triplet i
    is (P_:i, lambda_i, Q_i:). After every optimizer step triplets are scored by their smoothed sensitivity; every ``interval`` steps
    between warm-up and final phase the lambdas of the lowest ones are set to zero, so many that a cubic budget is kept. They
    train on and may come back. In the final phase those that are zero stay zero, to the bit.

    The loss has gamma * mean over all P and Q of ||P^T P - I||_F and ||Q Q^T - I||_F added [code], with ``squared_penalty`` their squares (equation 4).
    [choice] gamma = 0.1 as in the authors' code; PEFT's default is 0.5. [code] The scaling divides by the initial rank at all times.

    Call ``model.step(global_step)`` after every ``optimizer.step()`` and before ``zero_grad()``. With warm-up and final phase left
    open, see :func:`~zo_opt.adapters.sensitivity.make_phases`. Linear layers only, as in PEFT.

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

    adapter_type: ClassVar[str] = "adalora"

    rank: int = field(default=12, metadata={"help": "initial rank of every matrix"})
    target_rank: int = field(default=8, metadata={"help": "rank at the end, on average over the matrices"})
    alpha: float = field(default=16.0, metadata={"help": "the update is multiplied by alpha / rank"})
    beta1: float = field(default=0.85, metadata={"help": "smoothing of sensitivities"})
    beta2: float = field(default=0.85, metadata={"help": "smoothing of their uncertainties"})
    total_steps: int | None = field(default=None, metadata={"help": "optimizer steps in all; set by the training loop"})
    warmup_steps: int | None = field(default=None, metadata={"help": "steps before the first pruning; None: an eighth"})
    final_steps: int | None = field(default=None, metadata={"help": "last steps, with fixed ranks; None: half"})
    interval: int = field(default=1, metadata={"help": "steps between prunings"})
    orthogonality: float = field(default=0.1, metadata={"help": "gamma, weight of the penalty on P and Q; 0: none"})
    squared_penalty: bool = field(default=False, metadata={"help": "squared norms in the penalty, as in the paper"})
    seed: int = field(default=0, metadata={"help": "of the initial P and Q"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("rank", "target_rank", "interval")
        self.check_seed()
        check_positive("alpha", self.alpha)
        check_beta("beta1", self.beta1)
        check_beta("beta2", self.beta2)
        check_steps("total_steps", self.total_steps, 1)
        check_steps("warmup_steps", self.warmup_steps)
        check_steps("final_steps", self.final_steps)
        if self.orthogonality != 0:
            check_positive("orthogonality", self.orthogonality)
        if self.target_rank > self.rank:
            raise ZOError(
                f"target_rank={self.target_rank} is above rank={self.rank}, and ranks only fall; give a smaller one."
            )

    def default_targets(self, model_type: str) -> Sequence[str] | None:
        return ATTENTION.get(model_type)

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        rank = self.rank_of(target.name, self.rank)
        return ParallelAdapter(target.module, AdaLoRA(target, rank, self.alpha, seed=self.seed * 100_003 + number))

    def penalty(self, model: AdapterModel) -> Tensor | None:
        if self.orthogonality == 0:
            return None
        power = 2 if self.squared_penalty else 1
        norms = [norm**power for adapter in _adapters(model.adapted_modules()).values() for norm in adapter.distances()]
        return self.orthogonality * torch.stack(norms).mean() if norms else None

    def schedule(self, model: AdapterModel) -> AdaLoRASchedule:
        trained = sum(p.numel() for p in model.wrapped.parameters() if p.requires_grad)
        return AdaLoRASchedule(self, _adapters(model.adapted_modules()), trained)

    def phases(self) -> Phases:
        """t_i, t_f and T.

        Raises:
            ZOError: ``total_steps`` is missing or too small.
        """
        return make_phases(self.warmup_steps, self.final_steps, self.total_steps)


class AdaLoRA(Delta):
    """alpha / (ranknum + 1e-5) * P diag(Lambda) Q x, float32; Q is ``lora_A``, Lambda ``lora_E``, P ``lora_B``, as in PEFT."""

    def __init__(self, target: Target, rank: int, alpha: float, *, seed: int) -> None:
        super().__init__()
        self.alpha = alpha
        self.lora_A = nn.Parameter(torch.zeros(rank, target.in_features, device=target.device))
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, device=target.device))
        self.lora_B = nn.Parameter(torch.zeros(target.out_features, rank, device=target.device))
        self.ranknum = nn.Parameter(torch.full((1,), float(rank), device=target.device), requires_grad=False)
        if target.device.type != "meta":
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for factor in (self.lora_A, self.lora_B):
                    factor.copy_(0.02 * torch.randn(factor.shape, generator=generator))

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
