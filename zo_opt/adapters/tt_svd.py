"""TT-SVD by tensorly: a dense tensor -> the cores of a tensor train of bounded ranks."""

from __future__ import annotations

from collections.abc import Sequence

import tensorly
import torch
from tensorly.decomposition import tensor_train
from torch import Tensor


def tt_svd(dense: Tensor, dims: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """The best-known quasi-optimal train of given ranks (Oseledets 2011, algorithm 1), computed in float64.

    Args:
        dense: prod(dims) entries, in row-major order of ``dims``.
        dims: sizes of the cores.
        ranks: one for each of the len(dims) - 1 bonds; at most the useful ones.

    Returns:
        float32 cores (r_{k-1}, n_k, r_k) on the CPU.

    >>> cores = tt_svd(torch.eye(4).flatten(), (2, 2, 2, 2), (2, 4, 2))
    >>> [tuple(core.shape) for core in cores]
    [(1, 2, 2), (2, 2, 4), (4, 2, 2), (2, 2, 1)]
    """
    with tensorly.backend_context("numpy", local_threadsafe=True):
        array = dense.detach().double().cpu().reshape(*dims).numpy()
        factors = tensor_train(array, rank=[1, *ranks, 1])
        return [torch.tensor(factor, dtype=torch.float32) for factor in factors]
