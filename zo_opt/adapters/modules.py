"""Modules of a model, found, exchanged and trained whole: what putting adapters in and taking them out is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.targets import Target, find_targets, matches
from zo_opt.adapters.weights import matrix
from zo_opt.errors import ZOError


def merged_into(module: AdaptedModule) -> nn.Parameter:
    """The base layer's parameter that merging writes to.

    Raises:
        ZOError: there is none.
    """
    name = module.merged
    parameter: nn.Parameter | None = getattr(module.base_layer, name, None)
    if name == "weight":
        matrix(module.base_layer)
    elif parameter is None:
        raise ZOError(
            f"a {type(module.base_layer).__name__} of this model has no {name} to merge into, and a saved model would lose a new one "
            "when it is loaded; keep the adapter attached (load_adapter_model), or call unload() to remove it."
        )
    assert parameter is not None
    return parameter


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def replaced_targets(model: nn.Module, config: AdapterConfig, targets: Sequence[Target]) -> list[Target]:
    """What ``modules_to_tensorize`` names."""
    if not config.modules_to_tensorize:
        return []
    replaced = find_targets(model, config.modules_to_tensorize, None)
    both = {t.name for t in targets} & {t.name for t in replaced}
    if both:
        raise ZOError(
            f"module {sorted(both)[0]!r} is both in target_modules and in modules_to_tensorize; leave it out of one."
        )
    return replaced


def modules_named(model: nn.Module, name: str) -> list[nn.Module]:
    modules = [m for n, m in model.named_modules() if matches(n, name)]
    if not modules:
        raise ZOError(f"module_to_save {name!r} matches nothing in this model.")
    trained = [m for m in modules if next(m.parameters(), None) is not None]
    if not trained:
        raise ZOError(f"module_to_save {name!r} has no parameters to train; name another.")
    return trained


def train_whole(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Train modules in float32; inside a model of another dtype their inputs and outputs are cast, and those of whatever shares a weight
    with them (an output head tied to the embedding).
    """
    taken = {id(p): p.dtype for module in modules for p in module.parameters()}
    narrow = {m: _dtype(m) for m in modules if _dtype(m) != torch.float32}
    inside = {m for module in modules for m in module.modules()}
    for other in model.modules():
        held = [taken[id(p)] for p in other.parameters(recurse=False) if id(p) in taken]
        if held and held[0] != torch.float32 and other not in inside:
            narrow[other] = held[0]
    for module in modules:
        module.float().requires_grad_(True)
    for module, dtype in narrow.items():
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (_cast(args, torch.float32), _cast(kwargs, torch.float32)), with_kwargs=True
        )
        module.register_forward_hook(lambda _, args, output, dtype=dtype: _cast(output, dtype))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors in a nesting of values, as this dtype."""
    if isinstance(values, torch.Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, dict):
        return {name: _cast(value, dtype) for name, value in values.items()}
    return type(values)(_cast(value, dtype) for value in values) if type(values) in (tuple, list) else values
