"""Forwards at other values of the trainables without touching them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CHUNK = 1 << 22  # entries of a large weight made at a time: few enough to bound memory, enough for full-speed products
Values = Callable[[int, int, int], Tensor]  # (parameter, first entry, last entry + 1) -> its values there, one axis

# What describes a tensor and not its values.
_PROPERTIES = (
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "is_cuda", "is_cpu"),
    *("is_sparse", "is_quantized", "is_meta", "itemsize", "nbytes", "_version", "_backward_hooks"),
)
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.element_size, Tensor.is_contiguous),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.__len__, torch.is_floating_point),
    *(torch.is_complex, torch.numel, Tensor.data_ptr, Tensor.storage_offset, Tensor.__hash__, Tensor.is_shared),
}


class Substitution(TorchFunctionMode):
    """While it is active, every torch function sees other values in place of the trainables.

    The values of a parameter are made when a function asks for it and freed after: no more than one layer's are in memory at
    a time. Large weights of linear layers and embeddings are made a chunk of rows at a time.

    Args:
        index: the trainables' numbers by ``id``.
        replacement: a trainable's number -> the tensor to use in its place.
        values: the same for part of a parameter; without it large layers are not cut.
        chunk: entries of a linear layer made at a time.

    Attributes:
        seen: numbers of the trainables that were asked for.
    """

    def __init__(
        self,
        index: Mapping[int, int],
        replacement: Callable[[int], Tensor],
        values: Values | None = None,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        self._index, self._replacement, self._values, self._chunk = index, replacement, values, chunk
        self.seen: set[int] = set()

    @torch._disable_dynamo  # type: ignore[attr-defined]  # a compiled model would have it traced for every layer
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(*args, **kwargs)
        if self._values is not None and len(args) > 1 and (read := self._partial(func, args, kwargs)) is not None:
            return read
        return func(*self._replace(args), **{k: self._replace(v) for k, v in kwargs.items()})

    def _partial(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The result where a large weight need not be made as a whole; else None."""
        for position in (0, 1):
            number, weight = self._index.get(id(args[position])), args[position]
            if number is None or weight.numel() <= self._chunk or weight.ndim != 2:
                continue
            if func is F.linear and position == 1:
                self.seen.add(number)
                return self._linear(number, *args, **kwargs)
            ids = args[1 - position]
            # torch names all of an embedding's arguments but the first two.
            embedding = func is F.embedding and position == 1 and kwargs.get("max_norm") is None
            if embedding or (func is Tensor.__getitem__ and position == 0 and _are_rows(ids, len(weight))):
                self.seen.add(number)
                return self._rows(number, ids if embedding else ids % len(weight), weight)
        return None

    def _replace(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            number = self._index.get(id(value))
            if number is None:
                return value
            self.seen.add(number)
            return self._replacement(number)
        if type(value) in (tuple, list):
            return type(value)(self._replace(v) for v in value)
        return value

    def _linear(self, number: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b, a chunk of W's rows at a time."""
        assert self._values is not None
        x, bias = self._replace(x), self._replace(bias)
        rows, columns = weight.shape
        step = max(1, self._chunk // columns)
        out: Tensor | None = None
        for first in range(0, rows, step):
            last = min(first + step, rows)
            part = self._values(number, first * columns, last * columns).view(-1, columns)
            product = F.linear(x, part, None if bias is None else bias[first:last])
            if out is None:
                out = product.new_empty(*product.shape[:-1], rows)
            out[..., first:last] = product
        assert out is not None
        return out

    def _rows(self, number: int, ids: Tensor, weight: Tensor) -> Tensor:
        """W[ids], making only windows of rows that are asked for."""
        assert self._values is not None
        columns = weight.shape[1]
        wanted, inverse = torch.unique(ids, return_inverse=True)
        window = max(1, (1 << 16) // columns)
        out = weight.new_empty(len(wanted), columns)
        counts = torch.unique_consecutive(wanted // window, return_counts=True)[1]
        done = 0
        for count in counts.tolist():
            picked = wanted[done : done + count]
            first, last = int(picked[0]), int(picked[-1]) + 1
            rows = self._values(number, first * columns, last * columns).view(-1, columns)
            out[done : done + count] = rows[picked - first]
            done += count
        return F.embedding(inverse, out)


def _are_rows(index: Any, rows: int) -> bool:
    """Whether this is a tensor of row numbers; negative ones count from the end."""
    whole = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.numel() > 0
    return whole and -rows <= int(index.min()) and int(index.max()) < rows
