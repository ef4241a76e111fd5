"""What every optimizer of a run keeps besides weights: counts, the last step's record, failures in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from zo_opt.errors import NonFiniteLossError, ZOError
from zo_opt.optim.choices import Method
from zo_opt.optim.records import StepRecord
from zo_opt.schedules import History


def check_finite(tensors: Iterable[Tensor]) -> None:
    """Whether weights are sound.

    Raises:
        ZOError: one is not finite.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ZOError("a trainable holds NaN or infinity before training; load sound weights first.")


def check_closure(closure: object) -> None:
    """Whether it can be called.

    Raises:
        ZOError: it is the loss itself, say.
    """
    if not callable(closure):
        raise ZOError(
            f"a {type(closure).__name__} was given in place of a closure; give what computes the loss, which is asked for at several points: "
            "step(lambda: model(**batch).loss)."
        )


_WRAPPERS = ("step", "_opt_called", "_zero_grad_profile_name", "_wrapped_by_lr_sched")


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

    method: Method = Method("optimizer")
    axis_state: ClassVar[frozenset[str]] = frozenset()  # names of state that has not a parameter's shape

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
            "choices": self.described(),
        }

    def load_progress(self, zo: dict[str, Any]) -> None:
        """Take back what ``progress`` gave."""
        self.step_count, self.history = int(zo["step"]), History(**zo["history"])
        self.failed_steps, self.dropped_queries = int(zo["failed_steps"]), int(zo["dropped_queries"])

    def state_dict(self) -> dict[str, Any]:
        """torch's state with one more entry, ``"zo"``: everything the next step depends on besides the trainables."""
        return super().state_dict() | {"zo": self.progress()}

    def described(self) -> dict[str, Any]:
        """What a state must have in common with the optimizer that takes it, as plain values."""
        return {"method": self.method.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, to the same bits.

        Raises:
            ZOError: it was not written by an optimizer of zo_opt, or by one of other choices or parameters; nothing has changed.
        """
        if "zo" not in state_dict:
            raise ZOError("this state was not written by a zeroth-order optimizer (it has no entry 'zo').")
        kept = dict(vars(self))
        try:
            self.check_state(state_dict)
            self.take_state(state_dict)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            vars(self).clear()
            vars(self).update(kept)
            if isinstance(error, ZOError):
                raise
            raise ZOError(f"this state does not fit the optimizer ({type(error).__name__}: {error}).") from error

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Whether a state is of an optimizer like this one; states of earlier versions do not say all.

        Raises:
            ZOError: it is of another.
        """
        ours, theirs = self.described(), state_dict["zo"].get("choices", {})
        for name in theirs:
            if theirs[name] != ours.get(name):
                raise ZOError(
                    f"this state was written with {name}={theirs[name]!r}, and the optimizer has {ours.get(name)!r}; make it with the same."
                )
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ZOError("this state is of other parameter groups than the optimizer's; give it the same parameters.")
        for parameter, saved in self.saved_slots(state_dict):
            for name, tensor in saved.items():
                if tensor.ndim and name not in self.axis_state and tensor.shape != parameter.shape:
                    raise ZOError(
                        f"this state has {name} of shape {tuple(tensor.shape)} for a parameter of shape {tuple(parameter.shape)}; give the "
                        "optimizer the parameters that it had."
                    )

    def saved_slots(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Each parameter, and what a state holds of it by name."""
        packed = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in zip(packed, parameters, strict=True):
            yield parameter, state_dict["state"].get(index, {})

    def take_state(self, state_dict: dict[str, Any]) -> None:
        """Put a checked state in the place of one's own."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in ("zo", "memory")})
        self.load_progress(state_dict["zo"])

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, pickled or not: as torch's, without hooks and what learning-rate schedulers put around ``step``."""
        torchs = super().__getstate__()
        return {k: v for k, v in vars(self).items() if not k.startswith("_optimizer_") and k not in _WRAPPERS} | torchs
