"""BitFit: biases alone are trained (arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from zo_opt.adapters.adapted import AdaptedModule, numbers
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.full import within
from zo_opt.adapters.targets import Target, in_layers, matches
from zo_opt.adapters.weights import is_conv1d
from zo_opt.errors import ZOError
from zo_opt.system.layers import layer_of


@dataclass(frozen=True)
class BitFitConfig(AdapterConfig):
    """f(x) = W x + b + delta, where delta (out,) is trained, in float32 from zero, and W and b are frozen (arXiv 2106.10199, section 3).

    Use it in models that have biases, and to change what a model writes at once.

    By default every module with a weight and a bias is adapted: linear layers, Conv1D (GPT-2) and norms, in the whole model
    or in ``layers``. ``target_modules`` narrows it, to queries and the feed-forward's first layer, say, as in the paper's section 3. The paper
    also trains the task's head whole: ``modules_to_save=["classifier"]``. The base model's biases are not written to; merging adds delta to them.

    [choice] In a model whose layers have no bias at all (the Llama family, T5) all linear layers in them get a new one, and so does a
    linear layer or norm that ``target_modules`` names. Such biases cannot be merged: the architecture has no place for them, so that a
    saved model would lose them when it is loaded. ``merge_and_unload`` says so and changes nothing.

    >>> from zo_opt import get_adapter_model, trainable_parameters
    >>> net = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 3, bias=False))
    >>> model = get_adapter_model(net, BitFitConfig())
    >>> [tuple(p.shape) for p in trainable_parameters(model)]
    [(20,), (20,)]
    """

    def find_targets(self, model: nn.Module) -> list[Target]:
        possible = {name: (module, size) for name, module in model.named_modules() if (size := _outputs(module))}
        for wanted in self.target_modules or ():
            if not any(matches(name, wanted) for name in possible):
                raise ZOError(
                    f"target module {wanted!r} is no linear layer or norm of this model, which alone can have a bias; "
                    "name others, or leave target_modules out for all biases."
                )
        if self.target_modules is None:
            chosen = self._all_biases({name: module for name, (module, _) in possible.items()})
        else:
            chosen = [name for name in possible if any(matches(name, wanted) for wanted in self.target_modules)]
        chosen = [name for name in chosen if in_layers(model, name, self.layers)]
        if not chosen:
            raise ZOError(
                f"there is no bias to train in layers={self.layers!r} of this model; give target_modules=[...]."
            )
        return [Target(name, module, size, size) for name in chosen for module, size in (possible[name],)]

    def _all_biases(self, possible: Mapping[str, nn.Module]) -> list[str]:
        chosen = {name for name, module in possible.items() if module._parameters.get("bias") is not None}
        if not any(layer_of(name) for name in chosen):
            chosen |= {name for name, module in possible.items() if layer_of(name) and not _is_norm(module)}
        # What is trained whole or replaced has its bias trained already.
        others = [*(self.modules_to_save or ()), *(self.modules_to_tensorize or ())]
        return [n for n in possible if n in chosen and not any(within(f"{n}.bias", o) for o in others)]

    def wrap(self, target: Target, number: int) -> BiasAdapter:
        return BiasAdapter(target.module, Bias(target))


class Bias(nn.Module):
    """A float32 vector (size,) that is added; zero at the start."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.bias = numbers(target.device, target.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class BiasAdapter(AdaptedModule):
    """``base_layer(x) + bias``, summed in float32, in the dtype that the base layer gives."""

    kind: ClassVar[str] = "bias"
    merged: ClassVar[str] = "bias"
    adapter: Bias

    def after(self, x: Tensor, out: Tensor) -> Tensor:
        total: Tensor = self.adapter(out)
        return total.to(out.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        old = self.base_layer.bias
        assert isinstance(old, Tensor)
        new = (old.float() + self.adapter.bias).to(old.dtype)
        self.base_layer.bias = nn.Parameter(new, requires_grad=old.requires_grad)
        return self.base_layer


def _outputs(module: nn.Module) -> int:
    """Features on the last axis of a linear layer's or norm's output; 0 for other modules."""
    weight = module._parameters.get("weight")
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features)  # type: ignore[arg-type]
    if weight is not None and is_conv1d(module):
        return weight.shape[1]
    return len(weight) if weight is not None and _is_norm(module) else 0


def _is_norm(module: nn.Module) -> bool:
    """A norm of the last axis, whoever wrote it: by its name and its weight, a vector. Batch and group norms have channels elsewhere."""
    weight = module._parameters.get("weight")
    others = nn.modules.batchnorm._NormBase | nn.GroupNorm
    return (
        weight is not None and weight.ndim == 1 and "Norm" in type(module).__name__ and not isinstance(module, others)
    )
