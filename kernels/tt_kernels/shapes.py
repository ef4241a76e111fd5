"""Shapes of tensor trains: factorised sizes, core shapes, dense reconstruction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def factorize(size: int, parts: int) -> tuple[int, ...]:
    """At most ``parts`` factors above 1 whose product is ``size``, ascending, the largest as small as possible.

    A size with fewer prime factors than parts gives fewer factors; a prime (or 1) gives itself.

    >>> factorize(4096, 3), factorize(1024, 3), factorize(576, 3), factorize(97, 2), factorize(1, 2)
    ((16, 16, 16), (8, 8, 16), (8, 8, 9), (97,), (1,))
    """
    if size < 1 or parts < 1:
        raise ValueError(f"cannot factorise size {size} into {parts} parts; both must be at least 1")
    best = _factors(size, parts, 2)
    return min(best, key=lambda f: (f[-1], -f[0], len(f))) if best else (size,)


def core_shapes(
    in_dims: Sequence[int], out_dims: Sequence[int], ranks: int | Sequence[int]
) -> list[tuple[int, int, int]]:
    """Shapes (r_{k-1}, n_k, r_k) of a train's cores, input dims first, r_0 = r_end = 1; ``ranks``: one, or one a bond.

    >>> core_shapes((8, 9), (4,), 5)
    [(1, 8, 5), (5, 9, 5), (5, 4, 1)]
    """
    dims = [*in_dims, *out_dims]
    bonds = [ranks] * (len(dims) - 1) if isinstance(ranks, int) else list(ranks)
    if len(bonds) != len(dims) - 1:
        raise ValueError(f"{len(bonds)} ranks do not fit {len(dims)} dims; give one for each of {len(dims) - 1} bonds")
    left, right = [1, *bonds], [*bonds, 1]
    return [(left[k], n, right[k]) for k, n in enumerate(dims)]


def useful_ranks(dims: Sequence[int], ranks: int | Sequence[int]) -> list[int]:
    """Ranks lowered to what a tensor of these dims can use: the product of the dims on a bond's smaller side.

    >>> useful_ranks((8, 8, 9, 2), 32)
    [8, 18, 2]
    """
    bonds = [ranks] * (len(dims) - 1) if isinstance(ranks, int) else list(ranks)
    useful = [1]
    for k, rank in enumerate(bonds, start=1):
        useful.append(min(rank, useful[-1] * dims[k - 1], math.prod(dims[k:])))
    return useful[1:]


def reconstruct(cores: Sequence[Tensor], in_dims: Sequence[int], out_dims: Sequence[int]) -> Tensor:
    """The dense matrix of a train, shape (prod in_dims, prod out_dims)."""
    full = cores[0]
    for core in cores[1:]:
        full = torch.tensordot(full, core, dims=1)
    return full.reshape(math.prod(in_dims), math.prod(out_dims))


def _factors(size: int, parts: int, least: int) -> list[tuple[int, ...]]:
    """All ascending factorisations of ``size`` into 1 to ``parts`` factors of at least ``least``."""
    found: list[tuple[int, ...]] = [(size,)] if size >= least else []
    if parts > 1:
        for first in range(least, math.isqrt(size) + 1):
            if size % first == 0:
                found += [(first, *rest) for rest in _factors(size // first, parts - 1, first)]
    return found
