"""LoRETTA_rep: low-rank factors that are tensor trains (arXiv 2402.11417, section 3.2; LoRA: arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.adapted import Delta, ParallelAdapter
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.options import SEED, option
from zo_opt.adapters.spectrum import leading_triplets
from zo_opt.adapters.targets import ATTENTION, Target
from zo_opt.adapters.tt_linear import tt_dims, useful_train
from zo_opt.adapters.weights import matrix


@dataclass(frozen=True)
class TTLoRAConfig(AdapterConfig):
    """h = W0 x + (alpha / rank) B A x, where A (rank x in) and B (out x rank) are a tensor train each.

    Use it by default: with ``trainable="input"`` it is what queries on activations reach; at every token it can be merged.

    B starts at zero (its last core), which is an exact identity. A's entries start with variance 1 / in.
    [choice] ``rank`` is one dim of both trains; inner ranks are ``tt_rank``, or less where a bond cannot use so much.
    It merges into the weights, and ``AdapterModel.export_peft`` writes A and B as an ordinary LoRA.

    ``trainable="input"``: B is frozen at the leading left singular vectors of W0 (LaMDA's frozen projection, arXiv 2406.12832, section 3),
    a train of full rank, times alpha / rank; A starts at zero and is all that is trained: what queries on activations reach.

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
    trainable: Literal["all", "input"] = option("all", "input: B frozen at the weight's leading left singular vectors")
    seed: int = option(0, "of the initial cores", SEED)

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        return ParallelAdapter(target.module, TTLoRA(self, target, number))


class TTLoRA(Delta):
    """scaling * up(down(x)), float32; ``down`` holds A, ``up`` holds B."""

    def __init__(self, config: TTLoRAConfig, target: Target, number: int) -> None:
        super().__init__()
        rank = config.rank_of(target.name)
        self.inner_features, self.scaling = rank, config.alpha / rank
        in_dims, out_dims = tt_dims(target.in_features), tt_dims(target.out_features)[::-1]
        self.down = useful_train(in_dims, (rank,), config.tt_rank, bias=False, device=target.device)
        self._only_input = config.trainable == "input"
        up_rank = rank * out_dims[0] * out_dims[-1] if self._only_input else config.tt_rank  # the former: any matrix
        self.up = useful_train((rank,), out_dims, up_rank, bias=False, device=target.device)
        if self._only_input:
            self.up.requires_grad_(False)
        if target.device.type != "meta":
            generator = torch.Generator().manual_seed(config.seed_of(number))
            if self._only_input:
                self.down.start_at_zero(generator)
                return
            self.down.reset(generator)
            self.up.reset(generator)
            with torch.no_grad():
                self.up.cores[-1].zero_()

    @torch.no_grad()
    def start_from(self, layer: nn.Module) -> None:
        if not self._only_input:
            return
        weight_IO = matrix(layer)
        if not weight_IO.is_meta:
            u_OR = leading_triplets(weight_IO.T, min(self.inner_features, *weight_IO.shape))[0]
            self.up.decompose(F.pad(u_OR, (0, self.inner_features - u_OR.shape[1])).T)

    def inner(self, x: Tensor) -> Tensor:
        low: Tensor = self.down(x)
        return low

    def input_side(self) -> list[nn.Parameter]:
        return list(self.down.parameters())

    def forward(self, x: Tensor) -> Tensor:
        delta: Tensor = self.up(self.staged(x))
        return delta * self.scaling

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), float32; the scaling is not in them."""
        return self.down.dense().T, self.up.dense().T

    def dense(self) -> Tensor:
        return self.down.dense() @ self.up.dense() * self.scaling

    def extra_repr(self) -> str:
        return f"scaling={self.scaling:g}"
