"""LoRA: a low-rank update beside a frozen weight (arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.config import MOST_NAMES, AdapterConfig, check_positive, register
from zo_opt.adapters.parallel import Delta, ParallelAdapter
from zo_opt.adapters.targets import ATTENTION, Target, matches
from zo_opt.errors import ZOError


@register
@dataclass
class LoRAConfig(AdapterConfig):
    """h = W0 x + (alpha / rank) B A x (arXiv 2106.09685, equation 3), A (rank, in) and B (out, rank) in float32.

    A starts Kaiming-uniform with a = sqrt(5), that is uniform in +-1 / sqrt(in), and B at zero. In embeddings A (rank, rows) starts
    at zero and B Gaussian, as in the authors' code and PEFT. Both starts are exact identities.

    ``use_rslora`` divides by sqrt(rank) instead (arXiv 2312.03732). [choice] There is no dropout: its masks would come from
    the global random state, which is never touched. It merges into the weights; ``AdapterModel.export_peft`` writes PEFT's files.

    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3))
    >>> model = get_adapter_model(net, LoRAConfig(rank=4, target_modules=["0"]))
    >>> [tuple(p.shape) for p in trainable_parameters(model)]
    [(4, 64), (32, 4)]
    >>> type(model.merge_and_unload()[0]).__name__
    'Linear'
    """

    adapter_type: ClassVar[str] = "lora"
    adapts_embeddings: ClassVar[bool] = True

    rank: int = field(default=8, metadata={"help": "rank of the weight's update"})
    alpha: float = field(default=16.0, metadata={"help": "the update is multiplied by alpha / rank"})
    use_rslora: bool = field(default=False, metadata={"help": "multiply by alpha / sqrt(rank) instead"})
    alpha_pattern: dict[str, float] | None = field(
        default=None, metadata={"help": "path ending -> alpha, for modules whose alpha is another than alpha"}
    )
    seed: int = field(default=0, metadata={"help": "of the initial factors"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("rank")
        self.check_seed()
        check_positive("alpha", self.alpha)
        if type(self.use_rslora) is not bool:
            raise ZOError(f"use_rslora={self.use_rslora!r} is not possible; give True or False.")
        pattern = self.alpha_pattern
        if pattern is not None and not (
            isinstance(pattern, dict) and len(pattern) <= MOST_NAMES and all(type(name) is str for name in pattern)
        ):
            raise ZOError(f"alpha_pattern={pattern!r} is not possible; give names with positive numbers.")
        for name, alpha in (pattern or {}).items():
            check_positive(f"alpha_pattern[{name!r}]", alpha)

    def default_targets(self, model_type: str) -> Sequence[str] | None:
        return ATTENTION.get(model_type)

    def find_targets(self, model: nn.Module) -> list[Target]:
        targets = super().find_targets(model)
        for key in self.alpha_pattern or ():
            if not any(matches(target.name, key) for target in targets):
                raise ZOError(f"alpha_pattern names {key!r}, which is no adapted module; leave it out.")
        return targets

    def scaling(self, name: str, rank: int) -> float:
        """What a module's B A is multiplied by."""
        pattern = self.alpha_pattern or {}
        endings = [key for key in pattern if matches(name, key)]
        alpha = pattern[max(endings, key=len)] if endings else self.alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        rank = self.rank_of(target.name, self.rank)
        scaling = self.scaling(target.name, rank)
        return ParallelAdapter(target.module, LoRA(target, rank, scaling=scaling, seed=self.seed * 100_003 + number))


class LoRA(Delta):
    """scaling * B A x, float32; in an embedding x are token ids and A's columns are looked up."""

    def __init__(self, target: Target, rank: int, *, scaling: float, seed: int) -> None:
        super().__init__()
        self.scaling = scaling
        self.embedding = target.embedding
        # As in PEFT, a padding row gets no gradient.
        self.padding_idx: int | None = getattr(target.module, "padding_idx", None)
        self.lora_A = nn.Parameter(torch.zeros(rank, target.in_features, device=target.device))
        self.lora_B = nn.Parameter(torch.zeros(target.out_features, rank, device=target.device))
        if target.device.type != "meta":
            self._reset(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _reset(self, generator: torch.Generator) -> None:
        if self.embedding:
            self.lora_B.copy_(torch.randn(self.lora_B.shape, generator=generator))
        else:
            uniform = torch.rand(self.lora_A.shape, generator=generator)
            self.lora_A.copy_((2 * uniform - 1) / math.sqrt(self.lora_A.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        low = F.embedding(x, self.lora_A.T, self.padding_idx) if self.embedding else F.linear(x, self.lora_A)
        return F.linear(low, self.lora_B) * self.scaling

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), float32; the scaling is not in them."""
        return self.lora_A, self.lora_B

    def dense(self) -> Tensor:
        return (self.lora_B @ self.lora_A).T * self.scaling

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_A)}, scaling={self.scaling:g}"
