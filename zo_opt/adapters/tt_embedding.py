"""A table of rows that is a tensor train: rows are looked up by contracting the slices of the chosen ids alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tt_kernels import useful_ranks

from zo_opt.adapters.targets import Target
from zo_opt.adapters.tt_linear import TensorTrain, TTLinear, digits, tt_dims


class TTEmbedding(TensorTrain):
    """Token ids (...) -> rows (..., prod out_dims), float32.

    Vocabularies are often prime or nearly so. The table therefore has at least as many rows as ids, prod in_dims; the rest
    is never looked up (a train of 50,257 rows would otherwise have a core of 50,257 slices).

    >>> table = TTEmbedding(50257, (4, 4), 2, device=torch.device("cpu"))
    >>> table.reset(torch.Generator().manual_seed(0))
    >>> table
    TTEmbedding(in_dims=(15, 15, 15, 15), out_dims=(4, 4), ranks=[2, 2, 2, 2, 2], rows=50257)
    >>> torch.allclose(table(torch.tensor([50256])), table.dense()[50256:], atol=1e-6)
    True
    """

    def __init__(self, rows: int, out_dims: Sequence[int], ranks: int | Sequence[int], *, device: torch.device) -> None:
        super().__init__(row_dims(rows), out_dims, ranks, device=device)
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        """Shape suffixes: T ids, R and S ranks, N = prod out_dims, K one input dim."""
        cores = list(self.cores)
        inputs = len(self.in_dims)
        ids_T = ids.flatten()
        stride = math.prod(self.in_dims)
        rows_TR = ids_T.new_ones(len(ids_T), 1, dtype=cores[0].dtype)
        for size, core in zip(self.in_dims, cores[:inputs], strict=True):
            stride //= size
            digits_T = ids_T // stride % size
            slices_TRS = core.transpose(0, 1)[digits_T]
            rows_TR = (rows_TR.unsqueeze(1) @ slices_TRS).squeeze(1)
        outputs_RN = cores[-1].flatten(1)
        for core in reversed(cores[inputs:-1]):
            outputs_RN = (core.flatten(0, 1) @ outputs_RN).reshape(core.shape[0], -1)
        out_TN: Tensor = rows_TR @ outputs_RN
        return out_TN.reshape(*ids.shape, outputs_RN.shape[1])

    def reset(self, generator: torch.Generator, variance: float | None = 1.0) -> None:
        """Gaussian cores; entries of the rows have variance 1, for a row is looked up and not summed over."""
        super().reset(generator, variance)

    @torch.no_grad()
    def decompose(self, matrix_MN: Tensor) -> None:
        """The TT-SVD of a table (rows, prod out_dims); the rows beyond it count as zero."""
        super().decompose(torch.nn.functional.pad(matrix_MN, (0, 0, 0, math.prod(self.in_dims) - self.rows)))

    def dense(self) -> Tensor:
        """The table, (rows, prod out_dims), float32."""
        return super().dense()[: self.rows]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self.rows}"


def row_dims(rows: int) -> tuple[int, ...]:
    """ceil(log16(rows)) factors as equal as possible, ascending, whose product is at least the number of rows.

    >>> row_dims(50257), row_dims(32000), row_dims(50), row_dims(1)
    ((15, 15, 15, 15), (13, 13, 14, 14), (7, 8), (1,))
    """
    dims: list[int] = []
    left = rows
    for parts in range(max(digits(rows - 1), 1), 0, -1):
        size = round(left ** (1 / parts))
        size = size if size**parts >= left else size + 1
        dims.append(size)
        left = -(-left // size)
    return tuple(sorted(dims))


def input_train(target: Target, out_dims: Sequence[int], rank: int) -> TTLinear | TTEmbedding:
    """A train from what enters the target (vectors, or ids of an embedding) to prod out_dims; no bias."""
    if target.embedding:
        rows = target.in_features
        ranks = useful_ranks((*row_dims(rows), *out_dims), rank)
        return TTEmbedding(rows, out_dims, ranks, device=target.device)
    in_dims = tt_dims(target.in_features)
    ranks = useful_ranks((*in_dims, *out_dims), rank)
    return TTLinear(in_dims, out_dims, ranks, bias=False, device=target.device)


def output_train(target: Target, in_dims: Sequence[int], rank: int) -> TTLinear:
    """A train from prod in_dims to what leaves the target; no bias."""
    out_dims = tt_dims(target.out_features)[::-1]
    ranks = useful_ranks((*in_dims, *out_dims), rank)
    return TTLinear(in_dims, out_dims, ranks, bias=False, device=target.device)
