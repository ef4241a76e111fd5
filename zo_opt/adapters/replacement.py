"""A linear layer replaced by a tensor train of its weight: LoRETTA's and AdaZeta's tensorised classification head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.targets import Target
from zo_opt.adapters.tt_linear import TTLinear, tt_dims, useful_train
from zo_opt.adapters.weights import matrix, set_matrix


class TensorizedLinear(AdaptedModule):
    """``adapter(x)`` in place of ``base_layer(x)``: the TT-SVD of its weight, trained with its bias (arXiv 2402.11417, 3.2).

    The start is the layer's own function as far as the ranks allow, exact to rounding where they are full. The plain layer is
    kept for ``unload``; it takes no part in the forward pass.
    """

    kind: ClassVar[str] = "replacement"
    adapter: TTLinear

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        out: Tensor = self.adapter(x.float())
        return out.to(x.dtype)

    @torch.no_grad()
    def start_from_weight(self) -> None:
        weight, bias = matrix(self.base_layer), getattr(self.base_layer, "bias", None)
        if weight.is_meta:
            return
        self.adapter.decompose(weight)
        if self.adapter.bias is not None and isinstance(bias, Tensor):
            self.adapter.bias.copy_(bias)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        set_matrix(self.base_layer, self.adapter.dense())
        bias = self.base_layer.bias
        if isinstance(bias, nn.Parameter) and self.adapter.bias is not None:
            self.base_layer.bias = nn.Parameter(self.adapter.bias.to(bias.dtype), requires_grad=bias.requires_grad)
        return self.base_layer


def tensorize(target: Target, rank: int) -> TensorizedLinear:
    """Build the replacement of a linear layer, which ``start_from_weight`` sets; the layer is left as it is."""
    in_dims, out_dims = tt_dims(target.in_features), tt_dims(target.out_features)[::-1]
    biased = getattr(target.module, "bias", None) is not None
    return TensorizedLinear(target.module, useful_train(in_dims, out_dims, rank, bias=biased, device=target.device))
