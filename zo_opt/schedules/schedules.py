"""Query schedules: step and epoch -> number of queries.

A schedule is any callable ``(step, epoch, history) -> int``. ``step`` counts optimizer steps from 0, ``epoch`` is
floor(step / steps_per_epoch), ``history`` says what was spent and seen so far. It must return at least 1, and must know
nothing but its arguments: a resumed run then continues as if it had never stopped.

Each function below makes one; :data:`SCHEDULES` lists them by name. Costs are in forward passes: a step costs
``forwards_per_step + forwards_per_query * queries``. That is 0 and 2 for two-sided queries, 1 and 1 for one-sided ones,
2 and 0 where the queries share the batch (``query_mode="split"``), and k times as much over k micro-batches.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

from zo_opt.errors import ZOError

SIGNAL_DECAY = 0.9


@dataclass
class History:
    """What a run has spent and seen so far; plain numbers, so that a checkpoint can hold it.

    Attributes:
        queries: directions evaluated.
        forwards: forward passes (one evaluation of the loss on one batch).
        signal: exponential average (decay 0.9 a step) of the mean square of a step's projected gradients, in squared
            loss per squared parameter unit; for Gaussian and Rademacher directions it estimates ||gradient||^2.
        peak_signal: the largest ``signal`` so far.
    """

    queries: int = 0
    forwards: int = 0
    signal: float = 0.0
    peak_signal: float = 0.0

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


def constant_queries(queries: int = 1) -> QuerySchedule:
    """The same number of queries in every step.

    Raises:
        ZOError: fewer than one query.

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
        alpha, beta: in the open interval (0, 1); :func:`derived_beta` fits beta to the length of the run.
        max_queries: Q_max, the most queries a step may take.
        min_queries: [choice] the fewest a step takes (1 in the publication). With ``query_mode="split"`` queries
            cost no forward passes, so that starting at more than one is free.

    Raises:
        ZOError: a value out of range.

    >>> schedule = adazeta_queries(alpha=0.85, beta=0.4, max_queries=15)
    >>> [schedule(0, epoch, History()) for epoch in (0, 1, 10, 100, 1000, 10000)]
    [1, 1, 2, 5, 13, 15]
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 < value < 1:
            raise ZOError(f"{name}={value} is outside AdaZeta's range; give a number between 0 and 1 (both excluded).")
    _check_range(min_queries, max_queries)

    def schedule(step: int, epoch: int, history: History) -> int:
        return min(max(int(alpha * epoch**beta), min_queries), max_queries)

    return schedule


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
    if not 0 < alpha < 1:
        raise ZOError(f"alpha={alpha} is outside AdaZeta's range; give a number between 0 and 1 (both excluded).")
    _check_positive("epochs", epochs)
    _check_positive("queries_at_end", queries_at_end)
    if epochs * alpha <= queries_at_end:
        raise ZOError(
            f"beta cannot be derived for {epochs} epochs: growing to {queries_at_end} queries with beta below 1 takes at "
            f"least {math.floor(queries_at_end / alpha) + 1}; train for more epochs or give beta as a number."
        )
    return math.log(queries_at_end / alpha) / math.log(epochs)


def linear_queries(start: int, end: int, steps: int) -> QuerySchedule:
    """From ``start`` queries in step 0 evenly to ``end`` in step ``steps - 1``, to the nearest whole number; then ``end``.

    Raises:
        ZOError: fewer than one query or step.

    >>> [linear_queries(1, 4, steps=7)(step, 0, History()) for step in (0, 1, 2, 3, 4, 5, 6, 100)]
    [1, 2, 2, 3, 3, 4, 4, 4]
    """
    last = _check_ramp(start, end, steps)

    def schedule(step: int, epoch: int, history: History) -> int:
        # floor(start + (end - start) * step / last + 1/2) in whole numbers, which never round the wrong way.
        return start + (2 * (end - start) * min(step, last) + last) // (2 * last)

    return schedule


def cosine_queries(start: int, end: int, steps: int) -> QuerySchedule:
    """From ``start`` to ``end`` along half a cosine: slow at both ends, fast in the middle; then ``end``.

    Q = start + (end - start) * (1 - cos(pi * step / (steps - 1))) / 2, to the nearest whole number.

    Raises:
        ZOError: fewer than one query or step.

    >>> [cosine_queries(1, 9, steps=9)(step, 0, History()) for step in range(9)]
    [1, 1, 2, 3, 5, 7, 8, 9, 9]
    """
    last = _check_ramp(start, end, steps)

    def schedule(step: int, epoch: int, history: History) -> int:
        progress = (1 - math.cos(math.pi * min(step, last) / last)) / 2
        return math.floor(start + (end - start) * progress + 0.5)

    return schedule


def stepwise_queries(milestones: Mapping[int, int]) -> QuerySchedule:
    """So many queries from each milestone on: step -> queries; the first milestone is step 0.

    Raises:
        ZOError: step 0 is missing, a step is negative, or fewer than one query.

    >>> [stepwise_queries({0: 1, 100: 4, 200: 16})(step, 0, History()) for step in (0, 99, 100, 250)]
    [1, 1, 4, 16]
    """
    starts = sorted(milestones)
    if not starts or starts[0] != 0:
        raise ZOError(
            f"milestones={dict(milestones)} do not begin at step 0; say how many queries the run starts with."
        )
    for start in starts:
        _check_positive(f"milestones[{start}]", milestones[start])
    levels = [milestones[start] for start in starts]

    def schedule(step: int, epoch: int, history: History) -> int:
        return levels[bisect_right(starts, step) - 1]

    return schedule


