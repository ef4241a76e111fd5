"""A parallel adapter: a linear map added to a frozen linear layer or embedding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.weights import matrix, set_matrix


class Delta(nn.Module, ABC):
    """A float32 linear map x (..., in) -> (..., out), or token ids (...) -> (..., out), that is added to a base layer's."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def dense(self) -> Tensor:
        """The same map as a matrix, (in, out) float32; row i is what token id i adds in an embedding."""

    def start_from(self, layer: nn.Module) -> None:
        """Set what starts from the base layer's weight; the map stays zero."""


class ParallelAdapter(AdaptedModule):
    """``base_layer(x) + adapter(x)``, summed in float32, in the dtype that the base layer gives.

    >>> class Double(Delta):
    ...     def forward(self, x): return 2 * x
    ...     def dense(self): return 2 * torch.eye(3)
    >>> layer, x = nn.Linear(3, 3), torch.ones(1, 3)
    >>> adapted = ParallelAdapter(layer, Double())
    >>> before = adapted(x)
    >>> torch.allclose(adapted.merge()(x), before)
    True
    """

    kind: ClassVar[str] = "parallel"
    adapter: Delta

    def __init__(self, base_layer: nn.Module, adapter: Delta) -> None:
        super().__init__(base_layer, adapter)
        # Embeddings that multiply what they look up (BART's, Gemma's) multiply a merged delta too.
        self._scaled = isinstance(base_layer, nn.Embedding) and hasattr(base_layer, "embed_scale")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out, delta = self._parts(x, *args, **kwargs)
        return (out + delta).to(out.dtype)

    def _parts(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the base layer gives, and what is added to it."""
        out: Tensor = self.base_layer(x, *args, **kwargs)
        delta: Tensor = self.adapter(x.float() if x.is_floating_point() else x)
        if self._scaled:
            scale: Any = self.base_layer.embed_scale
            delta = delta * scale
        return out, delta

    def start_from_weight(self) -> None:
        self.adapter.start_from(self.base_layer)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        set_matrix(self.base_layer, self._sum())
        return self.base_layer

    def _sum(self) -> Tensor:
        """The weight with the map added, (in, out), at least float32."""
        weight = matrix(self.base_layer)
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.adapter.dense()
