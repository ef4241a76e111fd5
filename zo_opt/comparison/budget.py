"""How many steps a budget pays for: the cost of a step is measured on a toy, since every optimizer knows best what it evaluates."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

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
        costs = _Costs(config, forwards, steps_per_epoch)
        steps, too_many = 0, max(forwards, 0) + 1  # a step costs at least one
        while too_many - steps > 1:
            middle = (steps + too_many) // 2
            if costs.affordable(middle):
                steps = middle
            else:
                too_many = middle
    if steps < 1:
        raise ZOError(
            f"a budget of {forwards} forward passes does not pay for one step of optimizer {config.optimizer!r} "
            f"with adapter {config.adapter!r}; give more."
        )
    return steps


class _Costs:
    """Forward passes of whole runs, from those of single steps."""

    def __init__(self, config: TrainConfig, forwards: int, steps_per_epoch: int) -> None:
        if config.query_schedule == "variance":
            config = replace(config, query_schedule="constant", max_queries=config.max_queries or 15)
        self._config, self._forwards, self._steps_per_epoch = config, forwards, steps_per_epoch
        self._known: dict[int, list[int]] = {}

    def affordable(self, steps: int) -> bool:
        """Whether a run of so many steps stays within the budget; schedules may spread over a run's length."""
        optimizer = self._optimizer(_Toy(), replace(self._config, steps=steps))
        history = History()
        for step in range(steps):
            queries = int(optimizer.query_schedule(step, step // self._steps_per_epoch, history))
            costs = self._known.get(queries) or self._measure(queries)
            history.queries += queries
            history.forwards += costs[step % len(costs)]
            if history.forwards > self._forwards:
                return False
        return True

    def _measure(self, queries: int) -> list[int]:
        """Of one step after another, until they repeat: MeZO-SVRG's differ between snapshots."""
        toy = _Toy()
        optimizer = self._optimizer(toy, self._config)
        optimizer.query_schedule = lambda *_: queries
        batch = torch.linspace(-1, 1, self._config.batch_size * 4).view(self._config.batch_size, 4)
        costs = []
        for _ in range(getattr(optimizer, "interval", 1)):
            before = optimizer.history.forwards
            optimizer.step(lambda b: toy(b).square().mean(), batch)
            costs.append(optimizer.history.forwards - before)
        self._known[queries] = costs
        return costs

    def _optimizer(self, toy: nn.Module, config: TrainConfig) -> ZerothOrderOptimizer:
        optimizer = make_optimizer(config, toy, list(toy.parameters()), 0.0, self._steps_per_epoch)
        assert isinstance(optimizer, ZerothOrderOptimizer)
        return optimizer


class _Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight
