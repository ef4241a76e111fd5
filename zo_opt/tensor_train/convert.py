"""Our cores to and from tensorly's ``TTTensor`` (a chain) and ``TTMatrix`` (input and output dims in pairs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tt_kernels import reconstruct

from zo_opt.errors import ZOError
from zo_opt.tensor_train.decompose import check_dims, tt_svd

if TYPE_CHECKING:  # importing tensorly costs time that most runs need not spend
    from tensorly.tt_matrix import TTMatrix
    from tensorly.tt_tensor import TTTensor


def to_tensorly(cores: Sequence[Tensor]) -> TTTensor:
    """A copy of the train as tensorly's, in arrays of the backend that tensorly has in the calling thread.

    Args:
        cores: (r_{k-1}, n_k, r_k), any device. float32 and float64 stay, 16-bit becomes float32 (numpy has no bfloat16).

    Raises:
        ZOError: the cores are not a train of finite numbers.

    >>> to_tensorly([torch.ones(1, 3, 2), torch.ones(2, 4, 1)]).to_tensor().shape
    (3, 4)
    """
    from tensorly.tt_tensor import TTTensor

    _check_cores(cores)
    return TTTensor([_to_backend(core) for core in cores])


def from_tensorly(train: TTTensor) -> list[Tensor]:
    """A copy of tensorly's train as cores (r_{k-1}, n_k, r_k) on the CPU, in its dtype.

    Raises:
        ZOError: it is not a train of finite numbers.

    >>> train = to_tensorly([torch.ones(1, 3, 2), torch.ones(2, 4, 1)])
    >>> [tuple(core.shape) for core in from_tensorly(train)]
    [(1, 3, 2), (2, 4, 1)]
    """
    cores = [_to_torch(factor) for factor in train]
    _check_cores(cores)
    return cores


def to_tt_matrix(
    cores: Sequence[Tensor], in_dims: Sequence[int], out_dims: Sequence[int], *, tolerance: float = 1e-12
) -> TTMatrix:
    """The same matrix as tensorly's ``TTMatrix``, whose core k (r, m_k, n_k, r') holds an input and an output dim together.

    That is another train of the matrix, with other ranks. Computed through the dense matrix, in float64 on the CPU.

    Args:
        cores: (r_{k-1}, n_k, r_k), input dims first.
        in_dims: (m_1..m_d).
        out_dims: (n_1..n_e); the shorter of the two lists is filled with ones at its end.
        tolerance: relative Frobenius error; the default drops only what is superfluous.

    Returns:
        max(d, e) cores in arrays of the backend that tensorly has in the calling thread; dtypes as ``to_tensorly``.

    Raises:
        ZOError: the cores are not a train of these dims, or hold NaN or infinite values.

    >>> matrix = to_tt_matrix([torch.ones(1, 4, 2), torch.ones(2, 3, 2), torch.ones(2, 5, 1)], (4, 3), (5,))
    >>> matrix.left_shape, matrix.right_shape, matrix.rank
    ((4, 3), (5, 1), (1, 1, 1))
    """
    from tensorly.tt_matrix import TTMatrix

    in_dims, out_dims = check_dims(in_dims, "in_dims"), check_dims(out_dims, "out_dims")
    train = _check_cores(cores)
    if (given := tuple(core.shape[1] for core in train)) != (*in_dims, *out_dims):
        raise ZOError(f"cores of dims {given} do not fit in_dims={in_dims} and out_dims={out_dims}.")
    length = max(len(in_dims), len(out_dims))
    ins, outs = ((*dims, *[1] * (length - len(dims))) for dims in (in_dims, out_dims))
    dense = reconstruct(train, in_dims, out_dims).reshape(*ins, *outs)
    paired = dense.permute([axis for k in range(length) for axis in (k, length + k)])
    pairs = list(zip(ins, outs, strict=True))
    found = tt_svd(paired, [m * n for m, n in pairs], tolerance=tolerance, dtype=_numpy_dtype(cores[0]))
    return TTMatrix([_to_backend(core.unflatten(1, pair)) for core, pair in zip(found, pairs, strict=True)])


def from_tt_matrix(matrix: TTMatrix, *, tolerance: float = 1e-12) -> list[Tensor]:
    """The same matrix as one of our trains: in_dims = ``matrix.left_shape``, out_dims = ``matrix.right_shape``.

    Through the dense matrix, in float64 on the CPU.

    Args:
        matrix: tensorly's; cores (r, m_k, n_k, r') of any backend on the CPU.
        tolerance: relative Frobenius error; the default drops only what is superfluous.

    Returns:
        cores (r_{k-1}, n_k, r_k) on the CPU, in the dtype of the first one given.

    Raises:
        ZOError: NaN or infinite entries.

    >>> matrix = to_tt_matrix([torch.ones(1, 4, 2), torch.ones(2, 5, 1)], (4,), (5,))
    >>> [tuple(core.shape) for core in from_tt_matrix(matrix)]
    [(1, 4, 1), (1, 5, 1)]
    """
    factors = [_to_torch(factor) for factor in matrix]
    train = _check_cores([factor.flatten(1, 2) for factor in factors])
    paired = reconstruct(train, [core.shape[1] for core in train], ())
    paired = paired.reshape([n for factor in factors for n in factor.shape[1:3]])
    dense = paired.permute([*range(0, paired.ndim, 2), *range(1, paired.ndim, 2)])
    return tt_svd(dense, tuple(dense.shape), tolerance=tolerance, dtype=factors[0].dtype)


def _check_cores(cores: Sequence[Tensor]) -> list[Tensor]:
    """The cores in float64 on the CPU, without gradient; ZOError unless they are a train of finite numbers."""
    if not cores:
        raise ZOError("no cores were given; a train has at least one, of shape (1, n, 1).")
    rank = 1
    for k, core in enumerate(cores):
        if core.ndim != 3 or core.shape[0] != rank or 0 in core.shape:
            raise ZOError(f"core {k} has shape {tuple(core.shape)}; give ({rank}, n, r), each at least 1.")
        if not core.isfinite().all():
            raise ZOError(f"core {k} holds NaN or infinite values; give finite numbers.")
        rank = core.shape[2]
    if rank != 1:
        raise ZOError(f"the last core has shape {tuple(cores[-1].shape)}; a train ends in rank 1.")
    return [core.detach().double().cpu() for core in cores]


def _to_backend(core: Tensor) -> Any:
    import tensorly

    return tensorly.tensor(core.detach().cpu().to(_numpy_dtype(core)).numpy())


def _numpy_dtype(core: Tensor) -> torch.dtype:
    return core.dtype if core.dtype in (torch.float32, torch.float64) else torch.float32


def _to_torch(factor: Any) -> Tensor:
    import tensorly

    return factor.detach().cpu().clone() if isinstance(factor, Tensor) else torch.tensor(tensorly.to_numpy(factor))
