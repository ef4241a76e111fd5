"""VeRA: one pair of frozen random factors for all layers, two trained vectors a layer (arXiv 2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.adapted import AdaptedModule, Delta, Draw, ParallelAdapter, numbers
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.options import SEED, option
from zo_opt.adapters.targets import ATTENTION, Target


@dataclass(frozen=True)
class VeRAConfig(AdapterConfig):
    """h = W0 x + diag(b) B diag(d) A x (arXiv 2310.11454, equation 2), A and B frozen, d (rank,) and b (out,) trained, float32.

    Use it for many small adapters on one model, and with queries on weights.

    A (rank, largest in) and B (largest out, rank) are one tensor each, shared by all targets, which use their first columns and rows
    (and, under ``rank_pattern``, their first so many of the rank). Both are drawn Kaiming-uniform (gain sqrt(2), as in PEFT) and saved,
    so that a file never
    depends on a random generator. d starts at ``d_initial`` and b at zero, an exact identity. Linear layers only, as in PEFT.

    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3))
    >>> model = get_adapter_model(net, VeRAConfig(rank=16, target_modules=["0", "2"]))
    >>> [tuple(p.shape) for p in trainable_parameters(model)]
    [(16,), (32,), (16,), (3,)]
    >>> [tuple(t.shape) for n, t in model.adapter_state().items() if "lambda" not in n]
    [(16, 64), (32, 16)]
    """

    default_targets: ClassVar[Mapping[str, Sequence[str]]] = ATTENTION

    rank: int = option(256, "rank of the weight's update")
    d_initial: float = option(0.1, "initial value of d")
    seed: int = option(0, "of the shared factors", SEED)

    def wrap_all(self, targets: Sequence[Target]) -> dict[str, AdaptedModule]:
        rank, device = max(self.rank_of(t.name) for t in targets), targets[0].device
        shapes = ((rank, max(t.in_features for t in targets)), (max(t.out_features for t in targets), rank))
        a, b = (
            nn.Parameter(Draw(device, self.seed_of(i)).uniform(*shape) * math.sqrt(6 / shape[1]), requires_grad=False)
            for i, shape in enumerate(shapes)
        )
        return {t.name: ParallelAdapter(t.module, VeRA(self, t, a, b)) for t in targets}


class VeRA(Delta):
    """diag(b) B diag(d) A x, float32; A and B belong to all layers."""

    def __init__(self, config: VeRAConfig, target: Target, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__()
        self.in_features, self.out_features = target.in_features, target.out_features
        self.vera_A, self.vera_B = a, b
        self.vera_lambda_d = numbers(target.device, config.rank_of(target.name), value=config.d_initial)
        self.vera_lambda_b = numbers(target.device, target.out_features)

    def forward(self, x: Tensor) -> Tensor:
        a_RI, b_OR = self._factors()
        return F.linear(F.linear(x, a_RI) * self.vera_lambda_d, b_OR) * self.vera_lambda_b

    def dense(self) -> Tensor:
        a_RI, b_OR = self._factors()
        return (a_RI.T * self.vera_lambda_d) @ (b_OR.T * self.vera_lambda_b)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """This layer's part of the shared factors, on its own device (a model may be spread over several)."""
        device, rank = self.vera_lambda_d.device, len(self.vera_lambda_d)
        return self.vera_A[:rank, : self.in_features].to(device), self.vera_B[: self.out_features, :rank].to(device)

    def extra_repr(self) -> str:
        return f"rank={len(self.vera_lambda_d)}"
