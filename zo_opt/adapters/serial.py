"""A serial adapter: a function on the input or the output of a frozen module."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from zo_opt.adapters.adapted import AdaptedModule


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
