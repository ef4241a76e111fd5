"""LoRA: a low-rank update beside a frozen weight (arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.adapted import Delta, Draw, ParallelAdapter, numbers
from zo_opt.adapters.config import AdapterConfig, of_longest_ending
from zo_opt.adapters.options import SEED, option
from zo_opt.adapters.targets import ATTENTION, Target, matches
from zo_opt.errors import ZOError


@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """h = W0 x + (alpha / rank) B A x (arXiv 2106.09685, equation 3), A (rank, in) and B (out, rank) in float32.

    Use it first where backpropagation fits.

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

    default_targets: ClassVar[Mapping[str, Sequence[str]]] = ATTENTION
    adapts_embeddings: ClassVar[bool] = True

    rank: int = option(8, "rank of the weight's update")
    alpha: float = option(16.0, "the update is multiplied by alpha / rank")
    use_rslora: bool = option(False, "multiply by alpha / sqrt(rank) instead")
    alpha_pattern: Mapping[str, float] | None = option(
        None, "path ending -> alpha, for modules whose alpha is another than alpha"
    )
    seed: int = option(0, "of the initial factors", SEED)

    def find_targets(self, model: nn.Module) -> list[Target]:
        targets = super().find_targets(model)
        for key in self.alpha_pattern or ():
            if not any(matches(target.name, key) for target in targets):
                raise ZOError(f"alpha_pattern names {key!r}, which is no adapted module; leave it out.")
        return targets

    def scaling(self, name: str) -> float:
        """What a module's B A is multiplied by."""
        rank = self.rank_of(name)
        alpha: float = of_longest_ending(name, self.alpha_pattern, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        return ParallelAdapter(target.module, LoRA(self, target, number))


class LoRA(Delta):
    """scaling * B A x, float32; in an embedding x are token ids and A's columns are looked up."""

    def __init__(self, config: LoRAConfig, target: Target, number: int) -> None:
        super().__init__()
        rank, draw = config.rank_of(target.name), Draw(target.device, config.seed_of(number))
        self.inner_features = 0 if target.embedding else rank
        self.scaling = config.scaling(target.name)
        self.embedding = target.embedding
        # As in PEFT, a padding row gets no gradient.
        self.padding_idx: int | None = getattr(target.module, "padding_idx", None)
        self.lora_A = numbers(target.device, rank, target.in_features)
        self.lora_B = numbers(target.device, target.out_features, rank)
        if self.embedding:
            self.lora_B.data = draw.normal(target.out_features, rank)
        else:
            self.lora_A.data = draw.uniform(rank, target.in_features) / math.sqrt(target.in_features)

    def inner(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.lora_A.T, self.padding_idx) if self.embedding else F.linear(x, self.lora_A)

    def input_side(self) -> list[nn.Parameter]:
        return [self.lora_A]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.staged(x), self.lora_B) * self.scaling

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), float32; the scaling is not in them."""
        return self.lora_A, self.lora_B

    def dense(self) -> Tensor:
        return (self.lora_B @ self.lora_A).T * self.scaling

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_A)}, scaling={self.scaling:g}"
