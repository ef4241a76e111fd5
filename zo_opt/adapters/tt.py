"""The tensorised adapter of AdaZeta (arXiv 2406.18060, section 3.1) and LoRETTA_adp (arXiv 2402.11417)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tt_kernels import factorize

from zo_opt.adapters.adapted import SerialAdapter, Staged
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.options import SEED, option
from zo_opt.adapters.targets import SERIAL, Target
from zo_opt.adapters.tt_linear import TTLinear, digits, tt_dims

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class TTConfig(AdapterConfig):
    """Serial tensor-train adapters: x + up(act(down(x))), down and up tensor-train linear layers.

    Use it to train few numbers by queries on weights, at every token; it cannot be merged.

    The start is an exact identity. With the defaults the trainable parameters are AdaZeta's published ones: 610,560 on Llama-2-7B,
    136,704 on RoBERTa-large. Sizes are factorised automatically: the hidden size into ceil(log16) factors
    as equal as possible, the bottleneck into floor(log16(hidden size)).

    >>> from torch import nn
    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))
    >>> model = get_adapter_model(net, TTConfig(rank=2, bottleneck=4, target_modules=["0"]))
    >>> sum(p.numel() for p in trainable_parameters(model))
    96
    """

    default_targets: ClassVar[Mapping[str, Sequence[str]]] = SERIAL
    adapts_residual: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False

    rank: int = option(5, "inner ranks of the tensor trains")
    bottleneck: int = option(64, "features between down and up")
    activation: Literal["tanh", "gelu", "relu", "identity"] = option("tanh", "between down and up")
    bias: bool = option(True, "biases of down and up")
    seed: int = option(0, "of the initial cores", SEED)

    def wrap(self, target: Target, number: int) -> SerialAdapter:
        position, size = target.serial_place
        adapter = TTAdapter(self, size, self.rank_of(target.name), self.seed_of(number), target.device)
        return SerialAdapter(target.module, adapter, position)


class Bottleneck(Staged):
    """x + up(act(down(x))) in float32; returns the dtype of x.

    Args:
        down: (..., size) -> (..., bottleneck), float32.
        up: (..., bottleneck) -> (..., size), float32.
        activation: a name of ``ACTIVATIONS``.
    """

    def __init__(self, down: nn.Module, up: nn.Module, activation: str) -> None:
        super().__init__()
        self.down, self.up = down, up
        self._activation = ACTIVATIONS[activation]

    def inner(self, x: Tensor) -> Tensor:
        h: Tensor = self.down(x.float())
        return h

    def input_side(self) -> list[nn.Parameter]:
        return list(self.down.parameters())

    def forward(self, x: Tensor) -> Tensor:
        delta: Tensor = self.up(self._activation(self.staged(x)))
        wide = torch.promote_types(x.dtype, torch.float32)  # autocast narrows delta, which x must not become
        return delta.to(wide).add_(x).to(x.dtype)


class TTAdapter(Bottleneck):
    """x + up(act(down(x))), ``down`` and ``up`` tensor trains. The last core of ``up`` starts at zero: an exact identity."""

    down: TTLinear
    up: TTLinear

    def __init__(self, config: TTConfig, size: int, rank: int, seed: int, device: torch.device) -> None:
        hidden, bottleneck = adapter_dims(size, config.bottleneck)
        super().__init__(
            TTLinear(hidden, bottleneck, rank, bias=config.bias, device=device),
            TTLinear(bottleneck, hidden[::-1], rank, bias=config.bias, device=device),
            config.activation,
        )
        self.inner_features = config.bottleneck
        if device.type != "meta":
            generator = torch.Generator().manual_seed(seed)
            self.down.reset(generator)
            self.up.reset(generator)
            with torch.no_grad():
                self.up.cores[-1].zero_()


def adapter_dims(size: int, bottleneck: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Factors of the hidden size and of the bottleneck.

    [choice] ceil and floor of log16(size) factors: this gives the published shapes of Llama-2-7B, RoBERTa-base and
    -large. A bottleneck below 16 stays whole.

    >>> adapter_dims(4096, 64), adapter_dims(1024, 64), adapter_dims(768, 64)
    (((16, 16, 16), (4, 4, 4)), ((8, 8, 16), (8, 8)), ((8, 8, 12), (8, 8)))
    """
    parts = max(digits(size) - 1, 1) if bottleneck >= 16 else 1
    return tt_dims(size), factorize(bottleneck, parts)
