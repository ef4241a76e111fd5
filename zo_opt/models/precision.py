"""The frozen base in mixed form: bf16 matrix weights and products; fp32 residual stream, norms, head and loss. Or quantised.

Measured with benchmarks/precision.py (48 directions, tensor trains in the last 8 layers): correlation of projected gradients
with fp32's 0.79 at zo_eps 1e-3 and 0.997 at 1e-2, against 0.57 and 0.990 with everything in bf16.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.errors import ZOError
from zo_opt.models.quantisation import adopt, quantise, quantised_layers
from zo_opt.system.layers import layer_of
from zo_opt.system.memory import MappedFiles, pieces

Precision = Literal["auto", "mixed", "fp32"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


class MixedLinear(nn.Linear):
    """A frozen linear layer with a bf16 weight: fp32 in, bf16 product, fp32 out."""

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return product if self.bias is None else product + self.bias


@lru_cache(maxsize=1)
def _mixed_conv1d(conv1d: type) -> type:
    """Conv1D with a bf16 weight: fp32 in, bf16 product, fp32 out."""

    class MixedConv1D(conv1d):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            product: Tensor = (x.to(self.weight.dtype) @ self.weight).to(x.dtype) + self.bias
            return product

    return MixedConv1D


def set_precision(model: nn.Module, precision: str, device: torch.device) -> str:
    """Bring a model into the form asked for, in place; returns the form taken: "mixed", "fp32" or, say, "mixed, int4".

    Args:
        model: a model without adapters.
        precision: "mixed", "fp32", or "auto": mixed where the device multiplies bf16 matrices in hardware. After a comma a kind of
            quantisation, the products of which are then in bf16 (mixed) or fp32.
        device: where the model will run.

    Raises:
        ZOError: a precision or a quantisation that there is not, or that the model cannot be brought into.
    """
    precision, _, kind = precision.partition(", ")
    precision = taken_precision(check_precision(precision), device)
    files = MappedFiles()
    products = torch.bfloat16 if precision == "mixed" else torch.float32
    adopt(model, products)
    if kind:
        quantise(model, kind, device, products)
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    kinds: dict[type, type] = {nn.Linear: MixedLinear, Conv1D: _mixed_conv1d(Conv1D)}
    kept = {id(t) for layer in quantised_layers(model) for t in [*layer.parameters(), *layer.buffers()]}
    for name, module in model.named_modules() if precision == "mixed" else ():
        if type(module) in kinds and module.weight.is_floating_point() and layer_of(name):
            module.__class__ = kinds[type(module)]  # names, hooks and isinstance checks stay as they are
            module.weight.data = _converted(module.weight.data, torch.bfloat16, files)
            kept.add(id(module.weight))
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and id(tensor) not in kept:
            tensor.data = _converted(tensor.data, torch.float32, files)
    taken = f"{precision}, {kind}" if kind else precision
    model.base_precision = taken  # type: ignore[assignment]  # which adapters are saved with
    return taken


def _converted(tensor: Tensor, dtype: torch.dtype, files: MappedFiles) -> Tensor:
    """A tensor in another dtype, of which and of whose old form no whole second copy is ever resident."""
    if tensor.dtype == dtype:
        return tensor
    new = torch.empty_like(tensor, dtype=dtype)
    for old, piece in zip(pieces(tensor), pieces(new), strict=True):
        piece.copy_(old)
        files.let_go(old)
    return new


def taken_precision(precision: Precision, device: torch.device) -> Precision:
    """What a precision is on a device: "auto" is mixed where bf16 matrices are multiplied in hardware, else fp32."""
    return precision if precision != "auto" else "mixed" if bf16_is_fast(device) else "fp32"


def check_precision(name: str) -> Precision:
    """The name, if there is such a precision.

    Raises:
        ZOError: there is none.
    """
    if name not in PRECISIONS:
        raise ZOError(f"precision={name!r} is not known; choose one of {', '.join(PRECISIONS)}.")
    return cast(Precision, name)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device has bf16 matrix instructions (AMX or AVX-512 BF16 on CPUs)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
