"""A linear layer whose weight is a tensor train.

Shape suffixes: T tokens (any leading axes), M = prod in_dims, N = prod out_dims, R the rank in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tt_kernels.merge import autocast_dtype, merge_pair


def tt_linear(
    x: Tensor,
    cores: Sequence[Tensor],
    *,
    in_dims: Sequence[int],
    out_dims: Sequence[int],
    bias: Tensor | None = None,
) -> Tensor:
    """x @ W + bias, where the M x N matrix W is a tensor train.

    W[(i_1..i_d), (j_1..j_e)] = G_1[:, i_1, :] ... G_d[:, i_d, :] G_{d+1}[:, j_1, :] ... G_{d+e}[:, j_e, :]
    (Oseledets 2011; arXiv 2406.18060, equation 3).

    The cores of the input dims are merged into A (M, R), those of the output dims into B (R, N), then y = x @ A @ B.
    That is R (M + N) multiplications a token. With one rank for all bonds no other order needs fewer, but the dense matrix
    does where R > M N / (M + N), for which ``useful_ranks`` leaves no more than a factor of two.

    Differentiable; the backward keeps x and the cores alone and merges again. Under autocast x and the cores may be float32
    and the products run in the autocast dtype. Merges of bf16 and fp16 cores run in float32.

    Args:
        x: (..., M), any number of tokens, zero included.
        cores: d + e tensors (r_{k-1}, n_k, r_k), input dims first, r_0 = r_end = 1, dtype of ``x``.
        in_dims: (n_1..n_d), product M; () is M = 1.
        out_dims: (n_{d+1}..n_{d+e}), product N; () is N = 1.
        bias: (N,) or None.

    Returns:
        (..., N), dtype of ``x`` (of autocast where it is on).

    Raises:
        ValueError: shapes or dtypes do not fit.

    >>> import torch
    >>> cores = [torch.ones(1, 2, 3), torch.ones(3, 4, 1)]
    >>> tt_linear(torch.ones(5, 2), cores, in_dims=(2,), out_dims=(4,)).shape
    torch.Size([5, 4])
    """
    _check_shapes(x, cores, in_dims, out_dims, bias)
    dtype = autocast_dtype(x)
    if dtype is None:
        _check_dtypes(x, cores, bias)
        return _apply(x, cores, len(in_dims), bias)
    with torch.autocast(x.device.type, enabled=False):
        return _apply(x.to(dtype), cores, len(in_dims), bias)  # cores stay as wide as they are until they are merged


def _apply(x: Tensor, cores: Sequence[Tensor], inputs: int, bias: Tensor | None) -> Tensor:
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *cores))
    product = _Recomputing.apply if differentiated and forward_ad._current_level < 0 else _product
    y_TN: Tensor = product(x.reshape(-1, x.shape[-1]), inputs, bias, *cores)
    return y_TN.reshape(*x.shape[:-1], y_TN.shape[-1])


def _product(x_TM: Tensor, inputs: int, bias: Tensor | None, *cores: Tensor) -> Tensor:
    return merge_pair(cores, inputs, bias).to(x_TM.dtype)(x_TM)


class _Recomputing(torch.autograd.Function):
    """Keeps x and the cores; the backward merges the pair again and goes back through it and through its chains."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_TM: Tensor, inputs: int, bias: Tensor | None, *cores: Tensor) -> Tensor:
        return _product(x_TM, inputs, bias, *cores)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_TM, ctx.inputs, bias, *cores = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x_TM, *cores)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TN,) = gradients
        x_TM, *cores = ctx.saved_tensors
        if autocast_dtype(x_TM) is not None:  # called inside autocast; the forward ran outside
            with torch.autocast(x_TM.device.type, enabled=False):
                return _Recomputing.backward(ctx, *gradients)
        pair = merge_pair(cores, ctx.inputs)
        a_MR, b_RN = pair.a_MR.to(x_TM.dtype), pair.b_RN.to(x_TM.dtype)
        h_TR, dh_TR = x_TM @ a_MR, dy_TN @ b_RN.t()
        dx_TM = dh_TR @ a_MR.t() if ctx.needs_input_grad[0] else None
        dbias = None if ctx.bias_dtype is None else dy_TN.sum(0, dtype=ctx.bias_dtype)
        wide = torch.float64 if x_TM.dtype == torch.float64 else torch.float32
        da_MR, db_RN = (x_TM.t() @ dh_TR).to(wide), (h_TR.t() @ dy_TN).to(wide)
        chained = [core.to(wide) for core in cores]
        dcores = [*_back_left(chained[: ctx.inputs], da_MR), *_back_right(chained[ctx.inputs :], db_RN)]
        narrowed = (d.to(core.dtype) for d, core in zip(dcores, cores, strict=True))
        return dx_TM, None, dbias, *narrowed


