"""Weights as matrices (in, out), whatever layer holds them; weights that several layers share."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from zo_opt.errors import ZOError


def matrix(layer: nn.Module) -> Tensor:
    """The weight as a matrix (in_features, out_features), a view: of nn.Linear, transformers' Conv1D, nn.Embedding.

    Of a layer that says what its quantised weight stands for (``dequantised()``) a copy of that.

    Raises:
        ZOError: the layer has no such weight (one that another package quantised, say).

    >>> matrix(nn.Linear(2, 3)).shape, matrix(nn.Embedding(7, 3)).shape
    (torch.Size([2, 3]), torch.Size([7, 3]))
    """
    if is_quantised(layer):
        dequantised: Tensor = layer.dequantised()  # type: ignore[operator]
        return dequantised
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ZOError(
            f"the weight of a {type(layer).__name__} is no matrix of floating-point numbers; load the model without quantisation."
        )
    return weight.detach() if _is_in_by_out(layer) else weight.detach().T


def set_matrix(layer: nn.Module, value: Tensor) -> None:
    """Give a layer a new weight, (in, out), in the old one's dtype and device. Layers that shared the old one keep it.

    Raises:
        ZOError: the layer's weight is quantised.
    """
    if is_quantised(layer):
        raise ZOError(
            "an adapter cannot be merged into a quantised weight, which would round most of it away; load the model without "
            "quantisation and merge there (zo-opt merge does), or keep the adapter attached (load_adapter_model)."
        )
    old = layer.weight
    assert isinstance(old, Tensor)
    new = value if _is_in_by_out(layer) else value.T
    layer.weight = nn.Parameter(new.to(old.device, old.dtype).contiguous(), requires_grad=old.requires_grad)


def rows(layer: Any, ids: Tensor | list[int]) -> Tensor:
    """Rows of the weight of an embedding or output head by their numbers, (*ids.shape, features) float32, quantised or not.

    >>> rows(nn.Embedding(7, 3), [[1, 2]]).shape
    torch.Size([1, 2, 3])
    """
    found: Tensor = layer.rows(ids) if hasattr(layer, "rows") else layer.weight[torch.as_tensor(ids)].float()
    return found


def is_quantised(layer: nn.Module) -> bool:
    """Whether it is a layer that keeps its weight in few bits and can say what they stand for."""
    return hasattr(layer, "dequantised")


def untie(model: nn.Module) -> None:
    """Give every module its own copy of parameters that several modules share, and say so in the model's config.

    The config has one switch for all of them (``tie_word_embeddings``), so that none can stay shared when one must part. An encoder-decoder's
    is left alone: some (UMT5, Switch) scale their logits where it is set, and a file with weights that differ is loaded as it is.
    """
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
            seen.add(id(parameter))
    config: Any = getattr(model, "config", None)
    parts: tuple[Any, Any] = (config, getattr(config, "text_config", None))
    for part in parts:
        if getattr(part, "tie_word_embeddings", False) and not getattr(part, "is_encoder_decoder", False):
            part.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        vars(model)["all_tied_weights_keys"] = {}  # transformers' record of them


def shared_parameters(model: nn.Module) -> set[int]:
    """ids of the parameters that more than one module holds.

    >>> net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    >>> net[1].weight = net[0].weight
    >>> shared_parameters(net) == {id(net[0].weight)}
    True
    """
    held = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    return {i for i, times in Counter(held).items() if times > 1}


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is (in, out); by name, for transformers is not imported here."""
    return any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)


def _is_in_by_out(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding) or is_conv1d(layer)
