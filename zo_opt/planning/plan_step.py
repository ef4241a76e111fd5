"""One step of a method as the training loop makes it, on a batch of a given size: with values or without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zo_opt.adapters import AdapterModel, get_adapter_model
from zo_opt.errors import ZOError
from zo_opt.models.models import HEADS
from zo_opt.models.precision import bf16_is_fast, set_precision
from zo_opt.optim import OPTIMIZERS, Backpropagation, ZerothOrderOptimizer
from zo_opt.planning.skeleton import LABELS, WordTokenizer, example_of_length
from zo_opt.queries import modes as query_modes
from zo_opt.tasks.evaluation import Prepared
from zo_opt.tasks.scoring import make_scorer
from zo_opt.training.build_optimizer import make_optimizer, make_param_groups
from zo_opt.training.config import TrainConfig
from zo_opt.training.methods import WHOLE_MODEL, Method
from zo_opt.training.recipe import resolve
from zo_opt.training.stepper import advance_adapter, training_loss

PRECISIONS = ("auto", "mixed", "fp32", "bf16")
LOGITS = ("labels", "all")
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Setting:
    """What is common to all methods of a plan.

    Args:
        batch_size: rows a step.
        length: tokens a row.
        precision: mixed, fp32, bf16 (every tensor of the model), or auto: mixed where the device is fast at it.
        device: "cuda" or "cpu": AdamW updates all tensors at once on GPUs and one after another on CPUs.
        head: lm or classification.
        logits: "labels" (the output head at label positions, as zo-opt trains) or "all" (language modelling).
        layers: adapters in the last so many layers; None: in all.
        query_mode: of zeroth-order methods; None: the method's.
    """

    batch_size: int = 16
    length: int = 128
    precision: str = "auto"
    device: str = "cuda"
    head: str = "lm"
    logits: str = "labels"
    layers: int | None = None
    query_mode: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", *(["layers"] if self.layers is not None else [])):
            if getattr(self, name) < 1:
                raise ZOError(f"{name}={getattr(self, name)} is not possible; give a whole number of at least 1.")
        known = {
            "precision": PRECISIONS, "device": DEVICES, "head": HEADS, "logits": LOGITS,
            "query_mode": (None, *query_modes.QUERY_MODES),
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                choices = ", ".join(v for v in values if v is not None)
                raise ZOError(f"{name}={getattr(self, name)!r} is not known; choose one of {choices}.")
        if (self.head, self.logits) == ("classification", "all"):
            raise ZOError("logits='all' is for language models; leave it out with head='classification'.")

    @property
    def taken_precision(self) -> str:
        """What auto stands for."""
        if self.precision != "auto":
            return self.precision
        return "mixed" if self.device == "cuda" or bf16_is_fast(torch.device(self.device)) else "fp32"


@dataclass(frozen=True)
class TrainingStep:
    """A method bound to a model and a batch; calling it makes one step."""

    model: AdapterModel
    prepared: Prepared
    optimizer: ZerothOrderOptimizer | Backpropagation
    batch: dict[str, Tensor]
    logits: str

    def __call__(self) -> None:
        self.estimate(lambda: None)
        self.advance()

    def estimate(self, forward_done: Callable[[], None]) -> None:
        """Move the weights; told whenever a forward pass is done."""

        def loss(batch: dict[str, Tensor]) -> Tensor:
            value = self._loss(batch)
            forward_done()
            return value

        self.optimizer.step(loss, self.batch)

    def advance(self) -> None:
        """What follows: the adapter's schedule, and gradients are let go."""
        advance_adapter(self.model, self.optimizer)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        if self.logits == "labels":
            return training_loss(self.model, self.prepared, batch)
        inputs = self.prepared.scorer.inputs(batch)
        loss: Tensor = self.model.wrapped(**inputs, labels=inputs["input_ids"]).loss
        penalty = self.model.penalty()
        return loss if penalty is None else loss + penalty


def make_step(model: Any, method: Method, setting: Setting, device: torch.device) -> TrainingStep:
    """What the training loop makes of a method's options, for a model without adapters that is changed in place.

    Raises:
        ZOError: the method does not fit the model or the setting.
    """
    config = _train_config(method, setting)
    if setting.taken_precision == "bf16":
        model.bfloat16()
    else:
        set_precision(model, "fp32" if method.adapter in WHOLE_MODEL else setting.taken_precision, device)
    scorer: Any = make_scorer(model, WordTokenizer(model.config.get_text_config().vocab_size), LABELS)
    example = example_of_length(scorer, setting.length)
    recipe = resolve(config, model, scorer, LABELS, example)
    adapted = get_adapter_model(model, recipe.adapter)
    adapted.to(device)
    adapted.eval()
    optimizer = make_optimizer(
        config, adapted, make_param_groups(config, adapted, recipe.lr), recipe.lr, steps_per_epoch=1
    )
    if isinstance(optimizer, Backpropagation) and setting.device == "cuda":
        for group in optimizer.adamw.param_groups:
            group["foreach"] = True  # what torch chooses there
    prepared = Prepared([example] * setting.batch_size, scorer, device, None)
    return TrainingStep(adapted, prepared, optimizer, prepared.batch(range(setting.batch_size)), setting.logits)


def _train_config(method: Method, setting: Setting) -> TrainConfig:
    options = dict(method.options)
    if method.zeroth_order:
        options["query_mode"] = setting.query_mode or options.get("query_mode")
        if options.get("directions") == "gaussian":  # as many bytes, and no generator for tensors without values
            options["directions"] = "rademacher"
    config = TrainConfig(
        adapter=method.adapter, optimizer=method.optimizer, batch_size=setting.batch_size, head=setting.head,
        steps=10_000, **options,
    )  # fmt: skip
    placed = method.zeroth_order and method.adapter == "tt" and config.adapter_init == "auto"
    if method.adapter not in WHOLE_MODEL and not placed:
        config = replace(config, adapter_options={"layers": setting.layers} | (config.adapter_options or {}))
    if method.optimizer in OPTIMIZERS and OPTIMIZERS[method.optimizer].own_directions:
        config = replace(config, directions=None)
    return config
