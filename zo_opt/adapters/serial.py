"""A serial adapter: a function on the input or the output of a frozen module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.targets import Target
from zo_opt.errors import ZOError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "identity": lambda x: x,
}

# After attention output and feed-forward in encoders and in models with plain feed-forwards; around the gated
# feed-forward of the Llama family: before gate and up, after down (methods of arXiv 2406.18060, appendix).
_GATED = ("gate_proj", "up_proj", "down_proj")
_ENCODER = ("attention.output.dense", "output.dense")
_T5 = ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")
SERIAL_TARGETS: dict[str, Sequence[str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "granite"), _GATED
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "deberta", "deberta-v2", "electra"), _ENCODER),
    **dict.fromkeys(("t5", "mt5"), _T5),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "bart": ("self_attn.out_proj", "encoder_attn.out_proj", "fc2"),
}
_BEFORE = ("gate_proj", "up_proj")


class SerialAdapter(AdaptedModule):
    """``base_layer(adapter(x))`` (position "before") or ``adapter(base_layer(x))`` (position "after")."""

    kind: ClassVar[str] = "serial"

    def __init__(self, base_layer: nn.Module, adapter: nn.Module, position: str) -> None:
        super().__init__(base_layer, adapter)
        self.position = position

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.position == "before":
            return self.base_layer(self.adapter(x), *args, **kwargs)
        return self.adapter(self.base_layer(x, *args, **kwargs))

    def merge(self) -> nn.Module:
        raise NotImplementedError("ask the configuration's check_mergeable() first")

    def extra_repr(self) -> str:
        return f"serial, {self.position} the base layer"


class Bottleneck(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        delta: Tensor = self.up(self._activation(self.down(x.float())))
        wide = torch.promote_types(x.dtype, torch.float32)  # autocast narrows delta, which x must not become
        return delta.to(wide).add_(x).to(x.dtype)


def place_of(target: Target) -> tuple[str, int]:
    """Where a target's serial adapter sits, "before" or "after", and the number of features there."""
    if target.residual or target.name.rsplit(".", 1)[-1] in _BEFORE:
        return "before", target.in_features
    return "after", target.out_features


def check_activation(activation: str) -> None:
    """Whether the name is one of ``ACTIVATIONS``.

    Raises:
        ZOError: it is not.
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ZOError(f"activation={activation!r} is not known; choose one of {', '.join(ACTIVATIONS)}.")
