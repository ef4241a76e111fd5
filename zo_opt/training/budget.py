"""How many steps a run takes: as many as were asked for, or as its budget of forward passes pays for."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import replace

from torch import nn

from zo_opt.errors import ZOError
from zo_opt.optim import ZerothOrderOptimizer
from zo_opt.optim.backpropagation import FORWARDS_PER_STEP
from zo_opt.schedules import History
from zo_opt.training.build_optimizer import make_optimizer
from zo_opt.training.config import TrainConfig
from zo_opt.training.options import EPOCHS, LEAST_STEPS, MOST_STEPS


def steps_of(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of a run: as many as were asked for, else those of 5 epochs, 100 at least and 400 at most. With ``epochs`` each row is
    seen so often; with ``budget_forwards`` the run ends before the first step that would take more forward passes than that.

    They are counted before the run, as its query schedule asks for queries and its optimizer pays for them: learning rates, ranks and
    queries that change over a run need to know its end. The ``variance`` schedule follows what a run measures and is taken at its most.

    Args:
        config: the run's options.
        rows: to learn, which say how long an epoch is.

    Raises:
        ZOError: the budget does not pay for one step.

    >>> [steps_of(TrainConfig(adapter="lora"), rows) for rows in (100, 1000, 10_000)]
    [100, 313, 400]
    >>> steps_of(TrainConfig(optimizer="adamw", budget_forwards=600), 1000), steps_of(TrainConfig(adapter="tt", budget_forwards=600), 1000)
    (200, 300)
    """
    budget = config.budget_forwards
    if config.epochs is not None:
        return math.ceil(config.epochs * rows / config.batch_size)
    if budget is None:
        return config.steps or min(max(math.ceil(EPOCHS * rows / config.batch_size), LEAST_STEPS), MOST_STEPS)
    if config.zeroth_order:
        # By search, for what a step takes can hang on how many there are; each takes one forward pass at least.
        steps = bisect_right(range(1, budget + 1), budget, key=lambda steps: _cost(replace(config, steps=steps), rows))
    else:
        steps = budget // FORWARDS_PER_STEP
    if steps < 1:
        raise ZOError(
            f"a budget of {budget} forward passes does not pay for one step of optimizer {config.optimizer_name!r} "
            f"with adapter {config.adapter_name!r}; give more."
        )
    return steps


def _cost(config: TrainConfig, rows: int) -> int:
    """Forward passes of a whole run of zeroth order."""
    toy = nn.Linear(1, 1, bias=False, device="meta")  # the cost hangs on no weight
    steps_per_epoch = -(-rows // config.batch_size)
    optimizer = make_optimizer(config, toy, list(toy.parameters()), 0.0, steps_per_epoch)
    assert isinstance(optimizer, ZerothOrderOptimizer)
    history = History(peak_signal=1.0)  # a signal that is gone: schedules that follow it ask for their most
    for step in range(config.most_steps):
        queries = int(optimizer.choices.query_schedule(step, step // steps_per_epoch, history))
        history.queries += queries
        history.forwards += optimizer.forwards(step, queries)
    return history.forwards
