"""How many steps a budget pays for: the cost of a step is measured on a toy, since every optimizer knows best what it evaluates."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise

import torch
from torch import nn

from zo_opt.errors import ZOError
from zo_opt.optim import ZerothOrderOptimizer, first_order
from zo_opt.schedules import History
from zo_opt.training.build_optimizer import make_optimizer
from zo_opt.training.config import TrainConfig


def steps_within(config: TrainConfig, forwards: int, steps_per_epoch: int) -> int:
    """The most optimizer steps that so many forward passes pay for: a run of one more would cost more than that.

    The ``variance`` schedule follows what a run measures; it is taken at its most expensive. Line searches are not counted.

    Args:
        config: the run's options; its ``steps`` is ignored.
        forwards: the budget, a backward pass counted as two.
        steps_per_epoch: optimizer steps in an epoch, which query schedules count.

    Raises:
        ZOError: not a single step.

    >>> steps_within(TrainConfig(optimizer="adamw"), 600, 63), steps_within(TrainConfig(), 600, 63)
    (200, 300)
    """
    if config.optimizer == first_order.NAME:
        steps = forwards // first_order.FORWARDS_PER_STEP
    else:
        if config.query_schedule == "variance":
            config = replace(config, query_schedule="constant", max_queries=config.max_queries or 15)
        cost_of_run = _run_costs(config, steps_per_epoch)
        steps = bisect_right(range(1, forwards + 1), forwards, key=cost_of_run)  # a step costs at least one
    if steps < 1:
        raise ZOError(
            f"a budget of {forwards} forward passes does not pay for one step of optimizer {config.optimizer!r} "
            f"with adapter {config.adapter!r}; give more."
        )
    return steps


def _run_costs(config: TrainConfig, steps_per_epoch: int) -> Callable[[int], int]:
    """Steps of a run, over which schedules may spread -> its forward passes."""

    @cache
    def costs(queries: int) -> list[int]:
        """Of one step after another, until they repeat: MeZO-SVRG's differ between snapshots."""
        toy = make_toy()
        optimizer = toy_optimizer(config, toy, steps_per_epoch)
        optimizer.query_schedule = lambda *_: queries
        batch = torch.linspace(-1, 1, config.batch_size * 4).view(config.batch_size, 4)
        spent = [0]
        for _ in range(getattr(optimizer, "interval", 1)):
            optimizer.step(lambda b: toy(b).square().mean(), batch)
            spent.append(optimizer.history.forwards)
        return [after - before for before, after in pairwise(spent)]

    def cost_of_run(steps: int) -> int:
        schedule = toy_optimizer(replace(config, steps=steps), make_toy(), steps_per_epoch).query_schedule
        history = History()
        for step in range(steps):
            queries = int(schedule(step, step // steps_per_epoch, history))
            history.queries += queries
            history.forwards += costs(queries)[step % len(costs(queries))]
        return history.forwards

    return cost_of_run


def make_toy() -> nn.Linear:
    """A model whose losses cost nothing; no random numbers are drawn for it."""
    toy: nn.Linear = nn.utils.skip_init(nn.Linear, 4, 4, bias=False)
    nn.init.eye_(toy.weight)
    return toy


def toy_optimizer(config: TrainConfig, toy: nn.Module, steps_per_epoch: int) -> ZerothOrderOptimizer:
    """The run's optimizer, on the toy."""
    optimizer = make_optimizer(config, toy, list(toy.parameters()), 0.0, steps_per_epoch)
    assert isinstance(optimizer, ZerothOrderOptimizer)
    return optimizer
