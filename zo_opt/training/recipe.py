"""Which adapter, where, and at which learning rate, where the user did not say: found in docs/recipe.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from zo_opt.adapters import AdapterConfig
from zo_opt.adapters.tt_init import FEATURES
from zo_opt.choices import split
from zo_opt.errors import ZOError
from zo_opt.models.models import classification_heads
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import Scorer
from zo_opt.tasks.tasks import Task
from zo_opt.training.adapter_init import can_place
from zo_opt.training.config import TrainConfig
from zo_opt.training.options import WHOLE_MODEL
from zo_opt.training.pairings import default_lr
from zo_opt.training.parts import PLACED_ADAPTER

# Placed adapters sit at this depth: classes are well separated there, and a third of the model is left to run.
LAYER_SHARE = 2 / 3
PLACED_LR = 0.1


@dataclass(frozen=True)
class Recipe:
    """What a run trains: the adapter, how it is placed ("class_means", "components"; "random": the method's own start), and lr."""

    adapter: AdapterConfig
    init: str
    lr: float


def resolve(config: TrainConfig, model: nn.Module, scorer: Scorer, task: Task, example: Example) -> Recipe:
    """Fill in what the options leave open.

    Raises:
        ZOError: the options ask for a placement that this model or task does not allow.
    """
    tensorized = split("adapter", config.adapter)[1].get("modules_to_tensorize") or []
    placeable = config.adapter_name == "tt" and not tensorized and can_place(scorer, task, example)
    init = config.adapter_init
    if init == "auto":
        init = "class_means" if placeable and may_place(config) else "random"
    if init not in FEATURES:
        heads = classification_heads(model) if config.head == "classification" else []
        adapter = config.make_adapter(
            layers=None if config.adapter_name in WHOLE_MODEL else last_quarter(model),
            total_steps=config.steps,
            modules_to_save=[name for name in heads if name not in tensorized] or None,
            seed=config.seed,
        )
        lr = own_lr(config, placed=False, parameters=sum(p.numel() for p in model.parameters()))
        return Recipe(adapter, "random", config.lr if config.lr is not None else lr)
    if not placeable:
        raise ZOError(
            f"adapter_init={init!r} needs a causal or masked model, label words that are the same in every row and begin with "
            "different tokens, and no modules_to_tensorize; give --adapter_init random."
        )
    return Recipe(
        placed_adapter(config, model, len(task.labels)), init, config.lr if config.lr is not None else PLACED_LR
    )


def placed_adapter(config: TrainConfig, model: nn.Module, classes: int) -> AdapterConfig:
    """The tensor-train adapter that is placed by hidden states."""
    layers = [min(round(LAYER_SHARE * depth(model)), depth(model) - 1)]
    found = {"bottleneck": classes, "layers": layers, "output_rank": classes - 1, "seed": config.seed}
    return config.make_adapter(**PLACED_ADAPTER | found)


def own_lr(config: TrainConfig, *, placed: bool, parameters: int) -> float:
    """The method's learning rate, where none was given; ``parameters``: of the model."""
    if placed:
        return PLACED_LR
    # AdamW's lr is a length, whatever the gradient's scale.
    length = not config.zeroth_order or config.method.sort(config.make_choices() | {"lr": 0.0})[0].lr_is_a_length
    lr = default_lr(config.optimizer_name, config.adapter_name, adam=length, parameters=parameters)
    # LoRA+ moves B faster and A slower than LoRA does: the two rates lie around LoRA's.
    return lr if config.loraplus_lr_ratio is None else lr / math.sqrt(config.loraplus_lr_ratio)


def may_place(config: TrainConfig) -> bool:
    """Whether adapters are placed by class means, where model and task allow it, if nothing is said of their start."""
    unplaced = config.private or not config.zeroth_order or "target_modules" in split("adapter", config.adapter)[1]
    return config.adapter_name == "tt" and not unplaced


def last_quarter(model: nn.Module) -> int:
    """Layers that have adapters where nothing is said of them: the last so many."""
    return -(-depth(model) // 4)


def depth(model: nn.Module) -> int:
    """Layers of a model of transformers."""
    return int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
