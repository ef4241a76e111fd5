"""Whether a closure gives one loss at one point: seen at the first step of a run, for at most one forward pass."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from zo_opt.errors import ZOError
from zo_opt.queries.losses import taken

ROUNDING = 1e-4  # relative: what a kernel that adds up in another order each time may change


class Repeatable:
    """A closure that is called twice at its first point, and refused where the losses differ.

    Differences of losses are the only thing that zeroth order sees: dropout, or another batch at each call, drowns them.

    Args:
        closure: the closure.
        in_evaluation: its module's dropout is off. Then it is called twice only if its first call drew random numbers.

    Attributes:
        extra: forward passes that this took.
        evaluated: the modules that ran in evaluation mode, which may be left later.
    """

    def __init__(self, closure: Callable[..., Any], *, in_evaluation: bool) -> None:
        self.extra = 0
        self.evaluated: tuple[torch.nn.Module, ...] = ()
        self._closure, self._in_evaluation, self._first = closure, in_evaluation, True

    def of(self, closure: Callable[..., Any]) -> Repeatable:
        """Another closure in its place."""
        self._closure = closure
        return self

    def __call__(self, *batch: Any) -> Any:
        if not self._first:
            return self._closure(*batch)
        before = _random_states()
        if self._in_evaluation:
            loss = taken(self._closure(*batch))
        else:
            with _no_moving_statistics() as evaluated:
                loss = taken(self._closure(*batch))
            self.evaluated = tuple(evaluated)
        self._first = False
        after = _random_states()
        drew = not _same(before, after)
        if self._in_evaluation and not drew:
            return loss
        again = taken(self._closure(*batch))
        self.extra = 1
        _restore(after)
        if not _agree(loss, again, 0.0 if drew else ROUNDING):
            _restore(before)
            raise ZOError(
                f"the closure gave two losses at one point ({_shown(loss)} and {_shown(again)}), so that differences of losses are chance: "
                "dropout is on, or it draws random numbers or another batch at each call. Give the optimizer module=model, which "
                "switches dropout off, or call model.eval(), and let the closure see one batch."
            )
        return loss


@contextmanager
def _no_moving_statistics() -> Iterator[set[torch.nn.Module]]:
    """Stop before a batch norm moves its running statistics; yields the modules that run in evaluation mode."""
    evaluated: set[torch.nn.Module] = set()

    def before_forward(module: torch.nn.Module, inputs: Any) -> None:
        if not module.training:
            evaluated.add(module)
        if module.training and getattr(module, "running_mean", None) is not None:
            raise ZOError(
                f"the closure runs a {type(module).__name__} in training mode, whose running statistics would move at every query; give the "
                "optimizer module=model, which switches that off (and dropout), or call model.eval()."
            )

    handle = register_module_forward_pre_hook(before_forward)
    try:
        with warnings.catch_warnings():  # of a compiled module, that such hooks fire twice: this one may
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            yield evaluated
    finally:
        handle.remove()


def _random_states() -> list[Any]:
    """Of the global generators: torch's on every device in use, Python's and numpy's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda, random.getstate(), np.random.get_state()]


def _restore(states: list[Any]) -> None:
    cpu, *cuda, python, numpys = states
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpys)


def _same(one: list[Any], other: list[Any]) -> bool:
    *tensors, python, numpys = one
    *others, python2, numpys2 = other
    equal = len(tensors) == len(others) and all(map(torch.equal, tensors, others))
    return equal and python == python2 and numpys[2:] == numpys2[2:] and np.array_equal(numpys[1], numpys2[1])


def _agree(one: Tensor | float, other: Tensor | float, tolerance: float) -> bool:
    a, b = (torch.as_tensor(x).detach().double().flatten() for x in (one, other))
    return len(a) == len(b) and torch.allclose(a, b, rtol=tolerance, atol=0, equal_nan=True)


def _shown(loss: Tensor | float) -> str:
    if isinstance(loss, Tensor) and loss.ndim:  # of rows that may be private
        return f"of {len(loss)} rows"
    return f"{float(loss):.6g}"
