"""Directions in matrices as products of two thin factors that a method has of its own: from activations, from past estimates."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from zo_opt.directions.base import MatrixDirections, Stream
from zo_opt.directions.gaussian import normal

_CPU = torch.device("cpu")
_FACTOR, _PLAIN = 16, 17  # which of a parameter's random sequences


class Spanned(MatrixDirections):
    """z_W = L R, with factors for each stream and matrix; Gaussian entries in matrices that have none and in parameters of one axis.

    No line of DIRECTIONS: the factors are the optimizer's. What they are made from must not change: make another instead.
    """

    # Kept are the factors of the matrix that is walked through, block by block.
    _of: tuple[Stream, int] | None = None
    _factors: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def factors(self, stream: Stream, parameter: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """L (m, r) and R (r, n) of a matrix (m, n), float32, on the CPU; None: it has none."""

    def rows(self, stream: Stream, parameter: int, shape: tuple[int, int], first: int, last: int) -> Tensor:
        if self._of != (stream, parameter):
            self._factors = self.factors(stream, parameter, shape)
            self._of = (stream, parameter)
        if self._factors is None:
            n = shape[1]
            return normal((*stream, parameter, _PLAIN), first * n, last * n, _CPU).view(last - first, n)
        left, right = self._factors
        return left[first:last] @ right

    def vector(self, stream: Stream, parameter: int, size: int) -> Tensor:
        return normal((*stream, parameter, _PLAIN), 0, size, _CPU)


def fresh_factor(stream: Stream, parameter: int, rows: int, columns: int) -> Tensor:
    """Gaussian entries of a stream's own for a matrix's direction, (rows, columns), float32, on the CPU."""
    return normal((*stream, parameter, _FACTOR), 0, rows * columns, _CPU).view(rows, columns)
