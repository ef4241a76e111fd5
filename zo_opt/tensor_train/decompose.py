"""TT-SVD: a dense tensor -> the cores of a tensor train, of given ranks or within a given error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from zo_opt.errors import ZOError


def tt_svd(
    dense: Tensor,
    dims: Sequence[int],
    ranks: int | Sequence[int] | None = None,
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
    if (ranks is None) == (tolerance is None):
        given = "neither was" if ranks is None else "both were"
        raise ZOError(f"give either ranks or a tolerance; {given} given.")
    if dense.numel() != math.prod(dims):
        raise ZOError(f"dense has {dense.numel()} entries but dims={dims} need {math.prod(dims)}; make them fit.")
    if not dense.isfinite().all():
        raise ZOError("dense holds NaN or infinite values; give finite numbers.")
    values = dense.detach().double().cpu().reshape(*dims)
    cores = _of_ranks(values, ranks) if ranks is not None else _within(values, tolerance or 0.0)
    return [core.to(dtype) for core in cores]


def check_dims(dims: Sequence[int], name: str = "dims") -> tuple[int, ...]:
    """The dims as a tuple; ZOError unless they are one or more whole numbers of at least 1."""
    if not dims or any(type(n) is not int or n < 1 for n in dims):
        raise ZOError(f"{name}={tuple(dims)} is not possible; give one or more whole numbers of at least 1.")
    return tuple(dims)


def _of_ranks(values: Tensor, ranks: int | Sequence[int]) -> list[Tensor]:
    bonds = values.ndim - 1
    listed = [ranks] * bonds if isinstance(ranks, int) else list(ranks)
    if len(listed) != bonds or any(type(r) is not int or r < 1 for r in listed):
        raise ZOError(
            f"ranks={ranks} is not possible; give a whole number, or one for each of {bonds} bonds, at least 1."
        )
    if bonds == 0:
        return [values.reshape(1, -1, 1).clone()]
    with _numpy_backend():
        from tensorly.decomposition import tensor_train

        return [torch.tensor(factor) for factor in tensor_train(values.numpy(), rank=[1, *listed, 1])]


def _within(values: Tensor, tolerance: float) -> list[Tensor]:
    """Shape suffixes: R the bond to the left, M rows, N columns, K all singular values."""
    if not 0 <= tolerance < 1:
        raise ZOError(f"tolerance={tolerance} is not possible; give a relative error of at least 0 and below 1.")
    # What may be cut at each bond so that all cuts together stay within the tolerance: Oseledets 2011, theorem 2.2.
    error = tolerance * float(values.norm()) / math.sqrt(max(values.ndim - 1, 1))
    cores, rest_RN = [], values.reshape(1, -1)
    for n in values.shape[:-1]:
        left = len(rest_RN)
        u_MK, s_K, v_KN = torch.linalg.svd(rest_RN.reshape(left * n, -1), full_matrices=False)
        lost_K = s_K.square().flip(0).cumsum(0).flip(0).sqrt()  # entry k: the error when k values are kept
        rank = max(1, int((lost_K > error).sum()))
        cores.append(u_MK[:, :rank].reshape(left, n, rank))
        rest_RN = s_K[:rank, None] * v_KN[:rank]
    return [*cores, rest_RN.clone().unsqueeze(2)]


@contextmanager
def _numpy_backend() -> Iterator[None]:
    """tensorly computes with numpy inside; afterwards the calling thread has its own backend again.

    ``tensorly.backend_context(..., local_threadsafe=True)`` is not enough: when it ends it makes the thread's former backend that
    of *all* threads (seen in 0.10.0). tensorly is imported here, so that importing zo_opt does not cost it.
    """
    import tensorly

    former = tensorly.get_backend()
    if former == "numpy":
        yield
        return
    tensorly.set_backend("numpy", local_threadsafe=True)
    try:
        yield
    finally:
        tensorly.set_backend(former, local_threadsafe=True)
