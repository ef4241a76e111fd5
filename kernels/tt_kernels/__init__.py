"""Tensor-train contractions in pure torch. Imports torch only; knows nothing of zo_opt."""

from tt_kernels.linear import merge_cores, tt_linear
from tt_kernels.shapes import core_shapes, factorize, reconstruct, useful_ranks

__all__ = ["core_shapes", "factorize", "merge_cores", "reconstruct", "tt_linear", "useful_ranks"]
