"""All linear trains of a model merged in one batched chain a forward, instead of a chain for each layer.

Merging 48 adapters' cores together takes a tenth to a third of the time of merging them one by one (benchmarks/tensor_train.py), and
where no core has changed since the last forward nothing is merged at all.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from tt_kernels import MergeCache

from zo_opt.adapters.tt_linear import TTLinear
from zo_opt.system.vmap import is_batched

MAX_COPIES = 2  # of more, all layers' pairs together would take half as much memory as a forward


class MergedTrains:
    """Gives every TTLinear its merged pair before the model's forward and takes it away after it.

    Gradients are not taken through it: with gradients on, each layer merges by itself, keeping less for the backward.

    Args:
        model: the model that the trains are in.
    """

    def __init__(self, model: nn.Module) -> None:
        groups: dict[Any, list[TTLinear]] = defaultdict(list)
        for module in model.modules():
            if isinstance(module, TTLinear):
                shape = (module.in_dims, module.out_dims, tuple(module.ranks), module.bias is not None)
                groups[(*shape, module.cores[0].device)].append(module)
        self._groups = [(layers, MergeCache()) for layers in groups.values() if len(layers) > 1]
        self._depth = 0
        # Some callers skip the head and call the body; whichever is outermost begins and ends the forward.
        roots = {id(m): m for m in (model, getattr(model, "base_model", model)) if isinstance(m, nn.Module)}
        self._handles: list[RemovableHandle] = []
        for root in roots.values() if self._groups else ():
            self._handles.append(root.register_forward_pre_hook(self._begin))
            self._handles.append(root.register_forward_hook(self._end, always_call=True))

    def remove(self) -> None:
        """Leave the model alone from now on."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: Any) -> None:
        self._depth += 1
        if self._depth > 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        for layers, cache in self._groups:
            if _copies(layers[0]) > MAX_COPIES:
                continue
            biases = None if layers[0].bias is None else [layer.bias for layer in layers if layer.bias is not None]
            pairs = cache([list(layer.cores) for layer in layers], len(layers[0].in_dims), biases)
            for layer, pair in zip(layers, pairs, strict=True):
                layer.pair = pair

    def _end(self, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            for layers, _cache in self._groups:
                for layer in layers:
                    layer.pair = None


def _copies(layer: TTLinear) -> int:
    """How many copies of the train ``vmap`` runs at once."""
    sizes = [1]
    for core in layer.cores:
        if is_batched(core):
            axis = torch._C._functorch.maybe_get_bdim(core)
            sizes.append(torch._C._functorch.get_unwrapped(core).shape[axis])
    return max(sizes)