def budget_queries(forwards: int, steps: int, forwards_per_query: int = 2, forwards_per_step: int = 0) -> QuerySchedule:
    """Spend exactly ``forwards`` forward passes in ``steps`` steps, as evenly as whole queries allow.

    Every step divides what is left by the steps that are left (rounded down, so that later steps make up for it), which
    also corrects whatever earlier steps cost more or less than expected. A remainder that buys no query,
    ``(forwards - steps * forwards_per_step) % forwards_per_query``, stays unspent. Steps beyond ``steps`` take what is
    left, and at least one query, as every step does.

    Args:
        forwards: forward passes of the whole run, counted by ``history.forwards``.
        steps: optimizer steps of the whole run.
        forwards_per_query, forwards_per_step: what queries cost (see the module's first paragraphs).

    Raises:
        ZOError: the budget is below one query a step.

    >>> simulate(budget_queries(forwards=20, steps=4), steps=4)
    [2, 2, 3, 3]
    """
    for name, value in (("forwards", forwards), ("steps", steps), ("forwards_per_query", forwards_per_query)):
        _check_positive(name, value)
    _check_count("forwards_per_step", forwards_per_step)
    least = steps * (forwards_per_query + forwards_per_step)
    if forwards < least:
        raise ZOError(
            f"forwards={forwards} is below one query in each of {steps} steps, which costs {least}; raise the budget or "
            f"take at most {forwards // (forwards_per_query + forwards_per_step)} steps."
        )

    def schedule(step: int, epoch: int, history: History) -> int:
        steps_left = max(steps - step, 1)
        left = forwards - history.forwards - steps_left * forwards_per_step
        return max(left // (steps_left * forwards_per_query), 1)

    return schedule


def variance_queries(min_queries: int = 1, max_queries: int = 16) -> QuerySchedule:
    """More queries as the gradient fades: Q = ceil(min_queries * peak_signal / signal), at most ``max_queries``.

    The relative variance of the mean of Q estimates in d dimensions is about (d + 1) / Q * (1 + sigma^2 / ||gradient||^2)
    with sigma^2 the variance of the batch. The mean square of projected gradients (:meth:`History.observe`) estimates
    ||gradient||^2, so keeping Q * signal where it was at the peak keeps the second term in check as the gradient falls
    below the noise. Before anything was observed: ``min_queries``.

    The signal is itself an average of squares of few random numbers, so its peak lies above its mean: where the gradient
    does not fade at all, 1000 steps take 2.6 times min_queries of 1 on average, and 1.5 times min_queries of 8.

    Raises:
        ZOError: fewer than one query, or min_queries above max_queries.

    >>> schedule = variance_queries(min_queries=2, max_queries=16)
    >>> [schedule(0, 0, History(signal=s, peak_signal=1.0)) for s in (1.0, 0.7, 0.25, 0.01)]
    [2, 3, 8, 16]
    """
    _check_range(min_queries, max_queries)

    def schedule(step: int, epoch: int, history: History) -> int:
        if history.peak_signal == 0:
            return min_queries
        fall = history.peak_signal / history.signal if history.signal > 0 else math.inf
        return max_queries if min_queries * fall >= max_queries else max(math.ceil(min_queries * fall), min_queries)

    return schedule


SCHEDULES: dict[str, Callable[..., QuerySchedule]] = {
    "constant": constant_queries,
    "adazeta": adazeta_queries,
    "linear": linear_queries,
    "cosine": cosine_queries,
    "stepwise": stepwise_queries,
    "budget": budget_queries,
    "variance": variance_queries,
}


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
        steps: optimizer steps.
        steps_per_epoch: ceil(examples / batch size).
        forwards_per_query, forwards_per_step: what queries cost (see the module's first paragraphs).
        signals: the mean square of the projected gradients of each step. Without them nothing is observed, and
            :func:`variance_queries` stays at min_queries.

    Raises:
        ZOError: impossible counts, or not one signal a step.

    >>> simulate(variance_queries(1, 16), steps=4, signals=[8.0, 4.0, 2.0, 1.0])
    [1, 1, 2, 2]
    """
    _check_positive("steps", steps)
    _check_positive("steps_per_epoch", steps_per_epoch)
    _check_count("forwards_per_query", forwards_per_query)
    _check_count("forwards_per_step", forwards_per_step)
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


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise ZOError(f"{name}={value} is not possible; give a whole number of at least 1.")


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, Integral) or value < 0:
        raise ZOError(f"{name}={value} is not possible; give a whole number of at least 0.")


def _check_range(min_queries: int, max_queries: int) -> None:
    _check_positive("max_queries", max_queries)
    _check_positive("min_queries", min_queries)
    if min_queries > max_queries:
        raise ZOError(f"min_queries={min_queries} is above max_queries={max_queries}; lower one or raise the other.")


def _check_ramp(start: int, end: int, steps: int) -> int:
    """The last step of a ramp, at least 1 so that it can be divided by."""
    for name, value in (("start", start), ("end", end), ("steps", steps)):
        _check_positive(name, value)
    return max(steps - 1, 1)
