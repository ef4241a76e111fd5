"""The largest batch of a run that fits in a memory budget, by zo-opt plan's prediction for its longest row."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from zo_opt.choices import split
from zo_opt.errors import ZOError, reason_of
from zo_opt.models import builtin
from zo_opt.models.models import pick_device
from zo_opt.planning import Setting, make_skeleton, plan_method, read_config
from zo_opt.tasks.metrics import CLASSIFICATION
from zo_opt.tasks.scoring import make_scorer
from zo_opt.training.config import TrainConfig
from zo_opt.training.recipe import last_quarter
from zo_opt.training.setup import Examples


@dataclass(frozen=True)
class Sizes:
    """What a step's memory depends on of a model and the rows to learn.

    Attributes:
        skeleton: the model on the meta device.
        rows: tokenised training rows; of running text its blocks.
        length: tokens of the longest one.
        prompts: of a row: one, or one a label where label words are part of the sequence.
        logits: where the output head is run: at "labels" alone, or at "all" tokens.
    """

    skeleton: nn.Module
    rows: int
    length: int
    prompts: int
    logits: str


def sizes_of(config: TrainConfig, examples: Examples) -> Sizes:
    """Read the model's config and tokenise the rows; no weights are loaded.

    Raises:
        ZOError: the model's config or tokenizer cannot be read, or it has no head for the task.
    """
    import transformers

    name = config.model_name_or_path
    described = read_config(name)
    if config.head == "classification":
        described.num_labels = len(examples.task.labels)
    skeleton = make_skeleton(described, config.head, name)
    source = str(builtin.model_directory()) if name == builtin.DEFAULT_MODEL else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                source, trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        reason = reason_of(error)
        raise ZOError(
            f"the tokenizer of model {name!r} could not be read ({reason}); give a model that has one."
        ) from error
    scorer = make_scorer(skeleton, tokenizer, examples.task, config.max_length)
    encoded = scorer.encode_all(examples.train)
    return Sizes(
        skeleton, len(encoded), max(len(p) for e in encoded for p in e.prompts), len(encoded[0].prompts),
        "labels" if examples.task.kind == CLASSIFICATION else "all",
    )  # fmt: skip


def fitting_batch(config: TrainConfig, sizes: Sizes, budget: int) -> int | None:
    """The largest of batch_size, its half, its quarter... with which a training step stays within ``budget`` bytes; None: not even one row.

    Counted are tensors: weights, adapters, gradients, optimizer state, activations and the cached prefix, not the interpreter and its
    libraries (about half a gibibyte on a CPU).

    Raises:
        ZOError: the options do not fit the model.
    """
    layers = split("adapter", config.adapter)[1].get("layers")
    layers = layers if isinstance(layers, int) else last_quarter(sizes.skeleton)
    batch_size = config.batch_size
    while batch_size >= 1:
        setting = Setting(
            batch_size=batch_size * sizes.prompts, length=sizes.length, precision=config.precision, head=config.head,
            device=pick_device(config.device).type, logits=sizes.logits, layers=layers, query_mode=config.query_mode,
        )  # fmt: skip
        if plan_method(sizes.skeleton, config, setting).peak + _cached_prefix(config, sizes) <= budget:
            return batch_size
        batch_size //= 2
    return None


def _cached_prefix(config: TrainConfig, sizes: Sizes) -> int:
    """The most that hidden states of frozen layers take where the training loop keeps them on the device."""
    if config.prompt_cache != "device":
        return 0
    hidden = getattr(sizes.skeleton.config.get_text_config(), "hidden_size", 0)  # type: ignore[union-attr, operator]
    return min(config.prompt_cache_mb << 20, 4 * sizes.rows * sizes.prompts * sizes.length * hidden)
