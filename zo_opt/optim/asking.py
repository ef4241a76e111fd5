"""How a closure is asked for losses: dropout off, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from zo_opt.errors import ZOError
from zo_opt.optim.choices import Setting


class Asking(Protocol):
    """An optimizer that asks a closure for losses."""

    setting: Setting
    asks: bool


@contextmanager
def asking(optimizer: Asking) -> Iterator[None]:
    """Dropout off in all evaluations (arXiv 2305.17333, released code); all comes back as it was.

    Raises:
        ZOError: the closure calls ``backward``, or its own optimizer.
    """
    if optimizer.asks:
        raise ZOError(
            "the closure calls its own optimizer; let it return the loss and leave the step to step(closure)."
        )
    module = optimizer.setting.module
    training = [m for m in module.modules() if m.training] if module is not None else []
    optimizer.asks = True
    try:
        for m in training:
            m.training = False
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise ZOError(
            "the closure asks for gradients (backward() or autograd), which its losses have not; let it return the loss alone."
        ) from error
    finally:
        optimizer.asks = False
        for m in training:
            m.training = True
