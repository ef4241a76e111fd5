"""A weight's update that is one tensor train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from zo_opt.adapters.adapted import Delta, ParallelAdapter
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.options import SEED, option
from zo_opt.adapters.targets import ATTENTION, Target
from zo_opt.adapters.tt_embedding import input_train
from zo_opt.adapters.tt_linear import TensorTrain, tt_dims
from zo_opt.adapters.weights import matrix


@dataclass(frozen=True)
class TTDeltaConfig(AdapterConfig):
    """W = W0 + scale * (T - T0), T one tensor train over (in_dims, out_dims), T0 a constant.

    ``init="zero"``: T starts with its last core at zero and T0 = 0. ``init="svd"``: T starts as the TT-SVD (Oseledets 2011) of
    W0 / scale at these ranks and T0 is a frozen copy of that start, which is W = residual + scale * T with
    residual = W0 - scale * T0. Both starts are exact identities.

    [choice] The residual is not written into the weight: rounded to bf16 it would lose what the train holds exactly, a weight
    that is tied to another layer would change there, and ``unload`` could not give back W0's bits. T0 costs its few cores
    and a second contraction.

    >>> from torch import nn
    >>> from zo_opt import get_adapter_model
    >>> net = nn.Sequential(nn.Embedding(50, 12), nn.Linear(12, 20))
    >>> ids = torch.tensor([3, 49])
    >>> before = net(ids)
    >>> model = get_adapter_model(net, TTDeltaConfig(rank=4, init="svd", target_modules=["0", "1"]))
    >>> torch.equal(model(ids), before)
    True
    """

    default_targets: ClassVar[Mapping[str, Sequence[str]]] = ATTENTION
    adapts_embeddings: ClassVar[bool] = True

    rank: int = option(5, "inner ranks of the tensor train")
    scale: float = option(1.0, "what the train is multiplied by")
    init: Literal["zero", "svd"] = option("zero", "zero, or svd: start as the weight's own decomposition")
    seed: int = option(0, "of the initial cores", SEED)

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        return ParallelAdapter(target.module, TTDelta(self, target, number))


class TTDelta(Delta):
    """scale * (train(x) - start(x)), float32; ``start`` is frozen, and None where it would be zero."""

    start: TensorTrain | None

    def __init__(self, config: TTDeltaConfig, target: Target, number: int) -> None:
        super().__init__()
        self.scale = config.scale
        self.delta = input_train(target, tt_dims(target.out_features)[::-1], config.rank_of(target.name))
        self.start = None
        if config.init == "svd":
            self.start = deepcopy(self.delta).requires_grad_(False)
        elif target.device.type != "meta":
            self.delta.reset(torch.Generator().manual_seed(config.seed_of(number)))
            with torch.no_grad():
                self.delta.cores[-1].zero_()

    @torch.no_grad()
    def start_from(self, layer: nn.Module) -> None:
        if self.start is None or self.delta.cores[0].is_meta:
            return
        self.delta.decompose(matrix(layer) / self.scale)
        for frozen, core in zip(self.start.cores, self.delta.cores, strict=True):
            frozen.copy_(core)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.delta(x)
        if self.start is not None:
            change = change - self.start(x)
        return change * self.scale

    def dense(self) -> Tensor:
        change = self.delta.dense()
        if self.start is not None:
            change = change - self.start.dense()
        return change * self.scale

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"
