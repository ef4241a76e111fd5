"""What a closure returned, as a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, strided

from zo_opt.errors import ZOError


def taken(value: Any) -> Tensor | float:
    """The loss in what a closure returned: itself, or its ``.loss`` where it is a model's output.

    Raises:
        ZOError: there is none in it.

    >>> taken(np.float32(0.5)), taken(np.ones(1))
    (0.5, 1.0)
    """
    if isinstance(value, Tensor):
        if value.is_complex():
            raise ZOError(f"the closure returned a complex tensor ({value.dtype}); {_REAL}.")
        if value.is_meta or value.is_quantized or value.layout != strided:
            kind = "meta" if value.is_meta else "quantised" if value.is_quantized else str(value.layout)
            raise ZOError(f"the closure returned a {kind} tensor; return the loss as a plain one.")
        return value
    if isinstance(value, np.ndarray | np.generic):
        if value.size != 1:
            raise ZOError(f"the closure returned an array of shape {value.shape}; return one loss (a scalar).")
        value = value.item()
    if isinstance(value, complex):
        raise ZOError(f"the closure returned the complex number {value}; {_REAL}.")
    if hasattr(value, "__float__") and not isinstance(value, type):
        try:
            return float(value)
        except OverflowError:  # a whole number beyond every float
            return math.inf
    if getattr(value, "loss", None) is not None:
        return taken(value.loss)
    raise ZOError(f"the closure returned {_described(value)} (a float or a scalar tensor).")


_REAL = "return one real number, such as its absolute value"


def _described(value: Any) -> str:
    """What it is, and what to return."""
    name = type(value).__name__
    if hasattr(value, "loss"):
        return f"a {name} whose loss is None; give the model labels, or return the loss"
    if isinstance(value, Mapping):
        keys = ", ".join(map(str, value)) or "none"
        return f"a {name} with the keys {keys}; return the loss in it"
    if isinstance(value, list | tuple):
        return f"a {name} of {len(value)}; return one of them, the loss"
    if isinstance(value, str):
        return f"the text {value[:40]!r}; return the loss"
    return f"{'None' if value is None else f'a {name}'}; return the loss"


def as_scalar(value: Any) -> float:
    """What a closure returned, as a number.

    Raises:
        ZOError: it is no scalar.
    """
    loss = taken(value)
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ZOError(f"the closure returned a tensor of shape {tuple(loss.shape)}; return one loss (a scalar).")
        return float(loss.detach())
    return loss
