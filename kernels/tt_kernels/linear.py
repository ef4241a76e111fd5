"""A linear layer whose weight is a tensor train.

Shape suffixes: T tokens (any leading axes), P perturbed copies, M = prod in_dims, N = prod out_dims, R the rank in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tt_kernels.merge import LOW, autocast_dtype, merge_left, merge_pair
from tt_kernels.plan import Plan, pair_of
from tt_kernels.plan import plan as make_plan


def tt_linear(
    x: Tensor,
    cores: Sequence[Tensor],
    *,
    in_dims: Sequence[int],
    out_dims: Sequence[int],
    bias: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """x @ W + bias, where the M x N matrix W is a tensor train.

    W[(i_1..i_d), (j_1..j_e)] = G_1[:, i_1, :] ... G_d[:, i_d, :] G_{d+1}[:, j_1, :] ... G_{d+e}[:, j_e, :]
    (Oseledets 2011; arXiv 2406.18060, equation 3).

    Differentiable; the backward keeps x and the cores alone and merges again. Under autocast x and the cores may be float32
    and the products run in the autocast dtype. Merges of bf16 and fp16 cores run in float32.

    Args:
        x: (..., M), any number of tokens, zero included.
        cores: d + e tensors (r_{k-1}, n_k, r_k), input dims first, r_0 = r_end = 1, dtype of ``x``.
        in_dims: (n_1..n_d), product M; () is M = 1.
        out_dims: (n_{d+1}..n_{d+e}), product N; () is N = 1.
        bias: (N,) or None.
        plan: the contraction (see :func:`~tt_kernels.plan.plan`); the cheapest by default.

    Returns:
        (..., N), dtype of ``x`` (of autocast where it is on).

    Raises:
        ValueError: shapes or dtypes do not fit.

    >>> import torch
    >>> cores = [torch.ones(1, 2, 3), torch.ones(3, 4, 1)]
    >>> tt_linear(torch.ones(5, 2), cores, in_dims=(2,), out_dims=(4,)).shape
    torch.Size([5, 4])
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            # Cores stay as wide as they are until they are merged.
            return _run(x.to(dtype), cores, in_dims, out_dims, bias, plan)
    _check_dtypes(x, cores, bias)
    return _run(x, cores, in_dims, out_dims, bias, plan)