def _back_left(cores: Sequence[Tensor], da: Tensor) -> list[Tensor]:
    """Gradients of the cores of a = G_1 ... G_d, (prod n, R), given that of a."""
    lefts = [da.new_ones(1, 1)]  # what stands before each core: (n_1 ... n_{k-1}, r_{k-1})
    for core in cores[:-1]:
        lefts.append((lefts[-1] @ core.flatten(1)).reshape(-1, core.shape[2]))
    gradients = []
    for left, core in zip(reversed(lefts), reversed(cores), strict=False):
        da = da.reshape(left.shape[0], -1)
        gradients.append((left.t() @ da).reshape(core.shape))
        da = da @ core.flatten(1).t()
    return gradients[::-1]


def _back_right(cores: Sequence[Tensor], db: Tensor) -> list[Tensor]:
    """Gradients of the cores of b = G_{d+1} ... G_{d+e}, (R, prod n), given that of b."""
    rights = [db.new_ones(1, 1)]  # what stands behind each core, from the last: (r_k, n_{k+1} ... n_{d+e})
    for core in reversed(cores[1:]):
        rights.append((core.flatten(0, 1) @ rights[-1]).reshape(core.shape[0], -1))
    gradients = []
    for right, core in zip(reversed(rights), cores, strict=False):
        db = db.reshape(-1, right.shape[1])
        gradients.append((db @ right.t()).reshape(core.shape))
        db = core.flatten(0, 1).t() @ db
    return gradients


def _check_dtypes(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None) -> None:
    for k, core in enumerate(cores):
        if core.dtype != x.dtype:
            raise ValueError(f"core {k} is {core.dtype} but x is {x.dtype}; cast one of them")
    if bias is not None and bias.dtype != x.dtype:
        raise ValueError(f"bias is {bias.dtype} but x is {x.dtype}; cast one of them")


def _check_shapes(
    x: Tensor, cores: Sequence[Tensor], in_dims: Sequence[int], out_dims: Sequence[int], bias: Tensor | None
) -> None:
    rank = 1
    dims = [*in_dims, *out_dims]
    if len(cores) != len(dims) or not dims:
        raise ValueError(f"{len(cores)} cores do not fit {len(dims)} dims; give one core for each input and output dim")
    for k, (core, n) in enumerate(zip(cores, dims, strict=True)):
        if core.ndim != 3 or core.shape[0] != rank or core.shape[1] != n:
            raise ValueError(f"core {k} has shape {tuple(core.shape)}; expected ({rank}, {n}, rank)")
        rank = core.shape[2]
    if rank != 1:
        raise ValueError(f"the last core ends in rank {rank}; a train ends in rank 1")
    if x.ndim == 0:
        raise ValueError("x has no axes; give (..., features)")
    if x.shape[-1] != math.prod(in_dims):
        raise ValueError(f"x ends in {x.shape[-1]} features; in_dims {tuple(in_dims)} need {math.prod(in_dims)}")
    if bias is not None and bias.shape != (math.prod(out_dims),):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({math.prod(out_dims)},)")
