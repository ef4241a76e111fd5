"""Whether an advised learning rate takes the loss down: a few steps of the run itself, with it and with smaller ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, isnan, nan, sqrt

import torch

from zo_opt.errors import NonFiniteLossError
from zo_opt.record.progress import Reporter
from zo_opt.training.config import TrainConfig
from zo_opt.training.setup import Tools
from zo_opt.training.stepper import Stepper
from zo_opt.training.stop import StopSignals

ROWS = 64  # training rows whose loss is looked at
MOST_TRIALS = 5


@dataclass(frozen=True)
class Trial:
    """A few steps at one learning rate.

    Attributes:
        lr: constant.
        losses: of each step's batch; nan where it was not finite.
        before, after: mean loss over the same training rows.
    """

    lr: float
    losses: tuple[float, ...]
    before: float
    after: float

    @property
    def learned(self) -> bool:
        """Whether the loss fell."""
        return self.after < self.before


def try_learning_rates(config: TrainConfig, tools: Tools, lr: float, steps: int, reporter: Reporter) -> list[Trial]:
    """Trials from ``lr`` downwards, each by the square root of ten, until smaller ones learn less; the adapter is put back after each.

    Args:
        config: the run's options, with the zo_eps that is advised.
        tools: its model and rows.
        lr: the largest one.
        steps: of each trial.
        reporter: shown the progress.
    """
    start = {name: parameter.detach().clone() for name, parameter in tools.model.adapter_state().items()}
    before, trials = _loss(config, tools), list[Trial]()
    with reporter.track("training with lr", MOST_TRIALS * steps, "steps") as tracker, StopSignals() as stop:
        for number in range(MOST_TRIALS):
            rate = float(f"{lr / sqrt(10) ** number:.2g}")
            trial_config = replace(config, lr=rate, steps=steps, lr_schedule="constant")
            stepper = Stepper(trial_config, replace(tools, recipe=replace(tools.recipe, lr=rate), steps=steps))
            losses = []
            try:
                for _ in range(steps):
                    stepper.step(stop)
                    record = stepper.optimizer.last_record
                    losses.append(nan if record is None else record.loss)
                    tracker.advance(1, f"lr {rate:g}")
                after = _loss(config, tools)
            except NonFiniteLossError:
                after = nan
            trials.append(Trial(rate, tuple(losses), before, after if isfinite(after) else nan))
            for name, parameter in tools.model.adapter_state().items():
                parameter.data.copy_(start[name])
            if (best := best_trial(trials)) is not None and best is not trials[-1]:
                break
    return trials


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The one that brought the loss down furthest; None where none did."""
    learned = [trial for trial in trials if not isnan(trial.after) and trial.learned]
    return min(learned, key=lambda trial: trial.after) if learned else None


@torch.no_grad()
def _loss(config: TrainConfig, tools: Tools) -> float:
    rows, total = min(ROWS, len(tools.train)), 0.0
    for first in range(0, rows, config.eval_batch_size):
        indices = list(range(first, min(first + config.eval_batch_size, rows)))
        total += len(indices) * float(tools.train.loss(tools.model, tools.train.batch(indices)))
    return total / rows
