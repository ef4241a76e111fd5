"""A GGUF file read tensor by tensor, each brought into its final dtype as it arrives: the whole in float32 is never there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from zo_opt.system.layers import layer_of
from zo_opt.system.memory import MappedFiles, trim

_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' own: else threads read all tensors ahead of their use


@contextmanager
def read_one_by_one(*, narrow: bool) -> Iterator[None]:
    """Within this context models are loaded tensor by tensor.

    Args:
        narrow: matrices of linear layers within the stacks become bf16 at once, as ``set_precision`` makes them for a mixed base.
    """
    from transformers.pytorch_utils import Conv1D

    above: dict[nn.Module, tuple[nn.Module, str]] = {}

    def path(module: nn.Module) -> str:
        if module not in above:
            return ""
        parent, name = above[module]
        return f"{path(parent)}.{name}".lstrip(".")

    def note(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None:
            above[module] = parent, name

    def arrive(module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        MappedFiles(".gguf").let_go_of_all()
        if not (
            narrow and parameter.ndim == 2 and type(module) in (nn.Linear, Conv1D) and layer_of(path(module) + ".")
        ):
            return None
        new = nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
        vars(new).update(vars(parameter))  # transformers' marks
        trim()
        return new

    before: Any = os.environ.get(_ONE_BY_ONE)
    os.environ[_ONE_BY_ONE] = "1"
    hooks = [register_module_module_registration_hook(note), register_module_parameter_registration_hook(arrive)]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        os.environ.pop(_ONE_BY_ONE)
        if before is not None:
            os.environ[_ONE_BY_ONE] = before
