"""B S u with a backward pass that keeps u alone (LaMDA, arXiv 2406.12832, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Shape suffixes: N any leading axes, R the rank, M the columns of B that still move, O the output size.


def core_then_columns(u_NR: Tensor, s_RR: Tensor, b_OR: Tensor, frozen: int) -> Tensor:
    """B S u, (..., out) from u (..., r), S (r, r) and B (out, r), all of one dtype.

    Plain operations would keep S u for B's gradient beside u for S's. Here S u is computed again in the backward pass, which leaves out the
    first ``frozen`` columns of B: their gradient is zero.

    >>> u, s, b = torch.randn(5, 2), torch.randn(2, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    >>> core_then_columns(u, s, b, 1).sum().backward()
    >>> b.grad[:, 0].tolist(), bool(b.grad[:, 1].all())
    ([0.0, 0.0, 0.0], True)
    """
    # Without gradients there is nothing to keep. Under autocast the plain operations know which dtype each of them takes.
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(u_NR.device.type):
        return F.linear(F.linear(u_NR, s_RR), b_OR)
    out: Tensor = _CoreThenColumns.apply(u_NR, s_RR, b_OR, frozen)  # type: ignore[no-untyped-call]
    return out


class _CoreThenColumns(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u_NR: Tensor, s_RR: Tensor, b_OR: Tensor, frozen: int) -> Tensor:
        return F.linear(F.linear(u_NR, s_RR), b_OR)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        *tensors, ctx.frozen = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        g_NO, (u_NR, s_RR, b_OR) = grads[0], ctx.saved_tensors
        needs_u, needs_s, needs_b, _ = ctx.needs_input_grad
        grad_u = grad_s = grad_b = None
        if needs_u or needs_s:
            g_NR = g_NO @ b_OR
            grad_u = g_NR @ s_RR if needs_u else None
            grad_s = _rows(g_NR).T @ _rows(u_NR) if needs_s else None
        if needs_b:
            moving_NM = F.linear(u_NR, s_RR[ctx.frozen :])
            grad_b = F.pad(_rows(g_NO).T @ _rows(moving_NM), (ctx.frozen, 0))
        return grad_u, grad_s, grad_b, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        u_NR, s_RR, b_OR = ctx.saved_tensors
        du_NR, ds_RR, db_OR, _ = tangents
        out = torch.zeros_like(F.linear(u_NR, b_OR))
        if du_NR is not None:
            out = out + F.linear(F.linear(du_NR, s_RR), b_OR)
        if ds_RR is not None:
            out = out + F.linear(F.linear(u_NR, ds_RR), b_OR)
        if db_OR is not None:
            out = out + F.linear(F.linear(u_NR, s_RR), db_OR)
        return out


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
