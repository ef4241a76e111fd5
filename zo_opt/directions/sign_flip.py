"""One direction for all queries of a step, with rows and columns flipped by signs of each query's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_opt.directions.base import MatrixDirections, Stream
from zo_opt.directions.gaussian import normal
from zo_opt.directions.rademacher import signs

_CPU = torch.device("cpu")
KIND = 3


@dataclass(frozen=True)
class SignFlip(MatrixDirections):
    """z_q = Z * (a_q b_q^T): Z ~ N(0, I) shared by the step's queries, a_q and b_q sign vectors of the query; Z * a_q for vectors.

    Use it with split queries over many rows, as GRZO does: the rows share one product.

    Source: GRZO, arXiv 2606.02857. Each z_q alone is N(0, I); those of two queries are uncorrelated. For a linear layer
    Z x-products of a whole batch with a direction an example cost one product (flip input, multiply, flip output).
    """

    def rows(self, stream: Stream, parameter: int, shape: tuple[int, int], first: int, last: int) -> Tensor:
        m, n = shape
        shared = normal((stream.seed, stream.step, parameter, 15), first * n, last * n, _CPU).view(last - first, n)
        return shared * _flips(stream, parameter, 0, m)[first:last, None] * _flips(stream, parameter, 1, n)

    def vector(self, stream: Stream, parameter: int, size: int) -> Tensor:
        shared = normal((stream.seed, stream.step, parameter, 15), 0, size, _CPU)
        return shared * _flips(stream, parameter, 0, size)


def _flips(stream: Stream, parameter: int, side: int, size: int) -> Tensor:
    return signs((stream.seed, 2 * parameter + side + 1), (stream.query, stream.step, KIND), 0, size, _CPU)
