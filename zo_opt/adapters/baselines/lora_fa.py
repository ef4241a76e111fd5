"""LoRA-FA: LoRA whose A stays as it was drawn (arXiv 2308.03303)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zo_opt.adapters.adapted import ParallelAdapter
from zo_opt.adapters.lora import LoRA, LoRAConfig
from zo_opt.adapters.targets import Target


@dataclass(frozen=True)
class LoRAFAConfig(LoRAConfig):
    """h = W0 x + (alpha / rank) B A x with A frozen and B alone trained (arXiv 2308.03303, section 3).

    Use it by backpropagation where LoRA's activations do not fit.

    A backward pass keeps A x, of rank numbers a token, instead of x. Starts and options are LoRA's. A is saved, so that a file does not depend
    on a random generator. [choice] Embeddings are no targets: their A starts at zero, where frozen it would stay.

    >>> from torch import nn
    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> model = get_adapter_model(nn.Sequential(nn.Linear(64, 32)), LoRAFAConfig(rank=4, target_modules=["0"]))
    >>> [tuple(p.shape) for p in trainable_parameters(model)]
    [(32, 4)]
    """

    adapts_embeddings: ClassVar[bool] = False

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        adapter = LoRA(self, target, number)
        adapter.lora_A.requires_grad_(False)
        return ParallelAdapter(target.module, adapter)
