"""Tensor-train contractions in pure torch. Imports torch only; knows nothing of zo_opt."""

from tt_kernels.linear import tt_linear, tt_linear_copies
from tt_kernels.merge import MergeCache, Pair, merge_pair
from tt_kernels.plan import Plan, plan, plans
from tt_kernels.shapes import core_shapes, factorize, reconstruct, useful_ranks

__all__ = [
    "MergeCache",
    "Pair",
    "Plan",
    "core_shapes",
    "factorize",
    "merge_pair",
    "plan",
    "plans",
    "reconstruct",
    "tt_linear",
    "tt_linear_copies",
    "useful_ranks",
]
