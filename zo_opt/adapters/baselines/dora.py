"""DoRA: a weight's columns as magnitude and direction, LoRA on the direction (arXiv 2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zo_opt.adapters.adapted import ParallelAdapter, numbers
from zo_opt.adapters.lora import LoRA, LoRAConfig
from zo_opt.adapters.targets import Target
from zo_opt.adapters.weights import matrix, set_matrix

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    """W = m (W0 + s B A) / ||W0 + s B A|| (arXiv 2402.09353, equation 5), s = alpha / rank; m (out,) in float32.

    Use it where LoRA falls short and time does not matter: each forward makes a copy of the weight.

    The norm is each output's, over its inputs (the paper's columns: its weights are (in, out)). m starts as the norm of W0, which is an
    exact identity. As the paper proposes (section 4.3) and PEFT does, the norm counts as a constant in a backward pass; a zeroth-order
    query sees it change, so that its derivative is the whole one. The bias is not scaled. Starts of A and B and the options are LoRA's.

    A forward pass makes W0 + s B A once a layer for its norms, a copy of the weight in float32 (under batched queries one for each copy).
    [choice] An output whose weights are all zero keeps m = 0 and stays as it is, where PEFT gives NaN.

    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> model = get_adapter_model(nn.Sequential(nn.Linear(64, 32)), DoRAConfig(rank=4, target_modules=["0"]))
    >>> [tuple(p.shape) for p in trainable_parameters(model)]
    [(4, 64), (32, 4), (32,)]
    """

    def wrap(self, target: Target, number: int) -> DoRAAdapter:
        return DoRAAdapter(target.module, DoRA(self, target, number))


class DoRA(LoRA):
    """LoRA's factors and the magnitudes m (out,)."""

    def __init__(self, config: LoRAConfig, target: Target, number: int) -> None:
        super().__init__(config, target, number)
        self.lora_magnitude_vector = numbers(target.device, target.out_features, value=1.0)

    @torch.no_grad()
    def norms(self, layer: nn.Module) -> Tensor:
        """||W0 + s B A|| of each output, (out,) float32, a constant to autograd; never zero."""
        weight_OI = matrix(layer).T.float() + self.scaling * (self.lora_B @ self.lora_A)
        norms: Tensor = torch.linalg.vector_norm(weight_OI, dim=1)
        return norms.clamp_min(_TINY)

    @torch.no_grad()
    def start_from(self, layer: nn.Module) -> None:
        if not self.lora_A.is_meta:
            norms = self.norms(layer)
            self.lora_magnitude_vector.copy_(norms.masked_fill(norms == _TINY, 0))


class DoRAAdapter(ParallelAdapter):
    """The base layer's output with each feature's part that the weight gives rescaled, LoRA's added, summed in float32."""

    adapter: DoRA

    def add(self, out: Tensor, delta: Tensor) -> Tensor:
        factor_O = self._factor()
        bias = getattr(self.base_layer, "bias", None)
        weighted = out if bias is None else out - bias
        # Written as a sum so that a factor of 1 leaves the base layer's bits.
        return out + (factor_O - 1) * weighted + factor_O * delta

    @torch.no_grad()
    def merge(self) -> nn.Module:
        set_matrix(self.base_layer, self.sum() * self._factor())
        return self.base_layer

    def _factor(self) -> Tensor:
        """What each output of W0 + s B A is multiplied by, (out,)."""
        return self.adapter.lora_magnitude_vector / self.adapter.norms(self.base_layer)
