"""The bottleneck adapter (Houlsby et al., arXiv 1902.00751): the dense twin of the tensor-train adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from zo_opt.adapters.adapted import Draw, SerialAdapter
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.options import SEED, option
from zo_opt.adapters.targets import SERIAL, Target
from zo_opt.adapters.tt import Bottleneck


@dataclass(frozen=True)
class BottleneckConfig(AdapterConfig):
    """Serial adapters x + up(act(down(x))), down (m x d) and up (d x m) dense matrices with biases.

    Use it for comparison with tensor-train adapters of the same shape.

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

    default_targets: ClassVar[Mapping[str, Sequence[str]]] = SERIAL
    adapts_residual: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False

    bottleneck: int = option(64, "features between down and up (m)")
    activation: Literal["tanh", "gelu", "relu", "identity"] = option("gelu", "between down and up")
    bias: bool = option(True, "biases of down and up")
    seed: int = option(0, "of the initial down", SEED)

    def wrap(self, target: Target, number: int) -> SerialAdapter:
        position, size = target.serial_place
        options = {"bias": self.bias, "device": target.device, "dtype": torch.float32}
        # Not nn.Linear's own start, which would draw from the global random state.
        down = nn.utils.skip_init(nn.Linear, size, self.bottleneck, **options)
        up = nn.utils.skip_init(nn.Linear, self.bottleneck, size, **options)
        with torch.no_grad():
            for parameter in (*down.parameters(), *up.parameters()):
                parameter.zero_()
            down.weight.copy_(Draw(target.device, self.seed_of(number)).normal(self.bottleneck, size) * size**-0.5)
        return SerialAdapter(target.module, Bottleneck(down, up, self.activation), position)
