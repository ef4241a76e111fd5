"""Differential privacy of a run's training rows: noise found, rows sampled, a step made (docs/how-to/privacy.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo_opt.adapters import AdapterModel
from zo_opt.errors import ZOError
from zo_opt.optim import ZerothOrderOptimizer
from zo_opt.privacy import GaussianPrivacy, noise_for
from zo_opt.schedules import constant_queries, simulate
from zo_opt.tasks.batches import BatchOrder
from zo_opt.tasks.evaluation import Prepared
from zo_opt.tasks.metrics import LANGUAGE_MODELLING
from zo_opt.training.config import TrainConfig


def make_privacy(config: TrainConfig, rows: Prepared, say: Callable[[str], None]) -> GaussianPrivacy | None:
    """What hides the training rows of a run; None where nothing was asked for.

    Raises:
        ZOError: a task whose rows are not independent, a batch larger than all rows, or no noise that keeps to the epsilon.
    """
    if not config.private:
        return None
    assert config.privacy_clip is not None
    if rows.scorer.task.kind == LANGUAGE_MODELLING:
        raise ZOError(
            "running text is cut into blocks that many rows share; privacy is for tasks whose rows stand alone."
        )
    if config.privacy_delta * len(rows) >= 1:
        raise ZOError(
            f"privacy_delta={config.privacy_delta:g} promises nothing to one of {len(rows)} rows; give a number well below {1 / len(rows):.1g}."
        )
    noise = config.privacy_noise
    if noise is None:
        assert config.privacy_epsilon is not None
        # Queries by step: a sum of their squares is what counts, so their order does not matter.
        schedule = config.make_schedule(-(-len(rows) // config.batch_size)) or constant_queries(1)
        steps = Counter(simulate(schedule, config.most_steps, -(-len(rows) // config.batch_size)))
        noise = noise_for(
            config.privacy_epsilon, config.privacy_delta, steps, examples=len(rows), batch_size=config.batch_size
        )
        say(f"noise multiplier {noise:.3g} keeps {config.most_steps:,} steps within epsilon {config.privacy_epsilon:g}")
    return GaussianPrivacy(config.privacy_clip, noise, examples=len(rows), batch_size=config.batch_size)


class PoissonOrder(BatchOrder):
    """Each row is in each batch with the same probability, independently; a batch may be empty."""

    def __init__(self, privacy: GaussianPrivacy) -> None:
        self.batch_size, self._privacy = privacy.batch_size, privacy
        self.steps_per_epoch = -(-privacy.examples // privacy.batch_size)

    def indices(self, step: int) -> list[int]:
        return self._privacy.batch(step)


def private_step(optimizer: ZerothOrderOptimizer, model: AdapterModel, rows: Prepared, indices: Sequence[int]) -> None:
    """A step on these rows, of which there may be none."""
    batch = rows.batch(indices) if indices else None

    def losses() -> Tensor:
        if batch is None:
            return torch.zeros(0)
        values, penalty = rows.losses(model, batch), model.penalty()
        return values if penalty is None else values + penalty  # which no row has a part in

    optimizer.step(losses)


def spent(config: TrainConfig, optimizer: object) -> str:
    """The guarantee of what a run has released, in words; empty where nothing was asked for."""
    privacy = optimizer.setting.privacy if isinstance(optimizer, ZerothOrderOptimizer) else None
    if privacy is None:
        return ""
    epsilon = privacy.epsilon(config.privacy_delta)
    return (
        f"epsilon {epsilon:.3g} at delta {config.privacy_delta:g} for one training row added or removed (noise multiplier "
        f"{privacy.noise_multiplier:.3g}, clip {privacy.clip:g}, Poisson batches of {privacy.batch_size} of {privacy.examples:,} rows)"
    )
