"""Which modules of a model are adapted: by name, by layer, with their sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from zo_opt.errors import ZOError

RESIDUAL = "residual"  # as a target name: the residual stream where it enters a layer
_LAYER = re.compile(r"^(.*?\b(?:layers|layer|h|block|blocks))\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Target:
    """A module to adapt: its path in the model, the module, its input and output sizes.

    ``residual``: a whole layer, to be adapted on the residual stream that enters it.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    residual: bool = False


def find_targets(model: nn.Module, names: Sequence[str], layers: int | Sequence[int] | None) -> list[Target]:
    """Modules whose path ends in one of ``names``, within the given layers.

    Raises:
        ZOError: a name or a layer that matches nothing, or a module that is not a linear map.
    """
    if isinstance(names, str):
        names = [names]
    if RESIDUAL in names:
        return _residual_targets(model, layers) + (
            find_targets(model, others, layers) if (others := [n for n in names if n != RESIDUAL]) else []
        )
    matches = {n: m for n, m in model.named_modules() if any(n == t or n.endswith("." + t) for t in names)}
    for wanted in names:
        if not any(n == wanted or n.endswith("." + wanted) for n in matches):
            raise ZOError(
                f"target module {wanted!r} matches nothing in this model; its linear modules are named {_linear_names(model)}."
            )
    targets = []
    for name, module in matches.items():
        sizes = _sizes(module)
        if sizes is None:
            raise ZOError(
                f"target module {name!r} is a {type(module).__name__}, not a linear layer; name one of {_linear_names(model)}."
            )
        if _in_layers(model, name, layers):
            targets.append(Target(name, module, *sizes))
    if not targets:
        raise ZOError(
            f"layers={layers!r} leaves no target module; this model's layers are numbered {_layer_range(model, matches)}."
        )
    return targets


def layer_of(name: str) -> tuple[str, int] | None:
    """(stack, index) of a module path: "model.layers.3.mlp.up_proj" -> ("model.layers", 3)."""
    found = _LAYER.match(name)
    return (found[1], int(found[2])) if found else None


def _residual_targets(model: nn.Module, layers: int | Sequence[int] | None) -> list[Target]:
    """Whole layers of every stack; an adapter before one acts on the residual stream."""
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and layer_of(f"{name}.0") == (name, 0)
    }
    if size is None or not stacks:
        raise ZOError(f"target {RESIDUAL!r} needs a transformer with a list of layers and config.hidden_size.")
    targets = [
        Target(f"{stack}.{i}", layer, size, size, residual=True)
        for stack, stacked in stacks.items()
        for i, layer in enumerate(stacked)
        if _in_layers(model, f"{stack}.{i}", layers)
    ]
    return targets


def _in_layers(model: nn.Module, name: str, layers: int | Sequence[int] | None) -> bool:
    if layers is None:
        return True
    place = layer_of(name)
    if place is None:
        return False
    stack, index = place
    depth = len(list(model.get_submodule(stack).children()))
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise ZOError(
                f"layers={layers} is not possible in a stack of {depth}; give 1 to {depth}, a list, or None for all."
            )
        return index >= depth - layers
    wrong = [i for i in layers if not 0 <= i < depth]
    if wrong:
        raise ZOError(f"layers {wrong} do not exist; this model's layers are numbered 0 to {depth - 1}.")
    return index in layers


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None:  # GPT-2's linear layer, weight (in, out)
        return int(weight.shape[0]), int(weight.shape[1])
    return None


def _linear_names(model: nn.Module) -> str:
    names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if n and _sizes(m) is not None})
    return ", ".join(names) if names else "(none)"


def _layer_range(model: nn.Module, names: Sequence[str] | dict[str, nn.Module]) -> str:
    places = [p for p in map(layer_of, names) if p is not None]
    return f"0 to {max(i for _, i in places)}" if places else "in no list of layers (give layers=None)"
