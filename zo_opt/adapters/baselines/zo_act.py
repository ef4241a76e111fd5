"""ZO-Act: coefficients of a fixed basis of what enters each linear layer (arXiv 2607.01125)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.adapted import Delta, ParallelAdapter, numbers
from zo_opt.adapters.baselines.spectral import linear_names
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.options import option
from zo_opt.adapters.spectrum import leading_triplets
from zo_opt.adapters.targets import Target, find_targets
from zo_opt.errors import ZOError
from zo_opt.system.vmap import is_batched


@dataclass(frozen=True)
class ZOActConfig(AdapterConfig):
    """h = (W0 + C A^T) x: A (in, rank) a frozen orthonormal basis of the layer's inputs, C (out, rank) trained from zero.

    Use it with one-sided queries on a frozen, also quantised, base, where the first batch looks like the rest.

    A has the leading right singular vectors of X (tokens, in), all that enters the layer in the first batch that the model runs on with its
    adapters in: a gradient of the weight lies in the span of such inputs. ``zo-opt train`` shows it the first step's rows before
    anything else, as the base sees them; in a loop of your own run the model once before the optimizer's first step. A is saved with the adapter.

    Source: arXiv 2607.01125, as summaries of it report (the paper itself was not at hand): a basis once at the start, coefficients moved
    by Adam along one-sided differences, W0 perhaps in INT4. [choice] rank 1, the best of an ablation as reported; all
    linear layers of the layers; no factor before C A^T; X is not centred, and has the tokens of padding too. A rank above the inputs' number
    is lowered to it. It merges into the weights, and is exported as an ordinary LoRA.

    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))
    >>> model = get_adapter_model(net, ZOActConfig(rank=2, target_modules=["0"]))
    >>> first = torch.eye(12)[3:5]
    >>> _ = model(first)
    >>> basis = model.adapted_modules()["0"].adapter.lora_A
    >>> torch.allclose(basis.T @ basis, first.T @ first, atol=1e-6), [tuple(p.shape) for p in trainable_parameters(model)]
    (True, [(20, 2)])
    """

    reads_rows: ClassVar[bool] = True

    rank: int = option(1, "columns of the basis, and of the coefficients")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "all":
            raise ZOError(
                "adapter 'zo-act' takes its basis from all tokens and acts on all; leave positions out, or take lora."
            )

    def find_targets(self, model: nn.Module) -> list[Target]:
        names = self.target_modules or linear_names(model)
        return find_targets(model, names, self.layers) if names else super().find_targets(model)

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        return ParallelAdapter(target.module, Coefficients(target, self.rank_of(target.name)))


class Coefficients(Delta):
    """C A^T x, float32; A^T is ``lora_A`` (rank, in), zeros until inputs are seen, C ``lora_B`` (out, rank)."""

    scaling = 1.0

    def __init__(self, target: Target, rank: int) -> None:
        super().__init__()
        self.lora_A = numbers(target.device, min(rank, target.in_features), target.in_features, trained=False)
        self.lora_B = numbers(target.device, target.out_features, len(self.lora_A))
        self._begun = False

    def forward(self, x: Tensor) -> Tensor:
        if not self._begun and not x.is_meta:
            self._begin(x)
        return F.linear(F.linear(x, self.lora_A), self.lora_B)

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        """Take the basis from these inputs, unless there is one (which a file had)."""
        if not self.lora_A.any():
            if is_batched(x):
                raise ZOError("a basis of inputs is not found in copies; run the model once before the first step.")
            x_NI = x.reshape(-1, x.shape[-1])
            x_NI = x_NI[x_NI.isfinite().all(1)]  # padding may hold anything
            if len(x_NI) < len(self.lora_A):
                raise ZOError(
                    f"the first batch has {len(x_NI)} tokens, which span no basis of rank {len(self.lora_A)}; run more, or lower rank."
                )
            self.lora_A.copy_(leading_triplets(x_NI, len(self.lora_A))[2])
        self._begun = True

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A^T (rank, in) and C (out, rank), float32."""
        return self.lora_A, self.lora_B

    def dense(self) -> Tensor:
        return (self.lora_B @ self.lora_A).T

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_A)}"
