"""Fused attention under ``vmap``: copies become rows of one larger batch.

The CPU's fused kernel has no batching rule (``vmap`` would run it copy by copy), and the unfused one makes scores of all
copies at once, which is slower and takes the most memory of a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class FoldedAttention(TorchFunctionMode):
    """Within this context ``scaled_dot_product_attention`` folds the axes that ``vmap`` adds into the batch. Without gradients."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention and (args[0] if args else kwargs["query"]).ndim == 4:  # type: ignore[index]
            return _call(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    folded: Tensor = _Folded.apply(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)  # type: ignore[no-untyped-call]
    return folded


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        return scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: losses are evaluated without gradients."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, int]:
        copies = info.batch_size
        sequences = [_fold(t, dim, copies) for t, dim in zip((query, key, value), in_dims, strict=False)]
        if mask is not None:
            batch = sequences[0].shape[0] // copies
            mask = _fold_mask(mask, in_dims[3], copies, batch)
        out: Tensor = _Folded.apply(*sequences, mask, *options)  # type: ignore[no-untyped-call]
        return out.unflatten(0, (copies, -1)), 0


def _fold(x: Tensor, dim: int | None, copies: int) -> Tensor:
    """(..., P at dim, ...) -> (P B, ..., S, E); an x that all copies share is repeated."""
    x = x.expand(copies, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _fold_mask(mask: Tensor, dim: int | None, copies: int, batch: int) -> Tensor:
    """A mask to go with folded sequences; one that is the same for all rows stays as it is."""
    if dim is None and (mask.ndim < 4 or mask.shape[0] == 1):
        return mask
    if dim is not None:
        mask = mask.movedim(dim, 0)
        while mask.ndim < 5:  # (P, B, heads, S, S)
            mask = mask.unsqueeze(1)
        mask = mask.expand(-1, batch, *mask.shape[2:])
    return _fold(mask, 0 if dim is not None else None, copies)
