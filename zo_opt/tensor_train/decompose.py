"""TT-SVD: a dense tensor -> the cores of a tensor train, of given ranks or within a given error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zo_opt.errors import ZOError
from zo_opt.tensor_train.backend import numpy_backend
from zo_opt.tensor_train.checks import Ranks, bond_error, check_bound, check_dims, cut


def tt_svd(
    dense: Tensor,
    dims: Sequence[int],
    ranks: Ranks | None = None,
    tolerance: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """A train of given ranks, or of the ranks that a relative error needs (Oseledets 2011, algorithm 1).

    Given ranks: tensorly's ``tensor_train``; the error is at most sqrt(d - 1) times that of the best train of these ranks.
    A tolerance, which tensorly does not offer: ours; |dense - train| <= tolerance * |dense| in the Frobenius norm, up to
    the rounding of ``dtype``. Computed in float64 on the CPU.

    Args:
        dense: prod(dims) entries, in row-major order of ``dims``; any shape, dtype and device.
        dims: (n_1..n_d), sizes of the cores.
        ranks: one for all bonds or one for each of the d - 1 bonds; lowered to the useful ones (``tt_kernels.useful_ranks``).
        tolerance: relative Frobenius error, at least 0 and below 1.
        dtype: of the cores.

    Returns:
        d cores (r_{k-1}, n_k, r_k) on the CPU, without gradient. All but the last are left-orthogonal, up to ``dtype``.

    Raises:
        ZOError: neither or both of ranks and tolerance, sizes that do not fit, NaN or infinite entries.

    Source: I. V. Oseledets, Tensor-train decomposition, SIAM J. Sci. Comput. 33(5), 2011.

    >>> cores = tt_svd(torch.eye(4).flatten(), (2, 2, 2, 2), (2, 4, 2))
    >>> [tuple(core.shape) for core in cores]
    [(1, 2, 2), (2, 2, 4), (4, 2, 2), (2, 2, 1)]
    >>> [tuple(core.shape) for core in tt_svd(torch.ones(8), (2, 2, 2), tolerance=1e-6)]
    [(1, 2, 1), (1, 2, 1), (1, 2, 1)]
    """
    dims = check_dims(dims)
    limits = check_bound(len(dims) - 1, ranks, tolerance)
    if dense.numel() != math.prod(dims):
        raise ZOError(f"dense has {dense.numel()} entries but dims={dims} need {math.prod(dims)}; make them fit.")
    if not dense.isfinite().all():
        raise ZOError("dense holds NaN or infinite values; give finite numbers.")
    values = dense.detach().double().cpu().reshape(*dims)
    if len(dims) == 1:
        cores = [values.reshape(1, -1, 1).clone()]
    elif limits is not None:
        cores = _of_ranks(values, limits)
    else:
        cores = _within(values, tolerance or 0.0)
    return [core.to(dtype) for core in cores]


def _of_ranks(values: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    with numpy_backend():
        from tensorly.decomposition import tensor_train

        return [torch.tensor(factor) for factor in tensor_train(values.numpy(), rank=[1, *ranks, 1])]


def _within(values: Tensor, tolerance: float) -> list[Tensor]:
    error = bond_error(tolerance, float(values.norm()), values.ndim - 1)
    cores, rest_RN = [], values.reshape(1, -1)
    for n in values.shape[:-1]:
        rank = len(rest_RN)
        u_MR, rest_RN = cut(rest_RN.reshape(rank * n, -1), None, error)
        cores.append(u_MR.reshape(rank, n, -1))
    return [*cores, rest_RN.unsqueeze(2)]
