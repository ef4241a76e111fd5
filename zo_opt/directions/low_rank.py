"""Directions of low rank in every matrix: LOZO's product of two thin factors, SubZero's random subspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from zo_opt.choices import Range, check_numbers
from zo_opt.directions.base import MatrixDirections, Stream
from zo_opt.directions.gaussian import normal

_CPU = torch.device("cpu")
_U, _V, _Z, _VECTOR = 11, 12, 13, 14  # which of a parameter's random sequences


@dataclass(frozen=True)
class _PlainVectors(MatrixDirections):
    rank: int
    interval: int

    def __post_init__(self) -> None:
        check_numbers(Range(least=1, whole=True), rank=self.rank, interval=self.interval)

    def vector(self, stream: Stream, parameter: int, size: int) -> Tensor:
        return _normal(*stream, parameter, _VECTOR, rows=size, columns=1).flatten()


@dataclass(frozen=True)
class LowRank(_PlainVectors):
    """z_W = U V^T: U (m, r) fresh in every step and query, V (n, r) kept for ``interval`` steps; Gaussian entries.

    Use it on whole matrices, as LOZO does.

    Source: LOZO, arXiv 2410.07698 (``interval`` is its nu). Entries have variance r: the estimate is g U V^T / r.

    Args:
        rank: r.
        interval: steps for which V is kept.
    """

    rank: int = 2
    interval: int = 50

    def rows(self, stream: Stream, parameter: int, shape: tuple[int, int], first: int, last: int) -> Tensor:
        epoch = stream.step // self.interval
        u = _normal(*stream, parameter, _U, rows=shape[0], columns=self.rank)
        v = _normal(stream.seed, epoch, stream.query, parameter, _V, rows=shape[1], columns=self.rank)
        return u[first:last] @ v.T

    def variance(self, shape: Sequence[int]) -> float:
        return float(self.rank) if len(shape) > 1 else 1.0


@dataclass(frozen=True)
class Subspace(_PlainVectors):
    """z_W = U Z V^T: U (m, r) and V (n, r) with orthonormal columns, drawn every ``interval`` steps; Z (r, r) Gaussian, fresh.

    Use it on whole matrices, as SubZero does.

    Source: SubZero, arXiv 2410.08989 (``interval`` is its F). A matrix with a side below ``rank`` takes that side as its rank.

    Args:
        rank: r.
        interval: steps for which the subspaces are kept.
    """

    rank: int = 32
    interval: int = 500

    def rows(self, stream: Stream, parameter: int, shape: tuple[int, int], first: int, last: int) -> Tensor:
        rank, epoch = min(self.rank, *shape), stream.step // self.interval
        u = _orthonormal(stream.seed, epoch, parameter, _U, rows=shape[0], columns=rank)
        v = _orthonormal(stream.seed, epoch, parameter, _V, rows=shape[1], columns=rank)
        z = _normal(*stream, parameter, _Z, rows=rank, columns=rank)
        return u[first:last] @ (z @ v.T)


@lru_cache(maxsize=16)  # the factors of the matrices that are being walked through, chunk by chunk
def _normal(*name: int, rows: int, columns: int) -> Tensor:
    return normal(name, 0, rows * columns, _CPU).view(rows, columns)


@lru_cache(maxsize=512)  # asked for again in every step and query
def _orthonormal(*name: int, rows: int, columns: int) -> Tensor:
    q, r = torch.linalg.qr(_normal(*name, rows=rows, columns=columns))
    unique: Tensor = q * r.diagonal().sign()  # the sign that makes the decomposition unique, hence uniform
    return unique
