"""What all adapted modules share: a frozen base layer, an adapter beside, around or in place of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn


class AdaptedModule(nn.Module, ABC):
    """A base layer with an adapter; stands where the base layer stood.

    Attributes that the model's own code asks of the wrapped module (``weight``, ``in_features``) are answered by it.
    Nothing is ever written to the base layer but by ``merge``: ``base_layer`` is the plain module to the bit.
    """

    kind: ClassVar[str]
    merged: ClassVar[str] = "weight"  # the base layer's parameter that merge() writes

    def __init__(self, base_layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter = adapter

    @abstractmethod
    def merge(self) -> nn.Module:
        """Fold the adapter into the base layer's weight and return the base layer."""

    def start_from_weight(self) -> None:
        """Set what starts from the base layer's weight (a decomposition, which takes seconds). Not called before loading.

        Raises:
            ZOError: the weight cannot be read as a matrix.
        """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def extra_repr(self) -> str:
        return self.kind
