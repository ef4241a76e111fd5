"""What runs under torch.func's vmap."""

from __future__ import annotations

import torch
from torch import Tensor


def is_batched(x: Tensor) -> bool:
    """Whether vmap runs over it, so that its values cannot be looked at.

    >>> found = []
    >>> _ = torch.func.vmap(lambda x: (found.append(is_batched(x)), x)[1])(torch.ones(2))
    >>> found, is_batched(torch.ones(2))
    ([True], False)
    """
    return bool(torch._C._functorch.is_batchedtensor(x))
