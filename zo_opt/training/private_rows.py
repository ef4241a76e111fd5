"""Differential privacy of a run's training rows: options checked, noise found, rows sampled, a step made (docs/privacy.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zo_opt.adapters import AdapterModel
from zo_opt.adapters.tt_init import FEATURES
from zo_opt.choices import split
from zo_opt.errors import ZOError
from zo_opt.estimators import TwoSided
from zo_opt.optim import OPTIMIZERS, CountingOptimizer, ZerothOrderOptimizer
from zo_opt.privacy import GaussianPrivacy, check_delta, check_epsilon, noise_for
from zo_opt.schedules import constant_queries, simulate
from zo_opt.tasks.batches import BatchOrder
from zo_opt.tasks.evaluation import Prepared
from zo_opt.tasks.metrics import LANGUAGE_MODELLING

if TYPE_CHECKING:
    from zo_opt.training.config import TrainConfig


def check_privacy(config: TrainConfig) -> None:
    """Whether a run's options allow a guarantee.

    Raises:
        ZOError: with a sentence on the first that does not.
    """
    if not config.private:
        if config.privacy_clip is not None:
            raise ZOError("privacy_clip was given without privacy_epsilon or privacy_noise; add one of them.")
        return
    if config.privacy_epsilon is not None and config.privacy_noise is not None:
        raise ZOError(
            "privacy_epsilon and privacy_noise were both given; the noise follows from epsilon, leave one out."
        )
    if config.privacy_epsilon is not None:
        check_epsilon(config.privacy_epsilon)
    check_delta(config.privacy_delta)
    if config.privacy_clip is None:
        raise ZOError(
            "privacy needs --privacy_clip, the bound on one row's projected gradient; choose it without looking at these rows (docs/privacy.md)."
        )
    kind = OPTIMIZERS.find(config.optimizer_name)
    if (
        getattr(kind, "own_estimates", False)
        or type(config.method.presets.get("estimator", TwoSided())) is not TwoSided
        or not config.zeroth_order
    ):
        raise ZOError(
            f"optimizer={config.optimizer_name!r} uses the rows otherwise than by two-sided differences, which alone are made private; "
            "choose another, such as adazeta or mezo."
        )
    wrong = {
        "adapter_init": config.adapter_init in FEATURES and "it places adapters by what the rows look like",
        "query_mode": config.mode != "sequential" and "privacy needs sequential",
        "schedule": config.schedule is not None
        and split("schedule", config.schedule)[0] == "variance"
        and "its queries depend on what was measured",
        "objective": config.objective != "loss" and "privacy needs the loss of each row",
        "batch_order": config.batch_order != "balanced" and "rows are sampled independently of each other",
        "quantise": config.quantise == "bnb-int8" and "it rounds each row by what the other rows of its batch are",
    }
    for name, why in wrong.items():
        if why:
            raise ZOError(f"{name}={getattr(config, name)!r} cannot be used with privacy: {why}; leave it out.")


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
        steps = Counter(simulate(schedule, config.steps, -(-len(rows) // config.batch_size)))
        noise = noise_for(
            config.privacy_epsilon, config.privacy_delta, steps, examples=len(rows), batch_size=config.batch_size
        )
        say(f"noise multiplier {noise:.3g} keeps {config.steps:,} steps within epsilon {config.privacy_epsilon:g}")
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


def spent(config: TrainConfig, optimizer: CountingOptimizer) -> str:
    """The guarantee of what a run has released, in words; empty where nothing was asked for."""
    privacy = optimizer.setting.privacy if isinstance(optimizer, ZerothOrderOptimizer) else None
    if privacy is None:
        return ""
    epsilon = privacy.epsilon(config.privacy_delta)
    return (
        f"epsilon {epsilon:.3g} at delta {config.privacy_delta:g} for one training row added or removed (noise multiplier "
        f"{privacy.noise_multiplier:.3g}, clip {privacy.clip:g}, Poisson batches of {privacy.batch_size} of {privacy.examples:,} rows)"
    )
