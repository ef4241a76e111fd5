"""Query schedules: step and epoch -> number of queries.

A schedule is any callable ``(step, epoch, history) -> int``. ``step`` counts optimizer steps from 0, ``epoch`` is
floor(step / steps_per_epoch), ``history`` says what was spent so far. It must return at least 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zo_opt.errors import ZOError


@dataclass
class History:
    """What a run has spent so far: queries, and forward passes (one evaluation of the loss on one batch)."""

    queries: int = 0
    forwards: int = 0


QuerySchedule = Callable[[int, int, History], int]


def constant_queries(queries: int = 1) -> QuerySchedule:
    """The same number of queries in every step.

    >>> constant_queries(4)(100, 3, History())
    4
    """
    _check_positive("queries", queries)

    def schedule(step: int, epoch: int, history: History) -> int:
        return queries

    return schedule


def adazeta_queries(
    alpha: float = 0.85, beta: float = 0.4, max_queries: int = 15, min_queries: int = 1
) -> QuerySchedule:
    """AdaZeta's adaptive schedule Q_k = min(max(int(alpha * e_k^beta), 1), Q_max).

    Source: arXiv 2406.18060, section 3.3, with e_k = floor(k / ceil(D/B)) the epoch (D examples, batches of B); the
    integer part and the floor of 1 are those of the released code. Default values: the released ones.

    Args:
        alpha, beta: in the open interval (0, 1).
        max_queries: Q_max, the most queries a step may take.
        min_queries: [choice] the fewest a step takes (1 in the publication). With ``query_mode="split"`` queries
            cost no forward passes, so that starting at more than one is free.

    >>> schedule = adazeta_queries(alpha=0.85, beta=0.4, max_queries=15)
    >>> [schedule(0, epoch, History()) for epoch in (0, 1, 10, 100, 1000, 10000)]
    [1, 1, 2, 5, 13, 15]
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 < value < 1:
            raise ZOError(f"{name}={value} is outside AdaZeta's range; give a number between 0 and 1 (both excluded).")
    _check_positive("max_queries", max_queries)
    _check_positive("min_queries", min_queries)
    if min_queries > max_queries:
        raise ZOError(f"min_queries={min_queries} is above max_queries={max_queries}; lower one or raise the other.")

    def schedule(step: int, epoch: int, history: History) -> int:
        return min(max(int(alpha * epoch**beta), min_queries), max_queries)

    return schedule


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ZOError(f"{name}={value} is not possible; give a whole number of at least 1.")
