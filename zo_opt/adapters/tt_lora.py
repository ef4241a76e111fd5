"""LoRETTA_rep: low-rank factors that are tensor trains (arXiv 2402.11417, section 3.2; LoRA: arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from zo_opt.adapters.config import AdapterConfig, check_positive, register
from zo_opt.adapters.parallel import Delta, ParallelAdapter
from zo_opt.adapters.targets import ATTENTION, Target
from zo_opt.adapters.tt_trains import input_train, output_train


@register
@dataclass
class TTLoRAConfig(AdapterConfig):
    """h = W0 x + (alpha / rank) B A x, where A (rank x in) and B (out x rank) are a tensor train each.

    B starts at zero (its last core), which is an exact identity. A's entries start with variance 1 / in, in embeddings 1.
    [choice] ``rank`` is one dim of both trains; inner ranks are ``tt_rank``, or less where a bond cannot use so much.
    It merges into the weights, and ``AdapterModel.export_peft`` writes A and B as an ordinary LoRA.

    >>> from torch import nn
    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> net = nn.Sequential(nn.Linear(1024, 256), nn.Tanh(), nn.Linear(256, 3))
    >>> model = get_adapter_model(net, TTLoRAConfig(rank=8, tt_rank=5, target_modules=["0"]))
    >>> sum(p.numel() for p in trainable_parameters(model))  # LoRA of this rank has 10,240
    1200
    >>> type(model.merge_and_unload()[0]).__name__
    'Linear'
    """

    adapter_type: ClassVar[str] = "tt-lora"
    adapts_embeddings: ClassVar[bool] = True

    rank: int = field(default=8, metadata={"help": "rank of the weight's update"})
    alpha: float = field(default=16.0, metadata={"help": "the update is multiplied by alpha / rank"})
    tt_rank: int = field(default=5, metadata={"help": "inner ranks of both tensor trains"})
    seed: int = field(default=0, metadata={"help": "of the initial cores"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("rank", "tt_rank")
        self.check_seed()
        check_positive("alpha", self.alpha)

    def default_targets(self, model_type: str) -> Sequence[str] | None:
        return ATTENTION.get(model_type)

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        rank = self.rank_of(target.name, self.rank)
        delta = TTLoRA(target, rank, self.tt_rank, scaling=self.alpha / rank, seed=self.seed * 100_003 + number)
        return ParallelAdapter(target.module, delta)


class TTLoRA(Delta):
    """scaling * up(down(x)), float32; ``down`` holds A, ``up`` holds B."""

    def __init__(self, target: Target, rank: int, tt_rank: int, *, scaling: float, seed: int) -> None:
        super().__init__()
        self.scaling = scaling
        self.down = input_train(target, (rank,), tt_rank)
        self.up = output_train(target, (rank,), tt_rank)
        if target.device.type != "meta":
            generator = torch.Generator().manual_seed(seed)
            self.down.reset(generator)
            self.up.reset(generator)
            with torch.no_grad():
                self.up.cores[-1].zero_()

    def forward(self, x: Tensor) -> Tensor:
        delta: Tensor = self.up(self.down(x))
        return delta * self.scaling

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), float32; the scaling is not in them."""
        return self.down.dense().T, self.up.dense().T

    def dense(self) -> Tensor:
        return self.down.dense() @ self.up.dense() * self.scaling

    def extra_repr(self) -> str:
        return f"scaling={self.scaling:g}"
