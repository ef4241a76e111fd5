"""The parameters being tuned, as one axis."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from zo_opt.directions.base import Shapes, numel
from zo_opt.errors import ZOError

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHUNK = 1 << 18  # entries handled at a time: what a core keeps in its cache


@dataclass(frozen=True)
class Piece:
    """A range of the axis.

    Attributes:
        start, stop: the range.
        values: the trainables' own memory there, shape (stop - start,).
        parameter: number of the (first) parameter in it.
    """

    start: int
    stop: int
    values: Tensor
    parameter: int


def check_parameters(parameters: Sequence[Tensor]) -> None:
    """Whether these can be moved, each on its own.

    Raises:
        ZOError: one is complex, or of a type that cannot be added to, or without values; or two share memory.
    """
    for p in parameters:
        if is_lazy(p):
            raise ZOError("a trainable has no shape yet (a lazy module's); run the model once before its first step.")
        if p.layout != torch.strided:
            raise ZOError(f"a trainable of shape {tuple(p.shape)} is {p.layout}; train a dense one (.to_dense()).")
        if p.is_inference():
            raise ZOError(
                f"a trainable of shape {tuple(p.shape)} was made under torch.inference_mode(), and cannot be moved; make the model outside of it."
            )
        if p.is_complex():
            raise ZOError(
                f"a trainable of shape {tuple(p.shape)} is complex ({p.dtype}), and directions are real; train torch.view_as_real of it."
            )
        if p.dtype not in _DTYPES:
            raise ZOError(
                f"a trainable of shape {tuple(p.shape)} is {p.dtype}; train parameters in {', '.join(str(d) for d in _DTYPES)}."
            )
        if p.is_meta:
            raise ZOError(f"a trainable of shape {tuple(p.shape)} has no values (device meta); load the weights first.")
    memories = sorted((p.device.type, p.device.index or 0, p.data_ptr(), p.nbytes) for p in parameters if p.numel())
    for (*place, start, size), (*other, begin, _) in pairwise(memories):
        if start and place == other and start + size > begin:
            raise ZOError(
                "two trainables share memory (one is a view of the other, or was tied by .data), and would be moved twice; give the "
                "optimizer one of them, or tie modules to one and the same nn.Parameter."
            )


class Trainables:
    """Unique parameters side by side on one axis, in the order in which directions number them.

    Few entries (up to ``SMALL``: adapters) are gathered in one buffer that the parameters become views of, so that a sweep
    over hundreds of small tensors is one operation. Many entries (whole models) stay where they are.
    """

    SMALL = 1 << 23

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        for p in parameters:
            if not p.is_contiguous():
                raise ZOError(
                    "a trainable is not contiguous in memory; call .contiguous() on it before giving it to the optimizer."
                )
        self.parameters = list(parameters)
        self.shapes: Shapes = tuple(tuple(p.shape) for p in parameters)
        self.sizes = [numel(shape) for shape in self.shapes]
        self.ends = [*accumulate(self.sizes)]
        self.starts = [0, *self.ends[:-1]]
        self.total = self.ends[-1]
        self.small = self.total <= self.SMALL
        self.index = {id(p): i for i, p in enumerate(self.parameters)}
        self.opaque: frozenset[int] | None = None  # see Perturbed: found at the first evaluation
        self.flat = self._gather() if self.small else None
        self._ids = list(self.index)
        self._kinds = [_kind(p) for p in self.parameters]
        self._addresses = [p.data_ptr() for p in self.parameters]

    def is_current(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters, still in the memory where they were found."""
        return self.same_kinds(parameters) and [p.data_ptr() for p in parameters] == self._addresses

    def same_kinds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters, of the shapes, dtypes and devices in which they were found."""
        return list(map(id, parameters)) == self._ids and list(map(_kind, parameters)) == self._kinds

    def __reduce__(self) -> tuple[Any, ...]:
        return Trainables, (self.parameters,)  # of copies of the parameters, in memory of their own

    def memory(self, parameter: int) -> Tensor:
        """One parameter's entries as one axis, sharing its memory."""
        return self.parameters[parameter].detach().view(-1)

    def pieces(self, labels: Sequence[object] | None = None) -> Iterator[Piece]:
        """The whole axis in pieces: within one parameter in chunks, or over gathered neighbours with equal labels."""
        labels = labels if labels is not None else [None] * len(self.parameters)
        if self.flat is None:
            for i, (first, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
                memory = self.memory(i)
                for lo in range(0, size, CHUNK):
                    hi = min(lo + CHUNK, size)
                    yield Piece(first + lo, first + hi, memory[lo:hi], i)
            return
        first = 0
        for i, end in enumerate(self.ends):
            if i + 1 == len(self.ends) or labels[i + 1] != labels[first]:
                start = self.starts[first]
                for lo in range(start, end, CHUNK):
                    hi = min(lo + CHUNK, end)
                    yield Piece(lo, hi, self.flat[lo:hi], first)
                first = i + 1

    def spread(self, values: Tensor, start: int, stop: int) -> Tensor:
        """One value a parameter -> one an entry of the range, shape (stop - start,)."""
        first, last = bisect_right(self.ends, start), bisect_right(self.ends, stop - 1)
        if first == last:
            return values[first].expand(stop - start)
        bounds = [start, *self.starts[first + 1 : last + 1], stop]
        counts = torch.tensor([b - a for a, b in pairwise(bounds)], device=values.device)
        return values[first : last + 1].repeat_interleave(counts)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Rows of the whole axis, shape (n, total), as one tensor a parameter, shape (n, *parameter.shape)."""
        parts = rows.split(self.sizes, dim=1)
        return [part.view(len(rows), *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _gather(self) -> Tensor | None:
        """Move the parameters into one buffer; None where they cannot be (several dtypes or devices, shared memory)."""
        first = self.parameters[0]
        alike = all(
            p.dtype == first.dtype and p.device == first.device and type(p.data) is Tensor for p in self.parameters
        )
        shared = any((p.device.type == "cpu" and p.is_shared()) or _looked_at(p) for p in self.parameters)
        memories = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in self.parameters)
        overlapping = any(a[1] > b[0] for a, b in pairwise(memories))
        if not alike or shared or overlapping:
            return None
        if len(self.parameters) == 1:
            return first.detach().view(-1)
        flat = torch.cat([p.detach().view(-1) for p in self.parameters])
        # Each gets a storage of its own within the buffer: whoever saves a model takes one storage for one tensor.
        memory, size = flat.untyped_storage(), flat.element_size()
        for parameter, start, n in zip(self.parameters, self.starts, self.sizes, strict=True):
            own = memory[start * size : (start + n) * size]
            parameter.data = torch.empty(0, dtype=flat.dtype, device=flat.device).set_(
                own, 0, parameter.shape, parameter.stride()
            )
        return flat


def _kind(parameter: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return parameter.shape, parameter.dtype, parameter.device


def _looked_at(parameter: Tensor) -> bool:
    """Whether another tensor (or numpy array) looks at this memory and would be left behind by a move."""
    users = torch._C._storage_Use_Count(parameter.untyped_storage()._cdata)
    return bool(users > 2)  # the parameter and the storage object just made
