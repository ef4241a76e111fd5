"""VeRA: one pair of frozen random factors for all layers, two trained vectors a layer (arXiv 2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.config import AdapterConfig, check_positive, register
from zo_opt.adapters.parallel import Delta, ParallelAdapter
from zo_opt.adapters.targets import ATTENTION, Target


@register
@dataclass
class VeRAConfig(AdapterConfig):
    """h = W0 x + diag(b) B diag(d) A x (arXiv 2310.11454, equation 2), A and B frozen, d (rank,) and b (out,) trained, float32.

    A (rank, largest in) and B (largest out, rank) are one tensor each, shared by all targets, which use their first columns and rows
    (and, under ``rank_pattern``, their first so many of the rank). Both are drawn Kaiming-uniform (gain sqrt(2), as in PEFT) and saved, so that a file never
    depends on a random generator. d starts at ``d_initial`` and b at zero, an exact identity. Linear layers only, as in PEFT.

    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3))
    >>> model = get_adapter_model(net, VeRAConfig(rank=16, target_modules=["0", "2"]))
    >>> [tuple(p.shape) for p in trainable_parameters(model)]
    [(16,), (32,), (16,), (3,)]
    >>> [tuple(t.shape) for n, t in model.adapter_state().items() if "lambda" not in n]
    [(16, 64), (32, 16)]
    """

    adapter_type: ClassVar[str] = "vera"

    rank: int = field(default=256, metadata={"help": "rank of the weight's update"})
    d_initial: float = field(default=0.1, metadata={"help": "initial value of d"})
    seed: int = field(default=0, metadata={"help": "of the shared factors"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("rank")
        self.check_seed()
        check_positive("d_initial", self.d_initial)

    def default_targets(self, model_type: str) -> Sequence[str] | None:
        return ATTENTION.get(model_type)

    def wrap_all(self, targets: Sequence[Target]) -> dict[str, AdaptedModule]:
        ranks = {target.name: self.rank_of(target.name, self.rank) for target in targets}
        rank, device = max(ranks.values()), targets[0].device
        shapes = ((rank, max(t.in_features for t in targets)), (max(t.out_features for t in targets), rank))
        a, b = (
            nn.Parameter(_kaiming_uniform(shape, self.seed * 100_003 + number, device), requires_grad=False)
            for number, shape in enumerate(shapes)
        )
        return {t.name: ParallelAdapter(t.module, VeRA(t, ranks[t.name], a, b, self.d_initial)) for t in targets}

    def wrap(self, target: Target, number: int) -> AdaptedModule:
        return self.wrap_all([target])[target.name]


class VeRA(Delta):
    """diag(b) B diag(d) A x, float32; A and B belong to all layers."""

    def __init__(self, target: Target, rank: int, a: nn.Parameter, b: nn.Parameter, d_initial: float) -> None:
        super().__init__()
        self.in_features, self.out_features = target.in_features, target.out_features
        self.vera_A, self.vera_B = a, b
        self.vera_lambda_d = nn.Parameter(torch.full((rank,), float(d_initial), device=target.device))
        self.vera_lambda_b = nn.Parameter(torch.zeros(target.out_features, device=target.device))

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


def _kaiming_uniform(shape: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """Uniform in +-sqrt(6 / columns), float32; nothing is drawn on the meta device."""
    if device.type == "meta":
        return torch.empty(shape, device=device)
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return ((2 * uniform - 1) * math.sqrt(6 / shape[1])).to(device)
