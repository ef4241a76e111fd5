"""Which adapter, where, and at which learning rate, where the user did not say: found in docs/recipe.md."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from zo_opt.adapters import TTConfig
from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS, Adam
from zo_opt.training.adapter_init import can_place
from zo_opt.training.config import TrainConfig
from zo_opt.training.data import Example
from zo_opt.training.models import classification_heads
from zo_opt.training.scoring import Scorer
from zo_opt.training.tasks import Task

LAYER_SHARE = (
    2 / 3
)  # placed adapters sit at this depth: classes are well separated there, and a third of the model is left to run


@dataclass(frozen=True)
class Recipe:
    """What a run trains: the adapter, how it is initialised ("class_means", "components" or "random"), and lr."""

    adapter: TTConfig
    init: str
    lr: float


def resolve(config: TrainConfig, model: nn.Module, scorer: Scorer, task: Task, example: Example) -> Recipe:
    """Fill in what the options leave open.

    Raises:
        ZOError: the options ask for a placement that this model or task does not allow.
    """
    placeable = can_place(scorer, task, example)
    init = config.adapter_init
    if init == "auto":
        init = "class_means" if placeable and config.target_modules is None else "random"
    if init == "random":
        adapter = TTConfig(
            rank=config.rank if config.rank is not None else 5,
            bottleneck=config.bottleneck if config.bottleneck is not None else 64,
            activation=config.activation,
            target_modules=config.target_modules,
            layers=config.layers if config.layers is not None else -(-depth(model) // 4),
            modules_to_save=classification_heads(model) if config.head == "classification" else None,
            seed=config.seed,
        )
        return Recipe(adapter, init, _lr(config, adam=1e-2, sgd=1e-4))
    if not placeable:
        raise ZOError(
            f"adapter_init={init!r} needs a causal or masked model and label words that are the same in every row and "
            "begin with different tokens; give --adapter_init random."
        )
    classes = len(task.labels)
    adapter = TTConfig(
        rank=config.rank if config.rank is not None else 32,
        bottleneck=config.bottleneck if config.bottleneck is not None else classes,
        activation=config.activation,
        target_modules=config.target_modules if config.target_modules is not None else ["residual"],
        layers=config.layers
        if config.layers is not None
        else [min(round(LAYER_SHARE * depth(model)), depth(model) - 1)],
        trainable="mixing",
        output_rank=classes - 1,
        seed=config.seed,
    )
    return Recipe(adapter, init, _lr(config, adam=0.1, sgd=0.1))


def _lr(config: TrainConfig, *, adam: float, sgd: float) -> float:
    """The learning rate given, or the recipe's for the kind of update rule."""
    if config.lr is not None:
        return config.lr
    return adam if isinstance(config.make_update_rule(), Adam) or OPTIMIZERS[config.optimizer].lr_is_a_length else sgd


def depth(model: nn.Module) -> int:
    """Layers of a model of transformers."""
    return int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
