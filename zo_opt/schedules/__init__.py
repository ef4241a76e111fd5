"""Query schedules: step, epoch and history -> number of queries. One file a kind; add a line to SCHEDULES for a new one.

A schedule is any callable ``(step, epoch, history) -> int``. ``step`` counts optimizer steps from 0, ``epoch`` is
floor(step / steps_per_epoch), ``history`` says what was spent and seen so far. It must return at least 1, and must know
nothing but its arguments: a resumed run then continues as if it had never stopped.
"""

from zo_opt.choices import Table
from zo_opt.schedules.adazeta import AdaZetaQueries, derived_beta
from zo_opt.schedules.base import History, QueryMode, QuerySchedule, RunLength, Schedule, for_run, simulate
from zo_opt.schedules.budget import BudgetQueries
from zo_opt.schedules.fixed import ConstantQueries, CosineQueries, EveryExample, LinearQueries, StepwiseQueries
from zo_opt.schedules.variance import VarianceQueries

SCHEDULES: Table[QuerySchedule] = Table(
    "query_schedule",
    None,
    {
        "constant": ConstantQueries,
        "adazeta": AdaZetaQueries,
        "linear": LinearQueries,
        "cosine": CosineQueries,
        "stepwise": StepwiseQueries,
        "budget": BudgetQueries,
        "variance": VarianceQueries,
        "every-example": EveryExample,
    },
)
# As functions, which is how a loop reads best: query_schedule=adazeta_queries(max_queries=15).
constant_queries = ConstantQueries
adazeta_queries = AdaZetaQueries
linear_queries = LinearQueries
cosine_queries = CosineQueries
stepwise_queries = StepwiseQueries
budget_queries = BudgetQueries
variance_queries = VarianceQueries

__all__ = [
    "SCHEDULES",
    "AdaZetaQueries",
    "BudgetQueries",
    "ConstantQueries",
    "CosineQueries",
    "EveryExample",
    "History",
    "LinearQueries",
    "QueryMode",
    "QuerySchedule",
    "RunLength",
    "Schedule",
    "StepwiseQueries",
    "VarianceQueries",
    "adazeta_queries",
    "budget_queries",
    "constant_queries",
    "cosine_queries",
    "derived_beta",
    "for_run",
    "linear_queries",
    "simulate",
    "stepwise_queries",
    "variance_queries",
]
