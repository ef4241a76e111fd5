"""Which adapter, where, and at which learning rate, where the user did not say: found in docs/methods/learning.md."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from zo_opt.adapters import AdapterConfig, AdapterModel
from zo_opt.adapters.made_for import answers_stand
from zo_opt.choices import split
from zo_opt.models.models import classification_heads
from zo_opt.schedules.adazeta import MAX_QUERIES
from zo_opt.tasks.metrics import CLASSIFICATION
from zo_opt.tasks.scoring import Scorer
from zo_opt.training.config import TrainConfig
from zo_opt.training.options import WHOLE_MODEL
from zo_opt.training.pairings import default_lr
from zo_opt.training.parts import ON_ANSWERS

FROM_LAYER = 0.4  # adapters on answers sit from this share of the depth on: what is below is frozen, and run once
FEEDBACK_LR = 3e-3
REWARD_LR = 1e-3  # of numbers without a gradient, which say less of each row: fewer sites, shorter steps (benchmarks/objectives.py)
MOST_BESIDE = 128  # queries beside a row


@dataclass(frozen=True)
class Recipe:
    """What a run trains: the adapter, lr; where the options name none perhaps the estimator, and the fewest queries of a step."""

    adapter: AdapterConfig
    lr: float
    estimator: str | None = None
    queries: int | None = None

    def told(self, config: TrainConfig) -> TrainConfig:
        """The options, with what they leave open."""
        if self.estimator is not None:
            config = replace(config, estimator=self.estimator)
        if self.queries is None:
            return config
        most = max(self.queries, MAX_QUERIES)
        return replace(config, schedule={"name": "adazeta", "min_queries": self.queries, "max_queries": most})


def resolve(config: TrainConfig, model: nn.Module, scorer: Scorer) -> Recipe:
    """Fill in what the options leave open.

    Raises:
        ZOError: options that the adapter has not, or that are not possible.
    """
    tensorized = split("adapter", config.adapter)[1].get("modules_to_tensorize") or []
    heads = classification_heads(model) if config.head == "classification" else []
    common: dict[str, Any] = {
        "total_steps": config.most_steps,
        "modules_to_save": [name for name in heads if name not in tensorized] or None,
        "seed": config.seed,
    }
    if config.on_answers:
        mask = scorer.tokenizer.mask_token_id if scorer.reads_mask else None
        adapter = answer_adapter(config, model, **common, answer_token=mask)
    else:
        adapter = config.make_adapter(
            **common, layers=None if config.adapter_name in WHOLE_MODEL else last_quarter(model)
        )
    lr = config.lr if config.lr is not None else own_lr(config, parameters=sum(p.numel() for p in model.parameters()))
    return Recipe(adapter, lr, text_estimator(config, scorer.task.kind))


def text_estimator(config: TrainConfig, kind: str) -> str | None:
    """Queries on activations without memory, where a text is learned; None: as the options say.

    [choice] Of labels the mean Jacobian says most. Of words it says little, and its error is the same in every step: on the chat of
    examples/three_formats learned feedback ended far above the loss that it began with, and SPSA on activations did not.
    """
    own = config.on_activations and config.estimator is None and not config.values_alone
    return "activations" if own and kind != CLASSIFICATION else None


def answer_adapter(config: TrainConfig, model: nn.Module, **common: Any) -> AdapterConfig:
    """The adapter that acts on answers."""
    layers = depth(model)
    first = layers - last_quarter(model) if config.values_alone else min(round(FROM_LAYER * layers), layers - 1)
    return config.make_adapter(**common, layers=list(range(first, layers)), **ON_ANSWERS)


def queries_beside(config: TrainConfig, model: AdapterModel) -> int | None:
    """As many queries as there are inner activations, where they stand beside an encoder's row; None: what the schedule says.

    [choice] A step then runs a row once and a token a query. So many queries tell each row's gradient whole, to first order in zo_eps. With
    fewer the prior says what a row's gradient mostly is, and what a new head asks of the rest is learned late.
    """
    named = config.schedule is not None or config.budget_forwards is not None or config.optimizer_name != "adazeta"
    if named or not config.on_activations or config.values_alone or answers_stand(model) != "beside":
        return None
    return min(model.activation_sites().width, MOST_BESIDE)


def own_lr(config: TrainConfig, *, parameters: int) -> float:
    """The method's learning rate, where none was given; ``parameters``: of the model."""
    if config.on_activations:
        return REWARD_LR if config.values_alone else FEEDBACK_LR
    lr = default_lr(config.optimizer_name, config.adapter_name, adam=lr_is_a_length(config), parameters=parameters)
    # LoRA+ moves B faster and A slower than LoRA does: the two rates lie around LoRA's.
    return lr if config.loraplus_lr_ratio is None else lr / math.sqrt(config.loraplus_lr_ratio)


def lr_is_a_length(config: TrainConfig) -> bool:
    """Whether lr is how far a step goes, whatever the gradient's scale, as AdamW's is."""
    return not config.zeroth_order or config.method.sort(config.make_choices() | {"lr": 0.0})[0].lr_is_a_length


def last_quarter(model: nn.Module) -> int:
    """Layers that have adapters where nothing is said of them: the last so many."""
    return -(-depth(model) // 4)


def depth(model: nn.Module) -> int:
    """Layers of a model of transformers."""
    return int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
