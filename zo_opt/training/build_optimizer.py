"""From options to an optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from zo_opt.adapters import lora_plus_groups, trainable_parameters
from zo_opt.choices import split
from zo_opt.distributed import world_size
from zo_opt.optim import OPTIMIZERS, CountingOptimizer
from zo_opt.privacy import GaussianPrivacy
from zo_opt.training.config import TrainConfig
from zo_opt.training.parts import run_defaults


def make_optimizer(
    config: TrainConfig,
    model: nn.Module,
    params: list[Any],
    lr: float,
    steps_per_epoch: int,
    privacy: GaussianPrivacy | None = None,
) -> CountingOptimizer:
    """The optimizer that the options describe; what they leave open is the optimizer's own.

    Args:
        config: the options.
        model: the model that holds the parameters.
        params: parameters or groups of them.
        lr: learning rate.
        steps_per_epoch: optimizer steps in an epoch.
        privacy: what hides the rows, if anything does.
    """
    name, own = split("optimizer", config.optimizer)
    kind = OPTIMIZERS.find(name)
    setting: dict[str, Any] = {"steps_per_epoch": steps_per_epoch, "max_failed_steps": config.max_failed_steps}
    if not config.zeroth_order:
        backpropagation: CountingOptimizer = kind(
            params, lr=lr, weight_decay=config.weight_decay, **setting, **(run_defaults("optimizer", name) | own)
        )
        return backpropagation
    together = world_size() > 1 or config.query_mode == "distributed"
    optimizer: CountingOptimizer = kind(
        params,
        lr=lr,
        seed=config.seed,
        query_mode="distributed" if together else config.mode,
        distributed=config.make_distributed() if together else None,
        module=model,
        privacy=privacy,
        **setting,
        **config.make_choices(steps_per_epoch),
        **own,
    )
    return optimizer


def make_param_groups(config: TrainConfig, model: nn.Module, lr: float) -> list[Any]:
    """The trainables; in LoRA+'s groups where a ratio is given."""
    if config.loraplus_lr_ratio is None:
        return trainable_parameters(model)
    return lora_plus_groups(
        model, lr, config.loraplus_lr_ratio, config.loraplus_lr_embedding, weight_decay=config.weight_decay
    )
