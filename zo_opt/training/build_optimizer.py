"""From options to an optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from zo_opt.adapters import lora_plus_groups, trainable_parameters
from zo_opt.distributed import world_size
from zo_opt.optim import OPTIMIZERS, ZerothOrderOptimizer, first_order
from zo_opt.optim.first_order import FirstOrder
from zo_opt.privacy import GaussianPrivacy
from zo_opt.training.config import TrainConfig


def make_optimizer(
    config: TrainConfig,
    model: nn.Module,
    params: list[Any],
    lr: float,
    steps_per_epoch: int,
    privacy: GaussianPrivacy | None = None,
    *,
    share_prefix: bool = True,
) -> ZerothOrderOptimizer | FirstOrder:
    """The optimizer that the options describe; what they leave open is the optimizer's own.

    Args:
        config: the options.
        model: the model that holds the parameters.
        params: parameters or groups of them.
        lr: learning rate.
        steps_per_epoch: optimizer steps in an epoch.
        privacy: what hides the rows, if anything does.
        share_prefix: not for objectives that write: that fills key-value caches, which replayed layers would leave empty.
    """
    if config.optimizer == first_order.NAME:
        return FirstOrder(
            params, lr=lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm, steps_per_epoch=steps_per_epoch, max_failed_steps=config.max_failed_steps,
        )  # fmt: skip
    kind = OPTIMIZERS[config.optimizer]
    together = world_size() > 1 or config.query_mode == "distributed"
    distributed = config.make_distributed() if together else None
    directions = config.directions
    if directions is None and not kind.own_directions:
        directions = "rademacher"
    optional: dict[str, Any] = {
        "directions": directions,
        "query_schedule": config.make_query_schedule(steps_per_epoch),
        "update_rule": config.make_update_rule(),
    }
    return kind(
        params,
        lr=lr,
        zo_eps=config.eps,
        weight_decay=config.weight_decay,
        seed=config.seed,
        steps_per_epoch=steps_per_epoch,
        query_mode=config.mode if distributed is None else "distributed",
        distributed=distributed,
        module=model,
        share_prefix=share_prefix,  # for where the prefix cache is off or full
        step_control=config.make_step_control(),
        max_failed_steps=config.max_failed_steps,
        privacy=privacy,
        **{name: value for name, value in optional.items() if value is not None},
    )


def make_param_groups(config: TrainConfig, model: nn.Module, lr: float) -> list[Any]:
    """The trainables; in LoRA+'s groups where a ratio is given."""
    if config.loraplus_lr_ratio is None:
        return trainable_parameters(model)
    return lora_plus_groups(model, lr=lr, ratio=config.loraplus_lr_ratio, lr_embedding=config.loraplus_lr_embedding)
