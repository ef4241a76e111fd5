"""TT-SVD: a dense tensor -> the cores of a tensor train of given ranks."""

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
    ranks: int | Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """A train of given ranks (Oseledets 2011, algorithm 1): tensorly's ``tensor_train``, in float64 on the CPU.

    The error is at most sqrt(d - 1) times that of the best train of these ranks.

    Args:
        dense: prod(dims) entries, in row-major order of ``dims``; any shape, dtype and device.
        dims: (n_1..n_d), sizes of the cores.
        ranks: one for all bonds or one for each of the d - 1 bonds; lowered to the useful ones (``tt_kernels.useful_ranks``).
        dtype: of the cores.

    Returns:
        d cores (r_{k-1}, n_k, r_k) on the CPU, without gradient. All but the last are left-orthogonal, up to ``dtype``.

    Raises:
        ZOError: sizes that do not fit, NaN or infinite entries.

    Source: I. V. Oseledets, Tensor-train decomposition, SIAM J. Sci. Comput. 33(5), 2011.

    >>> cores = tt_svd(torch.eye(4).flatten(), (2, 2, 2, 2), (2, 4, 2))
    >>> [tuple(core.shape) for core in cores]
    [(1, 2, 2), (2, 2, 4), (4, 2, 2), (2, 2, 1)]
    """
    dims = tuple(dims)
    if not dims or any(type(n) is not int or n < 1 for n in dims):
        raise ZOError(f"dims={dims} is not possible; give one or more whole numbers of at least 1.")
    if dense.numel() != math.prod(dims):
        raise ZOError(f"dense has {dense.numel()} entries but dims={dims} need {math.prod(dims)}; make them fit.")
    if not dense.isfinite().all():
        raise ZOError("dense holds NaN or infinite values; give finite numbers.")
    values = dense.detach().double().cpu().reshape(*dims)
    return [core.to(dtype) for core in _of_ranks(values, ranks)]


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
