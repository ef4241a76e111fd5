"""A serial adapter: a function on the input or the output of a frozen module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class SerialAdapter(nn.Module):
    """``base_layer(adapter(x))`` (position "before") or ``adapter(base_layer(x))`` (position "after").

    Attributes that the model's own code asks of the wrapped module (``weight``, ``in_features``) are answered by it.
    """

    def __init__(self, base_layer: nn.Module, adapter: nn.Module, position: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter = adapter
        self.position = position

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.position == "before":
            return self.base_layer(self.adapter(x), *args, **kwargs)
        return self.adapter(self.base_layer(x, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
