"""The tensorised adapter of AdaZeta (arXiv 2406.18060, section 3.1) and LoRETTA_adp (arXiv 2402.11417)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from tt_kernels import factorize, useful_ranks

from zo_opt.adapters.config import AdapterConfig, register
from zo_opt.adapters.serial import ACTIVATIONS, SERIAL_TARGETS, Bottleneck, SerialAdapter, check_activation, place_of
from zo_opt.adapters.targets import Target
from zo_opt.adapters.tt_linear import TTLinear, digits, tt_dims
from zo_opt.errors import ZOError

TRAINABLE = ("all", "mixing")


@register
@dataclass
class TTConfig(AdapterConfig):
    """Serial tensor-train adapters: x + up(act(down(x))), down and up tensor-train linear layers.

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

    adapter_type: ClassVar[str] = "tt"
    adapts_residual: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False

    rank: int = field(default=5, metadata={"help": "inner ranks of the tensor trains"})
    bottleneck: int = field(default=64, metadata={"help": "features between down and up"})
    activation: str = field(default="tanh", metadata={"help": f"between down and up: {', '.join(ACTIVATIONS)}"})
    bias: bool = field(default=True, metadata={"help": "biases of down and up"})
    trainable: str = field(
        default="all", metadata={"help": "all cores, or only the mixing cores: those of up's input dims (no biases)"}
    )
    output_rank: int | None = field(
        default=None, metadata={"help": "rank between up's mixing cores and its output cores; None: rank"}
    )
    seed: int = field(default=0, metadata={"help": "of the initial cores"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("rank", "bottleneck")
        self.check_seed()
        if type(self.bias) is not bool:
            raise ZOError(f"bias={self.bias!r} is not possible; give true or false.")
        if self.trainable not in TRAINABLE:
            raise ZOError(f"trainable={self.trainable!r} is not known; choose one of {', '.join(TRAINABLE)}.")
        if self.output_rank is not None:
            self.check_whole("output_rank")
        check_activation(self.activation)

    def default_targets(self, model_type: str) -> Sequence[str] | None:
        return SERIAL_TARGETS.get(model_type)

    def wrap(self, target: Target, number: int) -> SerialAdapter:
        position, size = place_of(target)
        rank = self.rank_of(target.name, self.rank)
        adapter = TTAdapter(size, self, rank=rank, seed=self.seed * 100_003 + number, device=target.device)
        return SerialAdapter(target.module, adapter, position)


class TTAdapter(Bottleneck):
    """x + up(act(down(x))), ``down`` and ``up`` tensor trains. One core of ``up`` starts at zero: an exact identity.

    That core is the last one where all are trained (arXiv 2406.18060), else the last mixing core.
    """

    down: TTLinear
    up: TTLinear

    def __init__(self, size: int, config: TTConfig, *, rank: int, seed: int, device: torch.device) -> None:
        hidden, bottleneck = adapter_dims(size, config.bottleneck)
        bonds = len(bottleneck) + len(hidden) - 1
        down_ranks, up_ranks = [rank] * bonds, [rank] * bonds
        if config.output_rank is not None:
            up_ranks[len(bottleneck) - 1] = config.output_rank
        only_mixing = config.trainable == "mixing"
        if only_mixing:  # the other cores hold truncated decompositions, which need no more than these
            down_ranks = useful_ranks((*hidden, *bottleneck), down_ranks)
            up_ranks = useful_ranks((*bottleneck, *hidden[::-1]), up_ranks)
        super().__init__(
            TTLinear(hidden, bottleneck, down_ranks, bias=config.bias, device=device),
            TTLinear(bottleneck, hidden[::-1], up_ranks, bias=config.bias, device=device),
            config.activation,
        )
        self._only_mixing = only_mixing
        if self._only_mixing:
            self.requires_grad_(False)
            for core in self.mixing:
                core.requires_grad_(True)
        if device.type != "meta":
            generator = torch.Generator().manual_seed(seed)
            self.down.reset(generator)
            self.up.reset(generator)
            self.start_at_identity()

    @property
    def mixing(self) -> list[nn.Parameter]:
        """``up``'s cores of its input dims: how bottleneck features mix into output directions."""
        return list(self.up.cores)[: len(self.up.in_dims)]

    @torch.no_grad()
    def start_at_identity(self) -> None:
        """Zero one core of ``up``."""
        (self.mixing[-1] if self._only_mixing else self.up.cores[-1]).zero_()


def adapter_dims(size: int, bottleneck: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Factors of the hidden size and of the bottleneck.

    [choice] ceil and floor of log16(size) factors: this gives the published shapes of Llama-2-7B, RoBERTa-base and
    -large. A bottleneck below 16 stays whole.

    >>> adapter_dims(4096, 64), adapter_dims(1024, 64), adapter_dims(768, 64)
    (((16, 16, 16), (4, 4, 4)), ((8, 8, 16), (8, 8)), ((8, 8, 12), (8, 8)))
    """
    parts = max(digits(size) - 1, 1) if bottleneck >= 16 else 1
    return tt_dims(size), factorize(bottleneck, parts)
