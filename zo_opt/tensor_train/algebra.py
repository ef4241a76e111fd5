"""Rounding, norm and inner product of tensor trains, without their dense tensors. tensorly 0.10 has none of these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_opt.errors import ZOError
from zo_opt.tensor_train.checks import Ranks, bond_error, check_bound, check_cores, cut


def tt_round(
    cores: Sequence[Tensor],
    ranks: Ranks | None = None,
    tolerance: float | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The train again with lower ranks: orthogonalise by QR, truncate by SVD (Oseledets 2011, algorithm 2).

    Costs O(d n r^3) and never forms the dense tensor. Computed in float64 on the CPU.

    Args:
        cores: (r_{k-1}, n_k, r_k), any dtype and device.
        ranks: the most for all bonds or for each of the d - 1 bonds; a bond that needs less keeps less.
        tolerance: relative Frobenius error, at least 0 and below 1: |given - returned| <= tolerance * |given|, up to the
            rounding of ``dtype``. About 1e-12 removes what is superfluous and nothing else.
        dtype: of the result; None: that of the first core.

    Returns:
        cores on the CPU, without gradient; all but the last are left-orthogonal, up to ``dtype``.

    Raises:
        ZOError: neither or both of ranks and tolerance, or cores that are not a train of finite numbers.

    >>> cores = [torch.ones(1, 3, 2), torch.ones(2, 4, 2), torch.ones(2, 5, 1)]  # every entry is 4
    >>> [tuple(core.shape) for core in tt_round(cores, tolerance=1e-6)]
    [(1, 3, 1), (1, 4, 1), (1, 5, 1)]
    """
    limits = check_bound(len(cores) - 1, ranks, tolerance) if cores else None
    train = right_orthogonal(cores)
    bonds = len(train) - 1
    error = bond_error(tolerance or 0.0, float(train[0].norm()), bonds)
    for k in range(bonds):
        left, n, _ = train[k].shape
        u_MR, v_RS = cut(train[k].flatten(0, 1), limits[k] if limits else None, error)
        train[k] = u_MR.reshape(left, n, -1)
        train[k + 1] = torch.tensordot(v_RS, train[k + 1], dims=1)
    return [core.to(dtype or cores[0].dtype) for core in train]


def right_orthogonal(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same tensor with every core but the first of orthonormal rows as a (r_{k-1}, n_k r_k) matrix, by QR.

    The first core carries the norm; ranks that no tensor of these dims can use are gone.

    Args:
        cores: (r_{k-1}, n_k, r_k), any dtype and device.

    Returns:
        float64 cores on the CPU, without gradient.

    Raises:
        ZOError: the cores are not a train of finite numbers.

    >>> [tuple(core.shape) for core in right_orthogonal([torch.ones(1, 3, 7), torch.ones(7, 2, 1)])]
    [(1, 3, 2), (2, 2, 1)]
    """
    train = check_cores(cores)
    for k in range(len(train) - 1, 0, -1):
        _, n, right = train[k].shape
        q_MR, r_RS = torch.linalg.qr(train[k].flatten(1).T)
        train[k] = q_MR.T.reshape(-1, n, right)
        train[k - 1] = torch.tensordot(train[k - 1], r_RS.T, dims=1)
    return train


def tt_norm(cores: Sequence[Tensor]) -> float:
    """The Frobenius norm of a train's tensor, in float64, accurate to rounding also where entries cancel.

    >>> round(tt_norm([torch.ones(1, 3, 2), torch.ones(2, 3, 1)]), 9)  # nine entries of 2
    6.0
    """
    return float(right_orthogonal(cores)[0].norm())


def tt_inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The sum of products of the entries of two trains of the same dims, in float64 (Oseledets 2011, section 4).

    Args:
        a: cores (r_{k-1}, n_k, r_k).
        b: cores (s_{k-1}, n_k, s_k); the ranks may differ.

    Raises:
        ZOError: the dims differ, or the cores are not trains of finite numbers.

    >>> ones, threes = [torch.ones(1, 2, 1), torch.ones(1, 5, 1)], [torch.ones(1, 2, 3), torch.ones(3, 5, 1)]
    >>> tt_inner(ones, threes)
    30.0
    """
    a, b = check_cores(a), check_cores(b)
    dims_a, dims_b = (tuple(core.shape[1] for core in train) for train in (a, b))
    if dims_a != dims_b:
        raise ZOError(f"trains of dims {dims_a} and {dims_b} have no inner product; give two of the same dims.")
    product_RS = torch.ones(1, 1, dtype=torch.float64)
    for a_RNr, b_SNs in zip(a, b, strict=True):
        left_SNr = torch.tensordot(product_RS.T, a_RNr, dims=1)
        product_RS = left_SNr.flatten(0, 1).T @ b_SNs.flatten(0, 1)
    return float(product_RS)
