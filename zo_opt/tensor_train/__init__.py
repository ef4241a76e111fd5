"""Tensor trains as data: decompose a dense tensor, convert to and from tensorly. The layers that compute with them are ``tt_kernels``.

A train is a list of cores (r_{k-1}, n_k, r_k) with r_0 = r_end = 1; as a matrix, its input dims come first. tensorly is
used where it has the algorithm, in its numpy backend and for the calling thread alone.
"""

from zo_opt.tensor_train.convert import from_tensorly, to_tensorly
from zo_opt.tensor_train.decompose import tt_svd

__all__ = ["from_tensorly", "to_tensorly", "tt_svd"]
