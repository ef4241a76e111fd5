"""Query schedules: step and epoch -> number of queries."""

from zo_opt.schedules.schedules import (
    SCHEDULES,
    SIGNAL_DECAY,
    History,
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

__all__ = [
    "SCHEDULES",
    "SIGNAL_DECAY",
    "History",
    "QuerySchedule",
    "adazeta_queries",
    "budget_queries",
    "constant_queries",
    "cosine_queries",
    "derived_beta",
    "linear_queries",
    "simulate",
    "stepwise_queries",
    "variance_queries",
]
