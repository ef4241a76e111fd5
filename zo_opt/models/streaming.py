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

from zo_opt.models.quantisation import KINDS, few_bits, is_in_few_bits
from zo_opt.system.layers import layer_of
from zo_opt.system.memory import MappedFiles, trim

Above = dict[nn.Module, tuple[nn.Module, str]]  # module -> its parent, and its name there
_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' own: else threads read all tensors ahead of their use


@contextmanager
def read_one_by_one(form: str) -> Iterator[None]:
    """Within this context models are loaded tensor by tensor.

    Args:
        form: what ``set_precision`` will bring the model into, on this CPU: "fp32", "mixed" or, say, "mixed, int4". What it makes of the
            matrices of linear layers, and of embeddings, is made of each as it arrives.
    """
    from transformers.pytorch_utils import Conv1D

    precision, _, kind = form.partition(", ")
    products = torch.bfloat16 if precision == "mixed" else torch.float32
    above: Above = {}

    def note(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None:
            above[module] = parent, name

    def final(module: nn.Module, parameter: nn.Parameter, files: MappedFiles) -> torch.Tensor | None:
        """What is kept of a matrix; None if that is the matrix itself."""
        within = layer_of(_path(module, above) + ".") and type(module) in (nn.Linear, Conv1D)
        if kind and within and type(module) is nn.Linear:
            return few_bits(parameter.detach(), kind, parameter.device, products, files)
        if within and precision == "mixed":
            return parameter.detach().to(torch.bfloat16)
        if kind and KINDS[kind] == "torchao" and _is_embedding(module, above):
            return few_bits(parameter.detach(), "int8", parameter.device, products, files)
        return None

    def arrive(module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or module not in above:
            return None
        files = MappedFiles(".gguf")
        files.let_go_of_all()
        if parameter.ndim != 2 or is_in_few_bits(parameter) or (few := final(module, parameter, files)) is None:
            return None
        new = few if isinstance(few, nn.Parameter) else nn.Parameter(few, requires_grad=False)
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


def _path(module: nn.Module, above: Above) -> str:
    if module not in above:
        return ""
    parent, name = above[module]
    return f"{_path(parent, above)}.{name}".lstrip(".")


def _is_embedding(module: nn.Module, above: Above) -> bool:
    """Whether it is its model's input embedding, or the output head to that."""
    model: Any = module
    while model in above:
        model = above[model][0]
    embedding = model.get_input_embeddings()
    return type(embedding) is nn.Embedding and (
        module is embedding or (type(module) is nn.Linear and module is model.get_output_embeddings())
    )
