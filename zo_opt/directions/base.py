"""What a direction is, and the directions of one step.

All trainables stand side by side on one axis, flattened, in the optimizer's order. A direction is a function of (seed, step,
query) and the position on that axis, and of nothing else: any range of it can be drawn alone, in any order, on any rank; the
global random state is never touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import accumulate
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]


class Stream(NamedTuple):
    """Which direction: of which run (``seed``), step and query."""

    seed: int
    step: int
    query: int


class Directions(ABC):
    """A distribution of directions, with mean zero. Its options are the fields of a frozen dataclass."""

    def variance(self, shape: Sequence[int]) -> float:
        """Of the entries over a parameter of this shape. Estimates are divided by it: the mean of g z is it times the gradient."""
        del shape
        return 1.0

    @abstractmethod
    def draw(self, stream: Stream, shapes: Shapes, start: int, stop: int, device: torch.device) -> Tensor:
        """Entries ``start`` to ``stop`` of the direction over parameters of these shapes: float32, shape (stop - start,)."""


class MatrixDirections(Directions):
    """Directions with a structure of their own in every matrix; parameters of one axis get plain Gaussian entries.

    Parameters of more than two axes count as matrices (first axis x all others) [choice]. Rows are drawn in blocks of fixed
    bounds: a matrix product's last bits depend on its size, and a range must not depend on how it is cut.
    """

    BLOCK: ClassVar[int] = 1 << 16  # entries

    @abstractmethod
    def rows(self, stream: Stream, parameter: int, shape: tuple[int, int], first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` of one matrix's direction: float32, on the CPU."""

    @abstractmethod
    def vector(self, stream: Stream, parameter: int, size: int) -> Tensor:
        """The direction of one parameter with one axis: float32, shape (size,), on the CPU."""

    def draw(self, stream: Stream, shapes: Shapes, start: int, stop: int, device: torch.device) -> Tensor:
        parts = []
        for parameter, lo, hi in pieces(shapes, start, stop):
            shape = shapes[parameter]
            size = numel(shape)
            if len(shape) < 2:
                parts.append(self.vector(stream, parameter, size)[lo:hi])
                continue
            matrix = (shape[0], size // shape[0])
            block = max(1, self.BLOCK // matrix[1])  # rows
            for first in range(lo // matrix[1] // block * block, -(-hi // matrix[1]), block):
                rows = self.rows(stream, parameter, matrix, first, min(first + block, matrix[0])).flatten()
                offset = first * matrix[1]
                parts.append(rows[max(lo - offset, 0) : hi - offset])
        return (torch.cat(parts) if parts else torch.empty(0)).to(device)


def pieces(shapes: Shapes, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(parameter, first entry, last entry + 1) of every parameter that the range ``start`` to ``stop`` meets.

    >>> list(pieces(((2, 3), (4,)), 4, 8))
    [(0, 4, 6), (1, 0, 2)]
    """
    offset = 0
    for parameter, shape in enumerate(shapes):
        size = numel(shape)
        lo, hi = max(start - offset, 0), min(stop - offset, size)
        if lo < hi:
            yield parameter, lo, hi
        offset += size


def numel(shape: Sequence[int]) -> int:
    """Entries of a tensor of this shape."""
    entries = 1
    for n in shape:
        entries *= n
    return entries


class StepDirections:
    """The directions of one step; kept in memory while they are few, redrawn otherwise."""

    KEPT = 1 << 23  # entries: 32 MiB

    def __init__(self, kind: Directions, seed: int, step: int, parameters: Sequence[Tensor]) -> None:
        self.kind, self.seed, self.step = kind, seed, step
        self._shapes: Shapes = tuple(tuple(p.shape) for p in parameters)
        self._ends = list(accumulate(numel(shape) for shape in self._shapes))
        self._devices = [p.device for p in parameters]
        self._one_device = len(set(self._devices)) == 1
        self._kept: list[Tensor] = []

    def range(self, query: int, start: int, stop: int) -> Tensor:
        """Entries of one query's direction, on the device of the parameters there: float32, shape (stop - start,).

        What comes back must not be changed in place.
        """
        self._keep(query)
        if query < len(self._kept):
            return self._kept[query][start:stop]
        device = self._devices[min(bisect_right(self._ends, start), len(self._ends) - 1)]
        return self.kind.draw(self.stream(query), self._shapes, start, stop, device)

    def of_step(self, step: int, kind: Directions | None = None) -> StepDirections:
        """Those of another step over the same parameters, of the same kind if none is given."""
        other = copy(self)
        other.kind, other.step, other._kept = kind or self.kind, step, []
        return other

    def stream(self, query: int) -> Stream:
        """The name of one query's direction."""
        return Stream(self.seed, self.step, query)

    def _keep(self, query: int) -> None:
        """Draw whole directions up to this one, where that is little on one device."""
        total = self._ends[-1]
        if query < len(self._kept) or (query + 1) * total > self.KEPT or not self._one_device:
            return
        for q in range(len(self._kept), query + 1):
            self._kept.append(self.kind.draw(self.stream(q), self._shapes, 0, total, self._devices[0]))
