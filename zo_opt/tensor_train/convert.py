"""Our cores to and from tensorly's ``TTTensor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zo_opt.errors import ZOError

if TYPE_CHECKING:  # importing tensorly costs time that most runs need not spend
    from tensorly.tt_tensor import TTTensor


def to_tensorly(cores: Sequence[Tensor]) -> TTTensor:
    """A copy of the train as tensorly's, in arrays of the backend that tensorly has in the calling thread.

    Args:
        cores: (r_{k-1}, n_k, r_k), any device. float32 and float64 stay, 16-bit becomes float32 (numpy has no bfloat16).

    Raises:
        ZOError: the cores are not a train of finite numbers.

    >>> to_tensorly([torch.ones(1, 3, 2), torch.ones(2, 4, 1)]).to_tensor().shape
    (3, 4)
    """
    from tensorly.tt_tensor import TTTensor

    _check_cores(cores)
    return TTTensor([_to_backend(core) for core in cores])


def from_tensorly(train: TTTensor) -> list[Tensor]:
    """A copy of tensorly's train as cores (r_{k-1}, n_k, r_k) on the CPU, in its dtype.

    Raises:
        ZOError: it is not a train of finite numbers.

    >>> train = to_tensorly([torch.ones(1, 3, 2), torch.ones(2, 4, 1)])
    >>> [tuple(core.shape) for core in from_tensorly(train)]
    [(1, 3, 2), (2, 4, 1)]
    """
    cores = [_to_torch(factor) for factor in train]
    _check_cores(cores)
    return cores


def _check_cores(cores: Sequence[Tensor]) -> None:
    """ZOError unless they are a train of finite numbers."""
    if not cores:
        raise ZOError("no cores were given; a train has at least one, of shape (1, n, 1).")
    rank = 1
    for k, core in enumerate(cores):
        if core.ndim != 3 or core.shape[0] != rank or 0 in core.shape:
            raise ZOError(f"core {k} has shape {tuple(core.shape)}; give ({rank}, n, r), each at least 1.")
        if not core.isfinite().all():
            raise ZOError(f"core {k} holds NaN or infinite values; give finite numbers.")
        rank = core.shape[2]
    if rank != 1:
        raise ZOError(f"the last core has shape {tuple(cores[-1].shape)}; a train ends in rank 1.")


def _to_backend(core: Tensor) -> Any:
    import tensorly

    dtype = core.dtype if core.dtype in (torch.float32, torch.float64) else torch.float32
    return tensorly.tensor(core.detach().cpu().to(dtype).numpy())


def _to_torch(factor: Any) -> Tensor:
    import tensorly

    return factor.detach().cpu().clone() if isinstance(factor, Tensor) else torch.tensor(tensorly.to_numpy(factor))
