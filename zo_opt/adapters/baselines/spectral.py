"""Spectral gains: the singular values of a weight, each with a gain of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.adapted import Delta, ParallelAdapter, numbers
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.options import option
from zo_opt.adapters.spectrum import leading_triplets
from zo_opt.adapters.targets import Target, find_targets
from zo_opt.adapters.weights import is_conv1d, matrix
from zo_opt.system.layers import layer_of


@dataclass(frozen=True)
class SpectralConfig(AdapterConfig):
    """h = (W0 + U_r diag(g) S_r V_r^T) x, where W0 = U S V^T is the pretrained weight's SVD and g alone is trained.

    Use it with queries on weights: a few hundred numbers, in the directions that matter most to each weight.

    LaMDA's core (arXiv 2406.12832) reduced to its diagonal: singular value i is multiplied by 1 + g_i. g starts at zero, which is
    an exact identity, and is in units of the singular value, so that one learning rate fits all matrices. It is a method for
    zeroth-order tuning: with rank 16 on the seven matrices of the last 8 layers of a Llama-like model 896 numbers are trained.

    The defaults adapt every linear layer of every layer of the model. U_r (out x r), S_r (r) and V_r^T (r x in) are frozen, float32, and
    saved with the adapter. A matrix with fewer than ``rank`` singular values has as many gains as it has singular values.

    >>> from torch import nn
    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))
    >>> model = get_adapter_model(net, SpectralConfig(rank=4, target_modules=["0", "2"]))
    >>> [tuple(p.shape) for p in trainable_parameters(model)]
    [(4,), (3,)]
    """

    rank: int = option(16, "leading singular values that get a gain")

    def find_targets(self, model: nn.Module) -> list[Target]:
        names = self.target_modules or linear_names(model)
        return find_targets(model, names, self.layers) if names else super().find_targets(model)

    def wrap(self, target: Target, number: int) -> ParallelAdapter:
        return ParallelAdapter(target.module, SpectralGains(target, self.rank_of(target.name)))


class SpectralGains(Delta):
    """U diag(g S) V^T x, float32. ``gains`` (r,) is trained; ``u`` (out, r), ``s`` (r,) and ``vt`` (r, in) are frozen."""

    def __init__(self, target: Target, rank: int) -> None:
        super().__init__()
        device, outputs, inputs = target.device, target.out_features, target.in_features
        r = min(rank, inputs, outputs)
        self.gains = numbers(device, r)
        self.u = numbers(device, outputs, r, trained=False)
        self.s = numbers(device, r, trained=False)
        self.vt = numbers(device, r, inputs, trained=False)

    @torch.no_grad()
    def start_from(self, layer: nn.Module) -> None:
        if self.u.is_meta:
            return
        u, s, vt = leading_triplets(matrix(layer).T, len(self.gains))
        self.u.copy_(u)
        self.s.copy_(s)
        self.vt.copy_(vt)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.vt) * (self.gains * self.s), self.u)

    def dense(self) -> Tensor:
        return ((self.u * (self.gains * self.s)) @ self.vt).T


def linear_names(model: nn.Module) -> list[str]:
    """Names, within a layer, of the linear layers that numbered layers are made of: not of embeddings and heads."""
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    places = {name: place for name in linear if (place := layer_of(name)) is not None}
    return list(dict.fromkeys(name[len(f"{stack}.{i}.") :] for name, (stack, i) in places.items()))
