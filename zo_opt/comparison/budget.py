"""How many steps a budget of forward passes pays for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from zo_opt.choices import split
from zo_opt.errors import ZOError
from zo_opt.optim import ZerothOrderOptimizer
from zo_opt.optim.backpropagation import FORWARDS_PER_STEP
from zo_opt.schedules import History
from zo_opt.schedules.adazeta import MAX_QUERIES
from zo_opt.training.build_optimizer import make_optimizer
from zo_opt.training.config import TrainConfig


def steps_within(config: TrainConfig, forwards: int, steps_per_epoch: int) -> int:
    """The most optimizer steps that so many forward passes pay for: a run of one more would cost more than that.

    The ``variance`` schedule follows what a run measures; it is taken at its most expensive.

    Args:
        config: the run's options; its ``steps`` is ignored.
        forwards: the budget, a backward pass counted as two.
        steps_per_epoch: optimizer steps in an epoch, which query schedules count.

    Raises:
        ZOError: not a single step.

    >>> steps_within(TrainConfig(optimizer="adamw"), 600, 63), steps_within(TrainConfig(), 600, 63)
    (200, 300)
    """
    if config.zeroth_order:
        if isinstance(config.schedule, Mapping) and split("schedule", config.schedule)[0] == "variance":
            most = config.schedule.get("max_queries", MAX_QUERIES)
            config = replace(config, schedule={"name": "constant", "queries": most})

        def cost(steps: int) -> int:
            return _cost_of_run(replace(config, steps=steps), steps_per_epoch)

        steps = bisect_right(range(1, forwards + 1), forwards, key=cost)  # a step costs at least one
    else:
        steps = forwards // FORWARDS_PER_STEP
    if steps < 1:
        raise ZOError(
            f"a budget of {forwards} forward passes does not pay for one step of optimizer {config.optimizer_name!r} "
            f"with adapter {config.adapter_name!r}; give more."
        )
    return steps


def _cost_of_run(config: TrainConfig, steps_per_epoch: int) -> int:
    """Forward passes of a whole run, as its schedule asks for queries and its optimizer pays for them."""
    toy = nn.Linear(1, 1, bias=False, device="meta")  # the cost hangs on no weight
    optimizer = make_optimizer(config, toy, list(toy.parameters()), 0.0, steps_per_epoch)
    assert isinstance(optimizer, ZerothOrderOptimizer)
    history = History()
    for step in range(config.steps):
        queries = int(optimizer.choices.query_schedule(step, step // steps_per_epoch, history))
        history.queries += queries
        history.forwards += optimizer.forwards(step, queries)
    return history.forwards
