"""The layers of a forward pass through ``torch.compile``, one by one.

One layer at a time: layers of a kind share one compiled graph, so that compiling takes as long as one layer does, and cached
prefixes go on as they are. Shapes are dynamic: a batch of another length compiles nothing anew. Parameters are inputs of the
graph, so that a perturbation in place is seen. ``vmap`` does not reach into compiled layers: sequential query mode alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from zo_opt.adapters import AdapterModel
from zo_opt.system.layers import layer_of


def running_layers(model: AdapterModel, first: int = 0) -> list[nn.Module]:
    """The layers that run in a step: of every stack those from number ``first`` on."""
    stacks = {place[0] for name, _ in model.wrapped.named_modules() if (place := layer_of(name)) is not None}
    return [layer for stack in sorted(stacks) for layer in list(model.wrapped.get_submodule(stack).children())[first:]]


@torch.no_grad()
def compile_layers(layers: Sequence[nn.Module], trial: Callable[[], Any]) -> str | None:
    """Compile layers in place and run a trial, which is when compiling happens.

    Args:
        layers: modules.
        trial: a forward pass through them.

    Returns:
        None; or why it failed, in which case the layers are as they were.
    """
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        trial()
    except Exception as error:  # the compiler's errors have no class in common
        undo(layers)
        trial()  # what fails without the compiler too is not the compiler's
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return " ".join(lines[:2]) or type(error).__name__  # the first may say no more than which backend raised
    return None


def undo(layers: Sequence[nn.Module]) -> None:
    """Let layers run as Python again."""
    for layer in layers:
        layer._compiled_call_impl = None
