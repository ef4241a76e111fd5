"""More queries as the gradient fades."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from zo_opt.schedules.base import History, Schedule, check_range


@dataclass(frozen=True)
class VarianceQueries(Schedule):
    """Q = ceil(min_queries * peak_signal / signal), at most ``max_queries``.

    Use it where gradients fade: it asks for more queries as the signal falls below its peak.

    The relative variance of the mean of Q estimates in d dimensions is about (d + 1) / Q * (1 + sigma^2 / ||gradient||^2)
    with sigma^2 the variance of the batch. The mean square of projected gradients (:meth:`History.observe`) estimates
    ||gradient||^2, so keeping Q * signal where it was at the peak keeps the second term in check as the gradient falls
    below the noise. Before anything was observed: ``min_queries``.

    The signal is itself an average of squares of few random numbers, so its peak lies above its mean: where the gradient
    does not fade at all, 1000 steps take 2.6 times min_queries of 1 on average, and 1.5 times min_queries of 8.

    Raises:
        ZOError: fewer than one query, or min_queries above max_queries.

    >>> schedule = VarianceQueries(min_queries=2, max_queries=16)
    >>> [schedule(0, 0, History(signal=s, peak_signal=1.0)) for s in (1.0, 0.7, 0.25, 0.01)]
    [2, 3, 8, 16]
    """

    reads_measurements: ClassVar[bool] = True
    min_queries: int = 1
    max_queries: int = 16

    def __post_init__(self) -> None:
        check_range(self.min_queries, self.max_queries)

    def __call__(self, step: int, epoch: int, history: History) -> int:
        least, most = self.min_queries, self.max_queries
        if history.peak_signal == 0:
            return least
        fall = history.peak_signal / history.signal if history.signal > 0 else math.inf
        return most if least * fall >= most else max(math.ceil(least * fall), least)
