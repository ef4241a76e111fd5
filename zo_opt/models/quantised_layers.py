"""Frozen layers whose weights are kept in 8 or 4 bits: float32 in, products in a wider dtype, float32 out.

The numbers are torchao's or bitsandbytes' and so are the products. Weights are kept as buffers, plain tensors, so that whatever
moves, saves or fingerprints a model does as with any other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Kept(nn.Module):
    """Its tensors change places but never dtypes: ``model.float()`` and the like pass them by."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)  # type: ignore[no-any-return, no-untyped-call]


class QuantisedEmbedding(_Kept):
    """A frozen embedding whose rows are kept in int8; it gives float32.

    Args:
        weight: an Int8Tensor of torchao with a scale a row, (rows, features).
    """

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("qdata", weight.qdata)
        self.register_buffer("scale", weight.scale)

    def rows(self, ids: Tensor | list[int]) -> Tensor:
        """Rows as numbers, (*ids.shape, features) float32."""
        return int8_rows(self, ids)

    forward = rows

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"


class _Linear(nn.Module):
    """A linear layer whose ``product(x)``, x W^T without a bias, is a kernel's: known to autograd and to vmap."""

    bias: nn.Parameter | None
    in_features: int

    def product(self, x: Tensor) -> Tensor:
        """x W^T in the dtype of x."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        product = _product(x, self)
        return product if self.bias is None else product + self.bias

    @torch.no_grad()
    def dequantised(self) -> Tensor:
        """The weight as numbers, (in, out) float32: its products with unit vectors, exact in whatever form it is kept."""
        device = next(t.device for t in [*self.parameters(), *self.buffers()])
        product: Tensor = self(torch.eye(self.in_features, device=device)).float()
        return product if self.bias is None else product - self.bias.float()


class QuantisedLinear(_Kept, _Linear):
    """A frozen linear layer around a quantised weight of torchao.

    Args:
        weight: a tensor subclass of torchao, (out, in).
        bias: (out,) or None.
        dtype: of the products.
    """

    def __init__(self, weight: Any, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        self.mixes_rows = getattr(weight, "act_quant_kwargs", None) is not None  # what is multiplied is rounded, too
        self._dtype, self._kind = dtype, type(weight)
        self._names, self._context = weight.__tensor_flatten__()
        for name in self._names:
            self.register_buffer(name, getattr(weight, name))

    @property
    def weight(self) -> Any:
        """The weight as torchao's tensor, around this layer's buffers."""
        inner = {name: getattr(self, name) for name in self._names}
        return self._kind.__tensor_unflatten__(inner, self._context, None, None)

    def forward(self, x: Tensor) -> Tensor:
        product = _product(x.to(self._dtype), self).to(x.dtype)
        return product if self.bias is None else product + self.bias

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def rows(self, ids: Tensor | list[int]) -> Tensor:
        """Rows of an int8 weight as numbers, (*ids.shape, in) float32."""
        return int8_rows(self, ids)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._kind.__name__}"


def int8_rows(layer: Any, ids: Tensor | list[int]) -> Tensor:
    """Rows of symmetric int8 numbers with a scale a row, float32."""
    ids = torch.as_tensor(ids, device=layer.qdata.device)
    return F.embedding(ids, layer.qdata).float() * F.embedding(ids, layer.scale).float()


class _Product(torch.autograd.Function):
    """``layer.product(x)``. Copies under ``vmap`` become rows of one product: torch has no batching rule for such kernels."""

    @staticmethod
    def forward(x: Tensor, layer: Any) -> Tensor:
        product: Tensor = layer.product(x)
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, layer: Any) -> tuple[Tensor, int]:
        return _product(x.movedim(in_dims[0], 0), layer), 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.float() @ ctx.layer.dequantised().T).to(grad.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return _product(tangent, ctx.layer)


_product: Callable[[Tensor, Any], Tensor] = cast(Any, _Product).apply


@lru_cache(maxsize=1)
def bitsandbytes_layers() -> dict[str, type]:
    """bitsandbytes' two linear layers with float32 in and out, whatever they compute in."""
    import bitsandbytes

    class Linear8bit(_Linear, bitsandbytes.nn.Linear8bitLt):  # type: ignore[misc]
        mixes_rows = True  # columns with an outlier in any row are multiplied in float16

        def product(self, x: Tensor) -> Tensor:
            rows = x.flatten(0, -2).half()  # it takes three axes at most, and casts to float16 itself and says so
            out: Tensor = _without_bias(self, bitsandbytes.nn.Linear8bitLt, rows).to(x.dtype).unflatten(0, x.shape[:-1])
            return out

    class Linear4bit(_Linear, bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
        # Packing weights for the CPU in the first forward is undone when they are saved.
        support_avx512bf16_for_cpu = property(lambda self: False, lambda self, value: None)

        def product(self, x: Tensor) -> Tensor:
            out: Tensor = _without_bias(self, bitsandbytes.nn.Linear4bit, x)
            return out

    return {"bnb-int8": Linear8bit, "bnb-nf4": Linear4bit}


def _without_bias(layer: Any, kind: Any, x: Tensor) -> Any:
    """What bitsandbytes' forward gives of a layer that has no bias: it would cast one in place, for good."""
    bias, layer._parameters["bias"] = layer._parameters["bias"], None
    try:
        return kind.forward(layer, x)
    finally:
        layer._parameters["bias"] = bias
