"""Tensor-train contractions in pure torch. Imports torch only; knows nothing of zo_opt."""

from tt_kernels.linear import tt_linear
from tt_kernels.merge import MergeCache, Pair, merge_pair
from tt_kernels.shapes import core_shapes, factorize, reconstruct, useful_ranks

__all__ = [
    "MergeCache",
    "Pair",
    "core_shapes",
    "factorize",
    "merge_pair",
    "reconstruct",
    "tt_linear",
    "useful_ranks",
]
