"""Fused attention under ``vmap``: copies become rows of one larger batch.

The CPU's fused kernel has no batching rule (``vmap`` would run it copy by copy), and the unfused one makes scores of all
copies at once, which is slower and takes the most memory of a forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zo_opt.system.replaced import replaced
from zo_opt.system.vmap import is_batched

_original = functional.scaled_dot_product_attention


@contextmanager
def folded_attention() -> Iterator[None]:
    """Within this context ``scaled_dot_product_attention`` folds the axes that ``vmap`` adds into the batch. Without gradients.

    The function is replaced in ``torch.nn.functional`` (calls that no ``vmap`` surrounds, another thread's too, go to the original): a
    ``TorchFunctionMode`` would be asked at every call of torch, which costs 5 % of a small forward.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's own fused encoder layers have no batching rule
    try:
        with replaced(functional, scaled_dot_product_attention=_attention):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    sequences = (query, key, value)
    # Rows that are broadcast have no fused kernel.
    alike = all(x.ndim == 4 and x.shape[0] == query.shape[0] for x in sequences)
    if alike and any(map(_is_mapped, (*sequences, attn_mask))):
        folded: Tensor = _Folded.apply(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)  # type: ignore[no-untyped-call]
        return folded
    return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _is_mapped(x: Tensor | None) -> bool:
    return x is not None and is_batched(x)


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
        return _original(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

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
