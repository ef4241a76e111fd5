"""AdaZeta's growing number of queries (arXiv 2406.18060, section 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from zo_opt.choices import Range, check_numbers
from zo_opt.errors import ZOError
from zo_opt.schedules.base import History, RunLength, Schedule, check_range, check_whole

MAX_QUERIES = 15  # the released Q_max


@dataclass(frozen=True)
class AdaZetaQueries(Schedule):
    """AdaZeta's adaptive schedule Q_k = min(max(int(alpha * e_k^beta), 1), Q_max).

    Use it for runs of many epochs; in few epochs it stays at ``min_queries``.

    Source: arXiv 2406.18060, section 3.3, with e_k = floor(k / ceil(D/B)) the epoch (D examples, batches of B); the
    integer part and the floor of 1 are those of the released code. Default values: the released ones.

    Args:
        alpha: in the open interval (0, 1).
        beta: in the open interval (0, 1); or "derived" from the number of epochs (:func:`derived_beta`).
        max_queries: Q_max, the most queries a step may take.
        min_queries: [choice] the fewest a step takes (1 in the publication). With ``query_mode="split"`` queries
            cost no forward passes, so that starting at more than one is free.

    Raises:
        ZOError: a value out of range.

    >>> schedule = AdaZetaQueries(alpha=0.85, beta=0.4, max_queries=15)
    >>> [schedule(0, epoch, History()) for epoch in (0, 1, 10, 100, 1000, 10000)]
    [1, 1, 2, 5, 13, 15]
    """

    alpha: float = 0.85
    beta: float | Literal["derived"] = 0.4
    max_queries: int = MAX_QUERIES
    min_queries: int = 1

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if name == "alpha" or not (isinstance(value, str) and value == "derived"):
                check_numbers(Range(above=0, below=1), **{name: value})
        check_range(self.min_queries, self.max_queries)

    def for_run(self, length: RunLength) -> AdaZetaQueries:
        return self if self.beta != "derived" else replace(self, beta=derived_beta(self.alpha, length.epochs))

    def __call__(self, step: int, epoch: int, history: History) -> int:
        if self.beta == "derived":
            raise ZOError("beta is derived from the run's epochs, which are not known here; give beta as a number.")
        return min(max(int(self.alpha * epoch**self.beta), self.min_queries), self.max_queries)


def derived_beta(alpha: float, epochs: int, queries_at_end: int = 20) -> float:
    """The beta for which AdaZeta's alpha * e^beta reaches ``queries_at_end`` at the run's end: ln(NUM / alpha) / ln(epochs).

    Source: the released code of arXiv 2406.18060, NUM = 20. With the released Q_max of 15 the ceiling is reached earlier.

    Args:
        alpha: AdaZeta's alpha, in (0, 1).
        epochs: epochs of the run.
        queries_at_end: NUM.

    Raises:
        ZOError: beta would not lie in AdaZeta's (0, 1), which takes more than NUM / alpha epochs (24 with the released
            values). [choice] Refused and not clipped: no beta of the publication's range gets there in so few epochs,
            and a schedule that quietly ends elsewhere is not the one asked for.

    >>> round(derived_beta(alpha=0.85, epochs=1000), 4)
    0.4572
    """
    check_numbers(Range(above=0, below=1), alpha=alpha)
    check_whole(epochs=epochs, queries_at_end=queries_at_end)
    if epochs * alpha <= queries_at_end:
        raise ZOError(
            f"beta cannot be derived for {epochs} epochs: growing to {queries_at_end} queries with beta below 1 takes at "
            f"least {math.floor(queries_at_end / alpha) + 1}; train for more epochs or give beta as a number."
        )
    return math.log(queries_at_end / alpha) / math.log(epochs)