def tt_linear_copies(
    x: Tensor, cores: Sequence[Tensor], *, in_dims: Sequence[int], out_dims: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """``tt_linear`` for P copies of the train at once, such as the perturbed ones of P queries.

    Args:
        x: (P, ..., M): each copy's own tokens. Where all copies see the same, pass ``x.expand(P, ...)``: the expanded axis is
            noticed, and all copies share one product, unless x is differentiated.
        cores: (P, r_{k-1}, n_k, r_k).
        in_dims, out_dims: as for ``tt_linear``.
        bias: (P, N) or None.

    Returns:
        (P, ..., N).

    Raises:
        ValueError: shapes or dtypes do not fit.

    >>> import torch
    >>> cores = [torch.ones(7, 1, 2, 3), torch.ones(7, 3, 4, 1)]
    >>> tt_linear_copies(torch.ones(5, 2).expand(7, 5, 2), cores, in_dims=(2,), out_dims=(4,)).shape
    torch.Size([7, 5, 4])
    """
    dtype = autocast_dtype(x)
    if dtype is None:
        _check_dtypes(x, cores, bias)
    copies = x.shape[0] if x.ndim > 1 else -1
    of_copies = all(core.ndim == 4 and core.shape[0] == copies for core in cores)
    if copies == 0 or not of_copies or (bias is not None and (bias.ndim != 2 or bias.shape[0] != copies)):
        given = [tuple(core.shape) for core in cores]
        raise ValueError(f"x {tuple(x.shape)}, cores {given} and the bias must all begin with the axis of copies")
    _check_shapes(x, [core[0] for core in cores], in_dims, out_dims, None if bias is None else bias[0])
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return _run_copies(x.to(dtype), cores, len(in_dims), bias)
    return _run_copies(x, cores, len(in_dims), bias)


def _run_copies(x: Tensor, cores: Sequence[Tensor], inputs: int, bias: Tensor | None) -> Tensor:
    copies = x.shape[0]
    pair = merge_pair(cores, inputs, bias).to(x.dtype)
    # The derivative by an expanded x is one for each copy, which one product for all of them would not give.
    differentiated = (torch.is_grad_enabled() and x.requires_grad) or forward_ad._current_level >= 0
    shared = x.stride(0) == 0 and not differentiated
    x_PTM = x[:1].reshape(1, -1, x.shape[-1]) if shared else x.reshape(copies, -1, x.shape[-1])
    if len(x_PTM) == copies:
        y_PTN = pair(x_PTM)
    else:  # (T, M) @ (M, P R): one product for all copies, then each its own half
        a_MPR = pair.a_MR.transpose(0, 1).flatten(1)
        h_PTR = (x_PTM[0] @ a_MPR).unflatten(1, (copies, -1)).transpose(0, 1)
        h_PTR = h_PTR if pair.start_R is None else h_PTR + pair.start_R
        y_PTN = h_PTR @ pair.b_RN if pair.bias_N is None else torch.baddbmm(pair.bias_N.unsqueeze(1), h_PTR, pair.b_RN)
    return y_PTN.reshape(*x.shape[:-1], pair.b_RN.shape[-1])


def _run(
    x: Tensor,
    cores: Sequence[Tensor],
    in_dims: Sequence[int],
    out_dims: Sequence[int],
    bias: Tensor | None,
    plan: Plan | None,
) -> Tensor:
    _check_shapes(x, cores, in_dims, out_dims, bias)
    x_TM = x.reshape(-1, x.shape[-1])
    inputs = len(in_dims)
    if plan is not None:
        groups = plan.groups
        if sum(groups) != len(cores) or plan.inputs != inputs:
            raise ValueError(f"the plan {groups} is of another train than these {len(cores)} cores; make one for it")
    elif torch.compiler.is_compiling():  # a compiled graph serves many sizes
        groups = pair_of(inputs, len(cores))
    else:
        ranks = [core.shape[2] for core in cores[:-1]]
        tokens = 1 << max(0, x_TM.shape[0] - 1).bit_length()  # one plan for each power of two, not for each number
        groups = make_plan(in_dims, out_dims, ranks, tokens, x.dtype, x.device).groups
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *cores))
    if differentiated and forward_ad._current_level < 0:
        y_TN: Tensor = _Recomputing.apply(x_TM, groups, inputs, bias, *cores)  # type: ignore[no-untyped-call]
    else:
        y_TN = contract(x_TM, cores, groups, inputs, bias)
    return y_TN.reshape(*x.shape[:-1], math.prod(out_dims))


def contract(
    x_TM: Tensor, cores: Sequence[Tensor], groups: Sequence[int], inputs: int, bias: Tensor | None = None
) -> Tensor:
    """x (T, M) -> (T, N) by a plan's groups; the result has the dtype of x, merges are float32 at least."""
    dtype = x_TM.dtype
    if 0 < inputs < len(cores) and tuple(groups) == pair_of(inputs, len(cores)):
        return merge_pair(cores, inputs, bias).to(dtype)(x_TM)
    tokens, rest = x_TM.shape
    outputs = math.prod([core.shape[1] for core in cores[inputs:]])  # lists: torch.compile does not take generators
    z, first = x_TM, 0  # (tokens * outputs so far, rank * inputs still to come)
    for size in groups:
        group = cores[first : first + size]
        taken = math.prod([core.shape[1] for core in group[: max(0, inputs - first)]])
        wide = [core.float() if core.dtype in LOW else core for core in group]
        matrix = merge_left(wide, group).reshape(group[0].shape[0] * taken, -1).to(dtype)
        rest //= taken
        if rest > 1:  # (r', r n) @ (tokens, r n, rest): no axis is ever moved
            z = matrix.t() @ z.reshape(tokens, matrix.shape[0], rest)
        else:
            z = z.reshape(-1, matrix.shape[0]) @ matrix
        first += size
    y_TN = z.reshape(tokens, outputs)
    return y_TN if bias is None else y_TN + bias.to(dtype)


class _Recomputing(torch.autograd.Function):
    """Keeps x and the cores; the backward merges the pair again and goes back through it and through its chains."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_TM: Tensor, groups: Sequence[int], inputs: int, bias: Tensor | None, *cores: Tensor) -> Tensor:
        return contract(x_TM, cores, groups, inputs, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_TM, _, ctx.inputs, bias, *cores = inputs
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
        return dx_TM, None, None, dbias, *narrowed


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
