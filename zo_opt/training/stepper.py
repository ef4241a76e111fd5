"""One step of a run, from rows to moved weights: what every process of it does alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_opt.adapters import AdapterModel
from zo_opt.journal import Journal
from zo_opt.optim import CountingOptimizer, ZerothOrderOptimizer
from zo_opt.privacy import GaussianPrivacy
from zo_opt.tasks.batches import BatchOrder
from zo_opt.tasks.evaluation import Prepared
from zo_opt.training.build_optimizer import make_optimizer, make_param_groups
from zo_opt.training.config import TrainConfig
from zo_opt.training.private import PoissonOrder, private_step
from zo_opt.training.setup import Tools
from zo_opt.training.stop import StopSignals


class Stepper:
    """A run's order of rows, optimizer and learning rate, at the start of the run.

    Args:
        config: the run's options.
        tools: its model and rows.
        privacy: what hides the rows, if anything does.

    Attributes:
        journal: where steps are recorded, once there is one.
    """

    def __init__(self, config: TrainConfig, tools: Tools, privacy: GaussianPrivacy | None = None) -> None:
        from transformers import get_scheduler

        self._model, self._rows = tools.model, tools.train
        self._order = (
            BatchOrder(tools.train.labels, config.batch_size, config.seed, config.batch_order)
            if privacy is None
            else PoissonOrder(privacy)
        )
        self.optimizer = make_optimizer(
            tools.recipe.told(config), tools.model, make_param_groups(config, tools.model, tools.recipe.lr), tools.recipe.lr,
            self._order.steps_per_epoch, privacy,
        )  # fmt: skip
        schedule = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
        self.lr_scheduler = get_scheduler(schedule, self.optimizer, config.warmup_steps, tools.steps)
        self.journal: Journal | None = None
        self._ranks = None if not isinstance(self.optimizer, ZerothOrderOptimizer) else self.optimizer.ranks

    @property
    def lr(self) -> float:
        """The learning rate of the next step, of the first parameter group."""
        return float(self.lr_scheduler.get_last_lr()[0])

    def relearn(self) -> None:
        """After a checkpoint of a run of other steps: the learning rate is this run's from here on."""
        scheduler = self.lr_scheduler
        here = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [base * share(scheduler.last_epoch) for base, share in here]
        for group, lr in zip(self.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = lr

    def step(self, stop: StopSignals) -> None:
        """Take the next step, and tell the other processes if a signal asked this one to end."""
        optimizer, model, rows = self.optimizer, self._model, self._rows
        indices = self._order.indices(optimizer.step_count)
        if isinstance(self._order, PoissonOrder):
            assert isinstance(optimizer, ZerothOrderOptimizer)
            private_step(optimizer, model, rows, indices)
        else:
            if self._ranks is not None:
                self._ranks.stop_wanted = stop.signum or 0
                indices = list(self._ranks.rows(indices))  # this rank's of them, where ranks share the data
            batch = rows.batch(indices) if indices else torch.empty(0)
            optimizer.step(lambda b: training_loss(model, rows, b), batch)
        if self.journal is not None:
            assert isinstance(optimizer, ZerothOrderOptimizer)
            self.journal.append(optimizer.last_update)
        advance_adapter(model, optimizer)
        self.lr_scheduler.step()

    def ending(self, stop: StopSignals) -> int | None:
        """The signal for which the run is to end before its next step; of several processes, the one that the last step told them all."""
        return stop.signum if self._ranks is None else self._ranks.stop or None


def training_loss(model: AdapterModel, rows: Prepared, batch: Any) -> Tensor:
    """The loss that is trained: the task's, and what the adapter adds to it."""
    loss, penalty = rows.loss(model, batch), model.penalty()
    return loss if penalty is None else loss + penalty


def advance_adapter(model: AdapterModel, optimizer: CountingOptimizer) -> None:
    """What changes in an adapter as training goes on, after a step; gradients are let go."""
    if model.schedule is not None and model.schedule.needs_grad:
        if isinstance(optimizer, ZerothOrderOptimizer):
            optimizer.write_last_grad()  # zeros if the step was dropped
        elif optimizer.failed_steps:  # gradients of a dropped step are not finite
            optimizer.zero_grad()
            return
    model.step(optimizer.step_count - 1)
    optimizer.zero_grad()
