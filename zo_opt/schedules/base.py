"""What a query schedule is, what it is told, and what it asks for over a whole run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from zo_opt.choices import Range, check_numbers
from zo_opt.errors import ZOError

SIGNAL_DECAY = 0.9
QueryMode = Literal["sequential", "batched", "split", "auto", "distributed"]  # how the queries of a step are evaluated


@dataclass
class History:
    """What a run has spent and seen so far; plain numbers, so that a checkpoint can hold it.

    Attributes:
        queries: directions evaluated.
        forwards: forward passes (one evaluation of the loss on one batch).
        signal: exponential average (decay 0.9 a step) of the mean square of a step's projected gradients, in squared
            loss per squared parameter unit; for Gaussian and Rademacher directions it estimates ||gradient||^2.
        peak_signal: the largest ``signal`` so far.
        tokens: token evaluations: tokens that went through the adapted part of the model.
    """

    queries: int = 0
    forwards: int = 0
    signal: float = 0.0
    peak_signal: float = 0.0
    tokens: int = 0

    def observe(self, projected_grads: Sequence[float]) -> None:
        """Take in the projected gradients of one step; those that are not finite are left out.

        The first step seen is the first average. A step without a finite value changes nothing.

        >>> history = History()
        >>> history.observe([3.0, math.nan, -1.0])
        >>> history.observe([0.0])
        >>> history.signal, history.peak_signal
        (4.5, 5.0)
        """
        squares = [g * g for g in projected_grads if math.isfinite(g * g)]
        if not squares:
            return
        mean_square = sum(square / len(squares) for square in squares)  # divided first: the sum could overflow
        first = self.peak_signal == 0
        self.signal = mean_square if first else SIGNAL_DECAY * self.signal + (1 - SIGNAL_DECAY) * mean_square
        self.peak_signal = max(self.peak_signal, self.signal)


QuerySchedule = Callable[[int, int, History], int]


@dataclass(frozen=True)
class RunLength:
    """How long a run is, and what its queries cost in forward passes.

    A step costs ``forwards_per_step + forwards_per_query * queries``: 0 and 2 for two-sided queries, 1 and 1 for one-sided
    ones, 2 and 0 where the queries share the batch (``query_mode="split"``), and k times as much over k micro-batches.

    Raises:
        ZOError: impossible counts.
    """

    steps: int
    steps_per_epoch: int = 1
    forwards_per_query: int = 2
    forwards_per_step: int = 0

    def __post_init__(self) -> None:
        check_whole(steps=self.steps, steps_per_epoch=self.steps_per_epoch)
        check_whole(0, forwards_per_query=self.forwards_per_query, forwards_per_step=self.forwards_per_step)

    @property
    def epochs(self) -> int:
        """Epochs of the run, a last unfinished one counted."""
        return -(-self.steps // self.steps_per_epoch)


def two_sided_cost(query_mode: str | None, micro_batches: int = 1) -> tuple[int, int]:
    """Forward passes of a two-sided query, and of a step besides.

    >>> two_sided_cost("sequential", 4), two_sided_cost("split")
    ((8, 0), (0, 2))
    """
    return (0, 2) if query_mode == "split" else (2 * micro_batches, 0)


@dataclass(frozen=True)
class Schedule(ABC):
    """A query schedule with options: its fields. Any other callable ``(step, epoch, history) -> int`` serves as well."""

    @abstractmethod
    def __call__(self, step: int, epoch: int, history: History) -> int:
        """The queries of a step."""

    def for_run(self, length: RunLength) -> Self:
        """This schedule with what it leaves open filled in from the run's length."""
        return self


def for_run(schedule: QuerySchedule, length: RunLength) -> QuerySchedule:
    """Any schedule, ready for a run of that length."""
    return schedule.for_run(length) if isinstance(schedule, Schedule) else schedule


def simulate(
    schedule: QuerySchedule,
    steps: int,
    steps_per_epoch: int = 1,
    forwards_per_query: int = 2,
    forwards_per_step: int = 0,
    signals: Sequence[float] | None = None,
) -> list[int]:
    """The queries that a schedule takes in each of ``steps`` steps, its history kept as an optimizer keeps it.

    Args:
        schedule: any schedule.
        steps, steps_per_epoch, forwards_per_query, forwards_per_step: as in :class:`RunLength`.
        signals: the mean square of the projected gradients of each step. Without them nothing is observed.

    Raises:
        ZOError: impossible counts, or not one signal a step.

    >>> from zo_opt.schedules import variance_queries
    >>> simulate(variance_queries(1, 16), steps=4, signals=[8.0, 4.0, 2.0, 1.0])
    [1, 1, 2, 2]
    """
    RunLength(steps, steps_per_epoch, forwards_per_query, forwards_per_step)  # which checks them
    if signals is not None and len(signals) != steps:
        raise ZOError(f"{len(signals)} signals were given for {steps} steps; give one a step.")
    history, queries = History(), []
    for step in range(steps):
        count = schedule(step, step // steps_per_epoch, history)
        queries.append(count)
        history.queries += count
        history.forwards += forwards_per_step + forwards_per_query * count
        if signals is not None:
            history.observe([math.sqrt(signals[step])])
    return queries


def check_whole(least: int = 1, /, **values: int) -> None:
    """Whether counts are whole numbers of at least so many.

    Raises:
        ZOError: one is not.
    """
    check_numbers(Range(least=least, whole=True), **values)


def check_range(min_queries: int, max_queries: int) -> None:
    """Whether these can be the fewest and the most queries of a step.

    Raises:
        ZOError: they cannot.
    """
    check_whole(max_queries=max_queries, min_queries=min_queries)
    if min_queries > max_queries:
        raise ZOError(f"min_queries={min_queries} is above max_queries={max_queries}; lower one or raise the other.")
