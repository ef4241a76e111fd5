"""The trains of an adapter's input and output side, in the shape that the target asks for."""

from __future__ import annotations

from collections.abc import Sequence

from tt_kernels import useful_ranks

from zo_opt.adapters.targets import Target
from zo_opt.adapters.tt_embedding import TTEmbedding, row_dims
from zo_opt.adapters.tt_linear import TTLinear, tt_dims


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
