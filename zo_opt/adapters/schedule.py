"""What changes in an adapter as training goes on (ranks, frozen columns, active blocks), and the watch over its being driven."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from zo_opt.errors import ZOError


class AdapterSchedule(ABC):
    """Advanced once an optimizer step by ``AdapterModel.step``.

    Attributes:
        needs_grad: whether ``step`` reads ``.grad`` of the trainables, so that it must come before ``zero_grad``.
    """

    needs_grad: ClassVar[bool] = False

    @abstractmethod
    def step(self, global_step: int) -> None:
        """Called after the optimizer's step of this number (from 0): put back what must not have moved, decide what changes.

        Raises:
            ZOError: something that the schedule needs is not there (gradients, the number of steps).
        """

    def state(self) -> dict[str, Tensor]:
        """All that later steps depend on besides the adapters' weights; tensors in place, to be copied from and into."""
        return {}

    def restored(self) -> None:  # noqa: B027
        """Called after tensors of ``state`` were overwritten by saved ones."""

    def moving(self) -> int | None:
        """How many numbers still move; None: all that are trained at some time (LISA's take turns)."""
        return None


class Watch:
    """Counts optimizer steps on a model's trainables, and complains if its schedule is not advanced between two of them.

    Every ``torch.optim.Optimizer`` is seen, wrapped or not, by torch's own hook; the watch ends with the model.
    """

    def __init__(self, model: Any) -> None:
        self._steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._model = weakref.ref(model)
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        _see_every_optimizer()
        _WATCHES.add(self)

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer made a step."""
        if getattr(optimizer, "failed_steps", 0):
            return  # of one of ours that dropped it: nothing has moved
        model = self._model()
        if model is not None and _holds(optimizer, {id(p) for p in model.parameters()}):
            self._count(optimizer)

    def advanced(self) -> None:
        """The schedule was advanced."""
        self._steps.clear()

    def end(self) -> None:
        """Watch no longer."""
        _WATCHES.discard(self)

    def _count(self, optimizer: Optimizer) -> None:
        self.optimizers.add(optimizer)
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if self._steps[optimizer] > 1:
            raise ZOError(
                "this adapter changes as training goes on, but the optimizer made two steps without it; call "
                "model.step(global_step) after every optimizer.step() and before zero_grad()."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model is not watched."""
        return None


def _holds(optimizer: Optimizer, parameters: set[int]) -> bool:
    return any(id(p) in parameters for group in optimizer.param_groups for p in group["params"])


_WATCHES: weakref.WeakSet[Watch] = weakref.WeakSet()


@cache
def _see_every_optimizer() -> None:
    """One hook for all watches, once and for good: torch's hooks cannot be removed while they run."""

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        for watch in list(_WATCHES):
            watch.after_step(optimizer)

    register_optimizer_step_post_hook(after_step)
