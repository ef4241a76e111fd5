"""A budget of forward passes, spent evenly."""

from __future__ import annotations

from dataclasses import dataclass, replace

from zo_opt.errors import ZOError
from zo_opt.schedules.adazeta import AdaZetaQueries
from zo_opt.schedules.base import History, RunLength, Schedule, check_whole, simulate


@dataclass(frozen=True)
class BudgetQueries(Schedule):
    """Spend exactly ``forwards`` forward passes in ``steps`` steps, as evenly as whole queries allow.

    Use it to compare methods: it spends a budget of forward passes to the last one.

    Every step divides what is left by the steps that are left (rounded down, so that later steps make up for it), which
    also corrects whatever earlier steps cost more or less than expected. A remainder that buys no query,
    ``(forwards - steps * forwards_per_step) % forwards_per_query``, stays unspent. Steps beyond ``steps`` take what is
    left, and at least one query, as every step does.

    Args:
        forwards: forward passes of the whole run, counted by ``history.forwards``; as many as AdaZeta takes if not given.
        steps: optimizer steps of the whole run; the run's if not given.
        forwards_per_query, forwards_per_step: what queries cost (:class:`RunLength`); the run's if not given.

    Raises:
        ZOError: the budget is below one query a step, or queries cost nothing.

    >>> simulate(BudgetQueries(forwards=20, steps=4), steps=4)
    [2, 2, 3, 3]
    """

    forwards: int | None = None
    steps: int | None = None
    forwards_per_query: int | None = None
    forwards_per_step: int | None = None

    def __post_init__(self) -> None:
        per_query, per_step = self._costs
        if per_query == 0:
            raise ZOError(
                "forwards_per_query=0 leaves a budget nothing to decide, as in split mode; use query_mode='sequential' with it."
            )
        check_whole(forwards_per_query=per_query)
        check_whole(0, forwards_per_step=per_step)
        check_whole(**{n: v for n, v in (("forwards", self.forwards), ("steps", self.steps)) if v is not None})
        if self.forwards is None or self.steps is None:
            return
        least = self.steps * (per_query + per_step)
        if self.forwards < least:
            raise ZOError(
                f"forwards={self.forwards} is below one query in each of {self.steps} steps, which costs {least}; raise the budget "
                f"or take at most {self.forwards // (per_query + per_step)} steps."
            )

    @property
    def _costs(self) -> tuple[int, int]:
        return (
            2 if self.forwards_per_query is None else self.forwards_per_query,
            0 if self.forwards_per_step is None else self.forwards_per_step,
        )

    def for_run(self, length: RunLength) -> BudgetQueries:
        per_query = length.forwards_per_query if self.forwards_per_query is None else self.forwards_per_query
        per_step = length.forwards_per_step if self.forwards_per_step is None else self.forwards_per_step
        steps, forwards = self.steps or length.steps, self.forwards
        if forwards is None:
            forwards = sum(simulate(AdaZetaQueries(), steps, length.steps_per_epoch)) * per_query + steps * per_step
        return replace(self, forwards=forwards, steps=steps, forwards_per_query=per_query, forwards_per_step=per_step)

    def __call__(self, step: int, epoch: int, history: History) -> int:
        if self.forwards is None or self.steps is None:
            raise ZOError("the budget does not know the run's length; give forwards and steps.")
        per_query, per_step = self._costs
        steps_left = max(self.steps - step, 1)
        left = self.forwards - history.forwards - steps_left * per_step
        return max(left // (steps_left * per_query), 1)
