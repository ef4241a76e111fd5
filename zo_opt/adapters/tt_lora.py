"""LoRETTA_rep: low-rank factors that are tensor trains (arXiv 2402.11417, section 3.2; LoRA: arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zo_opt.adapters.adapted import Delta, ParallelAdapter
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.options import SEED, option
from zo_opt.adapters.targets import ATTENTION, Target
from zo_opt.adapters.tt_linear import tt_dims, useful_train


@dataclass(frozen=True)
class TTLoRAConfig(AdapterConfig):
    """h = W0 x + (alpha / rank) B A x, where A (rank x in) and B (out x rank) are a tensor train each.

    B starts at zero (its last core), which is an exact identity. A's entries start with variance 1 / in.
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

    default_targets: ClassVar[Mapping[str, Sequence[str]]] = ATTENTION

    rank: int = option(8, "rank of the weight's update")
    alpha: float = option(16.0, "the update is multiplied by alpha / rank")
    tt_rank: int = option(5, "inner ranks of both tensor trains")
    seed: int = option(0, "of the initial cores", SEED)

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        return ParallelAdapter(target.module, TTLoRA(self, target, number))


class TTLoRA(Delta):
    """scaling * up(down(x)), float32; ``down`` holds A, ``up`` holds B."""

    def __init__(self, config: TTLoRAConfig, target: Target, number: int) -> None:
        super().__init__()
        rank = config.rank_of(target.name)
        self.scaling = config.alpha / rank
        in_dims, out_dims = tt_dims(target.in_features), tt_dims(target.out_features)[::-1]
        self.down = useful_train(in_dims, (rank,), config.tt_rank, bias=False, device=target.device)
        self.up = useful_train((rank,), out_dims, config.tt_rank, bias=False, device=target.device)
        if target.device.type != "meta":
            generator = torch.Generator().manual_seed(config.seed_of(number))
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
