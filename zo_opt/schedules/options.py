"""A query schedule from the options of a command line: one name for one thing, whichever schedule it is."""

from __future__ import annotations

from collections.abc import Mapping

from zo_opt.errors import ZOError
from zo_opt.schedules import (
    SCHEDULES,
    QuerySchedule,
    adazeta_queries,
    budget_queries,
    constant_queries,
    cosine_queries,
    derived_beta,
    linear_queries,
    simulate,
    stepwise_queries,
    variance_queries,
)

MAX_QUERIES = 15  # AdaZeta's released Q_max


def make_schedule(
    name: str,
    *,
    steps: int,
    steps_per_epoch: int = 1,
    alpha: float = 0.85,
    beta: float | str = 0.4,
    max_queries: int | None = None,
    min_queries: int = 1,
    budget_forwards: int | None = None,
    milestones: Mapping[int, int] | str | None = None,
    forwards_per_query: int = 2,
    forwards_per_step: int = 0,
    query_mode: str | None = None,
) -> QuerySchedule:
    """The schedule of that name.

    Args:
        name: a key of :data:`~zo_opt.schedules.SCHEDULES`.
        steps, steps_per_epoch: the run's length, in optimizer steps.
        alpha, beta: AdaZeta's; beta ``"derived"`` is :func:`~zo_opt.schedules.derived_beta` of the run's epochs, a last
            unfinished one counted.
        max_queries: the ceiling of adazeta and variance, the end of linear, cosine and the default milestones (15); the
            number of queries of constant (1).
        min_queries: the floor of adazeta and variance, the start of linear, cosine and the default milestones.
        budget_forwards: forward passes that budget spends; by default as many as adazeta would with these options.
        milestones: step -> queries of stepwise, or "step:queries" pairs with commas; by default four even levels, a quarter of the run each.
        forwards_per_query, forwards_per_step: what queries cost, for budget.
        query_mode: how queries are evaluated, where that is known.

    Raises:
        ZOError: the name is not known, or an option that this schedule needs is impossible.

    >>> from zo_opt.schedules import simulate
    >>> simulate(make_schedule("stepwise", steps=8, max_queries=10), steps=8)
    [1, 1, 4, 4, 7, 7, 10, 10]
    """
    for option, value in (("steps", steps), ("steps_per_epoch", steps_per_epoch)):
        if value < 1:
            raise ZOError(f"{option}={value} is not possible; give a whole number of at least 1.")
    most = MAX_QUERIES if max_queries is None else max_queries
    if isinstance(milestones, str):
        milestones = parse_milestones(milestones)
    match name:
        case "constant":
            return constant_queries(1 if max_queries is None else max_queries)
        case "adazeta":
            exponent = resolve_beta(beta, alpha, -(-steps // steps_per_epoch))
            return adazeta_queries(alpha, exponent, most, min_queries)
        case "linear":
            return linear_queries(min_queries, most, steps)
        case "cosine":
            return cosine_queries(min_queries, most, steps)
        case "stepwise":
            return stepwise_queries(default_milestones(min_queries, most, steps) if milestones is None else milestones)
        case "budget":
            if query_mode == "split":
                raise ZOError(
                    "in split mode a step costs two forwards whatever its queries; a budget needs query_mode='sequential'."
                )
            if budget_forwards is None:
                adazeta = make_schedule(
                    "adazeta", steps=steps, steps_per_epoch=steps_per_epoch, alpha=alpha, beta=beta,
                    max_queries=max_queries, min_queries=min_queries,
                )  # fmt: skip
                queries = sum(simulate(adazeta, steps, steps_per_epoch))
                budget_forwards = queries * forwards_per_query + steps * forwards_per_step
            return budget_queries(budget_forwards, steps, forwards_per_query, forwards_per_step)
        case "variance":
            return variance_queries(min_queries, most)
    raise ZOError(f"query_schedule={name!r} is not known; choose one of {', '.join(SCHEDULES)}.")


def resolve_beta(beta: float | str, alpha: float, epochs: int) -> float:
    """AdaZeta's beta as a number: itself, or derived from the number of epochs.

    Raises:
        ZOError: a word other than "derived", or a run too short to derive it.

    >>> resolve_beta("0.4", alpha=0.85, epochs=10)
    0.4
    """
    if beta == "derived":
        return derived_beta(alpha, epochs)
    try:
        return float(beta)
    except ValueError:
        raise ZOError(f'beta={beta!r} is no number; give one between 0 and 1, or "derived".') from None


def default_milestones(start: int, end: int, steps: int) -> dict[int, int]:
    """Four levels from ``start`` to ``end``, a quarter of the run each; fewer in a run of fewer steps.

    >>> default_milestones(1, 16, steps=1000)
    {0: 1, 250: 6, 500: 11, 750: 16}
    """
    return {steps * quarter // 4: start + (end - start) * quarter // 3 for quarter in range(4)}


def parse_milestones(text: str) -> dict[int, int]:
    """``step:queries`` pairs, comma separated.

    Raises:
        ZOError: not of that form, or a step twice.

    >>> parse_milestones("0:1, 250:4")
    {0: 1, 250: 4}
    """
    pairs = [pair.split(":") for pair in text.split(",")]
    try:
        milestones = {int(step): int(queries) for step, queries in pairs}
    except ValueError:
        raise ZOError(f"milestones={text!r} is not of the form step:queries,step:queries, such as 0:1,250:4.") from None
    if len(milestones) < len(pairs):
        raise ZOError(f"milestones={text!r} names a step twice; give each step once.")
    return milestones
