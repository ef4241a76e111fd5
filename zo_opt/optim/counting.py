"""What every optimizer of a run keeps besides weights: counts, the last step's record, failures in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from zo_opt.errors import NonFiniteLossError, ZOError
from zo_opt.optim.records import StepRecord
from zo_opt.schedules import History


def check_finite(tensors: Iterable[Tensor]) -> None:
    """Whether weights are sound.

    Raises:
        ZOError: one is not finite.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ZOError("a trainable holds NaN or infinity before training; load sound weights first.")


class CountingOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose ``step`` takes a closure and a batch, and whose state holds all that the next step depends on.

    Attributes:
        step_count: steps made.
        history: queries and forward passes spent.
        failed_steps: steps in a row whose losses were not finite.
        dropped_queries: queries (first order: steps) left out because a loss was not finite.
        last_record: what the last step did.
        steps_per_epoch: optimizer steps in an epoch.
        max_failed_steps: so many failed steps in a row end the run.
    """

    def start_counting(self, steps_per_epoch: int, max_failed_steps: int) -> None:
        """Before the first step."""
        self.step_count = self.failed_steps = self.dropped_queries = 0
        self.history = History()
        self.last_record: StepRecord | None = None
        self.steps_per_epoch, self.max_failed_steps = steps_per_epoch, max_failed_steps

    @property
    def epoch(self) -> int:
        """e_k = floor(k / steps_per_epoch)."""
        return self.step_count // self.steps_per_epoch

    def step(self, closure: Callable[..., Any] | None = None, batch: Any = None) -> Tensor | None:  # type: ignore[override]
        """One step on one batch; returns the loss."""
        raise NotImplementedError

    def count_failure(self) -> None:
        """One more step without a finite loss.

        Raises:
            NonFiniteLossError: ``max_failed_steps`` in a row.
        """
        self.failed_steps += 1
        if self.failed_steps >= self.max_failed_steps:
            raise NonFiniteLossError(
                f"no loss was finite in {self.failed_steps} steps in a row; the trainables keep their last good values. "
                "Lower lr or zo_eps, or run the frozen model in a wider dtype."
            )

    def progress(self) -> dict[str, Any]:
        """What must survive a restart besides tensors, as plain values; the entry ``"zo"`` of ``state_dict``."""
        return {
            "step": self.step_count,
            "history": asdict(self.history),
            "failed_steps": self.failed_steps,
            "dropped_queries": self.dropped_queries,
        }

    def load_progress(self, zo: dict[str, Any]) -> None:
        """Take back what ``progress`` gave."""
        self.step_count, self.history = int(zo["step"]), History(**zo["history"])
        self.failed_steps, self.dropped_queries = int(zo["failed_steps"]), int(zo["dropped_queries"])

    def state_dict(self) -> dict[str, Any]:
        """torch's state with one more entry, ``"zo"``: everything the next step depends on besides the trainables."""
        return super().state_dict() | {"zo": self.progress()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, to the same bits.

        Raises:
            ZOError: it was not written by an optimizer of zo_opt.
        """
        if "zo" not in state_dict:
            raise ZOError("this state was not written by a zeroth-order optimizer (it has no entry 'zo').")
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in ("zo", "memory")})
        self.load_progress(state_dict["zo"])
