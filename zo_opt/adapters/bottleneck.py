"""The bottleneck adapter (Houlsby et al., arXiv 1902.00751): the dense twin of the tensor-train adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from zo_opt.adapters.config import AdapterConfig, register
from zo_opt.adapters.serial import (
    ACTIVATIONS,
    SERIAL_TARGETS,
    Bottleneck,
    SerialAdapter,
    check_activation,
    place_of,
)
from zo_opt.adapters.targets import Target
from zo_opt.errors import ZOError


@register
@dataclass
class BottleneckConfig(AdapterConfig):
    """Serial adapters x + up(act(down(x))), down (m x d) and up (d x m) dense matrices with biases.

    An adapter has 2md + d + m parameters, d features and a bottleneck of m (arXiv 1902.00751, section 2.1). They sit where
    :class:`~zo_opt.TTConfig` puts its own: in encoders after the attention's output and after the feed-forward, each before the
    residual is added, which are the paper's places. The start is an exact identity.

    [choice] up starts at zero and down's entries with variance 1 / d, where the paper draws both with a standard deviation of 0.01, which is
    an identity only nearly. The paper trains layer norms as well; here norms are frozen. GELU and m = 64 are the released code's.

    >>> from torch import nn
    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))
    >>> model = get_adapter_model(net, BottleneckConfig(bottleneck=4, target_modules=["0"]))
    >>> sum(p.numel() for p in trainable_parameters(model))  # 2 * 4 * 20 + 20 + 4
    184
    """

    adapter_type: ClassVar[str] = "adapter"
    adapts_residual: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False

    bottleneck: int = field(default=64, metadata={"help": "features between down and up (m)"})
    activation: str = field(default="gelu", metadata={"help": f"between down and up: {', '.join(ACTIVATIONS)}"})
    bias: bool = field(default=True, metadata={"help": "biases of down and up"})
    seed: int = field(default=0, metadata={"help": "of the initial down"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("bottleneck")
        self.check_seed()
        if type(self.bias) is not bool:
            raise ZOError(f"bias={self.bias!r} is not possible; give true or false.")
        check_activation(self.activation)

    def default_targets(self, model_type: str) -> Sequence[str] | None:
        return SERIAL_TARGETS.get(model_type)

    def wrap(self, target: Target, number: int) -> SerialAdapter:
        position, size = place_of(target)
        adapter = _dense(size, self, seed=self.seed * 100_003 + number, device=target.device)
        return SerialAdapter(target.module, adapter, position)


def _dense(size: int, config: BottleneckConfig, *, seed: int, device: torch.device) -> Bottleneck:
    """float32; nn.Linear's own start would draw from the global random state, so it is skipped."""
    options = {"bias": config.bias, "device": device, "dtype": torch.float32}
    down = nn.utils.skip_init(nn.Linear, size, config.bottleneck, **options)
    up = nn.utils.skip_init(nn.Linear, config.bottleneck, size, **options)
    if device.type != "meta":
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (*down.parameters(), *up.parameters()):
                parameter.zero_()
            down.weight.copy_(torch.randn(down.weight.shape, generator=generator) * size**-0.5)
    return Bottleneck(down, up, config.activation)
