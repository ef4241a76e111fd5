"""Our cores to and from tensorly's ``TTTensor`` (a chain) and ``TTMatrix`` (input and output dims in pairs).

Shape suffixes: I, J one input and one output dim; L, R the bond to the left and to the right in the paired chain; P, Q the
same in the chain of the input dims, S, T in that of the output dims; M the bond in the middle of the train.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tt_kernels import reconstruct

from zo_opt.errors import ZOError
from zo_opt.tensor_train.algebra import tt_round
from zo_opt.tensor_train.backend import numpy_backend
from zo_opt.tensor_train.checks import check_cores, check_dims
from zo_opt.tensor_train.decompose import tt_svd

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

    check_cores(cores)
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
    check_cores(cores)
    return cores


def to_tt_matrix(
    cores: Sequence[Tensor], in_dims: Sequence[int], out_dims: Sequence[int], *, tolerance: float = 1e-12
) -> TTMatrix:
    """The same matrix as tensorly's ``TTMatrix``, whose core k (r, m_k, n_k, r') holds an input and an output dim together.

    That is another train of the matrix, with other ranks: up to r_k * s_k * R, from r_k of the input chain, s_k of the output
    chain and R in the middle of ours. Computed in float64 on the CPU, by products of cores followed by ``tt_round`` where these hold
    fewer numbers than the dense matrix, else by ``tt_svd`` of that.

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

    in_dims, out_dims, train = check_dims(in_dims, "in_dims"), check_dims(out_dims, "out_dims"), check_cores(cores)
    if (given := tuple(core.shape[1] for core in train)) != (*in_dims, *out_dims):
        raise ZOError(f"cores of dims {given} do not fit in_dims={in_dims} and out_dims={out_dims}.")
    inputs, outputs = _even_chains(train, len(in_dims))
    if _paired_size(inputs, outputs) < math.prod(in_dims) * math.prod(out_dims):
        paired = tt_round(_paired(inputs, outputs), tolerance=tolerance)
    else:
        paired = _paired_from_dense(reconstruct(train, in_dims, out_dims), inputs, outputs, tolerance)
    dtype = _numpy_dtype(cores[0])
    return TTMatrix(
        [
            _to_backend(core.to(dtype).unflatten(1, (a.shape[1], b.shape[1])))
            for core, a, b in zip(paired, inputs, outputs, strict=True)
        ]
    )


def from_tt_matrix(matrix: TTMatrix, *, tolerance: float = 1e-12) -> list[Tensor]:
    """The same matrix as one of our trains: in_dims = ``matrix.left_shape``, out_dims = ``matrix.right_shape``.

    Through the dense matrix, in float64 on the CPU: parting inputs from outputs needs a rank in the middle that the paired
    chain does not bound.

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
    from tensorly.tt_matrix import tt_matrix_to_tensor

    factors = [_to_torch(factor) for factor in matrix]
    with numpy_backend():
        dense = torch.tensor(tt_matrix_to_tensor([factor.double().numpy() for factor in factors]))
    return tt_svd(dense, tuple(dense.shape), tolerance=tolerance, dtype=factors[0].dtype)


def _even_chains(train: list[Tensor], split: int) -> tuple[list[Tensor], list[Tensor]]:
    """The input and the output chain, the shorter one filled with cores that change nothing.

    The input chain ends, the output chain begins with the middle bond.
    """
    inputs, outputs = train[:split], train[split:]
    middle_MM = torch.eye(inputs[-1].shape[2], dtype=torch.float64).unsqueeze(1)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    inputs += [middle_MM] * (len(outputs) - len(inputs))
    outputs += [one] * (len(inputs) - len(outputs))
    return inputs, outputs


def _paired_size(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Numbers in the largest core that ``_paired`` makes."""
    middle = outputs[0].shape[0]
    bonds = [1, *(a.shape[2] * b.shape[2] * middle for a, b in zip(inputs[:-1], outputs[:-1], strict=True)), 1]
    sizes = (a.shape[1] * b.shape[1] for a, b in zip(inputs, outputs, strict=True))
    return max(left * size * right for left, size, right in zip(bonds[:-1], sizes, bonds[1:], strict=True))


def _paired(inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """Cores (L, I*J, R), exactly: Kronecker products, with the middle bond's index handed along the whole chain.

    W[i, j] = sum_m A_1(i_1)..A_d(i_d)[m] B_1[m](j_1)..B_d(j_d): B_1 chooses m, the cores between hand it on, A_d takes it.
    """
    middle = outputs[0].shape[0]
    last = len(inputs) - 1
    eye_MM = torch.eye(middle, dtype=torch.float64)
    cores = []
    for k, (a_PIQ, b_SJT) in enumerate(zip(inputs, outputs, strict=True)):
        if last == 0:
            core = torch.einsum("pim,mjt->pijt", a_PIQ, b_SJT)
        elif k == 0:
            core = torch.einsum("piq,mjt->pijqtm", a_PIQ, b_SJT)
        elif k == last:
            core = torch.einsum("pim,sjt->psmijt", a_PIQ, b_SJT)
        else:
            core = torch.einsum("piq,sjt,mn->psmijqtn", a_PIQ, b_SJT, eye_MM)
        left = 1 if k == 0 else a_PIQ.shape[0] * b_SJT.shape[0] * middle
        cores.append(core.reshape(left, a_PIQ.shape[1] * b_SJT.shape[1], -1))
    return cores


def _paired_from_dense(dense_XY: Tensor, inputs: list[Tensor], outputs: list[Tensor], tolerance: float) -> list[Tensor]:
    """Cores (L, I*J, R) of the dense matrix (prod in_dims, prod out_dims)."""
    ins, outs = ([core.shape[1] for core in chain] for chain in (inputs, outputs))
    order = [axis for pair in zip(range(len(ins)), range(len(ins), 2 * len(ins)), strict=True) for axis in pair]
    paired = dense_XY.reshape(*ins, *outs).permute(order)
    sizes = [i * j for i, j in zip(ins, outs, strict=True)]
    return tt_svd(paired, sizes, tolerance=tolerance, dtype=torch.float64)


def _to_backend(core: Tensor) -> Any:
    import tensorly

    return tensorly.tensor(core.detach().cpu().to(_numpy_dtype(core)).numpy())


def _numpy_dtype(core: Tensor) -> torch.dtype:
    return core.dtype if core.dtype in (torch.float32, torch.float64) else torch.float32


def _to_torch(factor: Any) -> Tensor:
    import tensorly

    return factor.detach().cpu().clone() if isinstance(factor, Tensor) else torch.tensor(tensorly.to_numpy(factor))
