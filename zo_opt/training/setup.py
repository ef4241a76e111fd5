"""From options and examples to things: model with adapters, scorer, batches."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zo_opt.adapters import AdapterModel, get_adapter_model
from zo_opt.adapters.kept import KeptForward
from zo_opt.errors import ZOError
from zo_opt.models.compilation import compile_layers, running_layers
from zo_opt.models.models import load_model, pick_device
from zo_opt.models.precision import set_precision, taken_precision
from zo_opt.models.quantisation import quantised_layers
from zo_opt.prompts.store import FILE_NAME, FileStore, MemoryStore
from zo_opt.record.progress import Reporter
from zo_opt.tasks.batches import BatchOrder
from zo_opt.tasks.evaluation import Prepared
from zo_opt.tasks.objectives import make_objective
from zo_opt.tasks.padding import check_shapes, try_padding
from zo_opt.tasks.scoring import LabelScorer, Scorer, make_scorer
from zo_opt.tasks.tasks import Task
from zo_opt.training.budget import steps_of
from zo_opt.training.config import TrainConfig
from zo_opt.training.examples import Examples, load_examples
from zo_opt.training.options import WHOLE_MODEL
from zo_opt.training.recipe import Recipe, queries_beside, resolve


@dataclass(frozen=True)
class Base:
    """A frozen model and what learns the task with it."""

    model: Any
    scorer: Scorer
    precision: str
    device: torch.device


@dataclass(frozen=True)
class Tools:
    """A model ready to be tuned on prepared examples, in so many steps."""

    model: AdapterModel
    train: Prepared
    held_out: Prepared
    prompts: KeptForward | None
    precision: str
    device: torch.device
    recipe: Recipe
    steps: int

    def record_prompts(self, config: TrainConfig, output_dir: Path, reporter: Reporter) -> None:
        """Have what is frozen of all rows' forwards kept, as far as the bound allows.

        Raises:
            ZOError: it is to be on disk and cannot be written there.
        """
        if self.prompts is None:
            return
        recorder, bound = self.prompts.recorder, config.prompt_cache_mb << 20
        if config.prompt_cache == "disk":
            directory = Path(config.prompt_cache_dir or output_dir)
            recorder.store = FileStore(directory / FILE_NAME, bound, recorder.fingerprint())
        else:
            recorder.store = MemoryStore(bound, self.device if config.prompt_cache == "device" else torch.device("cpu"))
        total = len(self.train) + len(self.held_out)
        with reporter.track("running prompts through the base", total, "rows") as tracker:
            for prepared in (self.train, self.held_out):  # training rows first: they are needed most often
                prepared.record(config.eval_batch_size, tracker.advance)
        if self.prompts.objection is not None:
            reporter.say(f"no prompts are kept, every forward pass runs all layers: {self.prompts.objection}.")
        notes = recorder.store.notes if recorder.store is not None else []
        for note in notes:
            reporter.say(note)
        if recorder.full and not notes:
            reporter.say(
                "the prompt cache is full; rows beyond it are computed anew each time (raise --prompt_cache_mb)."
            )

    def compile_model(self, reporter: Reporter) -> None:
        """Compile the layers that run in a step; where that fails they run as they are."""
        layers = running_layers(self.model, self.prompts.recorder.cut if self.prompts is not None else 0)
        start = time.monotonic()
        reporter.say(f"compiling {len(layers)} layers")
        batch = self.train.batch(self.train.by_length(2)[0])  # one row would be a shape of its own
        if (failure := compile_layers(layers, lambda: self.train.loss(self.model, batch))) is not None:
            reporter.say(f"torch.compile failed ({failure}); the run goes on without it.")
        else:
            reporter.say(f"compiled in {time.monotonic() - start:.0f} s")

    def close_cache(self, config: TrainConfig, reporter: Reporter) -> None:
        """At the end of a run: say what went wrong, close the file, and remove it where it is the run's own."""
        store = None if self.prompts is None else self.prompts.recorder.store
        if store is None:
            return
        if store.damaged:
            reporter.say(
                f"{store.damaged} kept prompts failed their checksum and were computed anew; look after that disk."
            )
        store.close(remove=config.prompt_cache_dir is None)


def load_base(config: TrainConfig, task: Task, reporter: Reporter) -> Base:
    """Load the frozen model in its precision, and what learns the task with it.

    Raises:
        ZOError: it cannot be loaded, or has no head for the task.
    """
    device = pick_device(config.device)
    # Weights that are trained in place must be the checkpoint's, not rounded ones.
    taken = "fp32" if config.adapter_name in WHOLE_MODEL else taken_precision(config.precision, device)
    form = taken if config.quantise is None else f"{taken}, {config.quantise}"
    model, tokenizer = load_model(
        config.model_name_or_path,
        head=config.head,
        labels=len(task.labels),
        trust_remote_code=config.trust_remote_code,
        form=form if device.type == "cpu" else taken,
        say=reporter.say,
    )
    precision = set_precision(model, form, device)
    if config.private and any(getattr(layer, "mixes_rows", False) for layer in quantised_layers(model)):
        raise ZOError(
            f"model {config.model_name_or_path!r} is quantised so that each row is rounded by what the other rows of its batch are, which "
            "privacy cannot bear; load it in full, or with --quantise int8, int4 or bnb-nf4."
        )
    model.to(device)  # where decompositions of its weights are fast
    return Base(model, make_scorer(model, tokenizer, task, config.max_length), precision, device)


def build_tools(config: TrainConfig, examples: Examples, reporter: Reporter) -> Tools:
    """Load the model, put adapters in, tokenise the examples.

    Raises:
        ZOError: on the first thing wrong with the model or the adapter's targets.
    """
    base = load_base(config, examples.task, reporter)
    scorer, device = base.scorer, base.device
    try_padding(base.model, scorer, examples.train)
    for note in [*scorer.notes, *(scorer.word_notes() if isinstance(scorer, LabelScorer) else [])]:
        reporter.say(note)
    objective = make_objective(config.objective, scorer)
    if objective is not None and config.compile and objective.writes(scorer):
        raise ZOError(
            f"compiled layers cannot write with a key-value cache, which objective={config.objective!r} asks for; leave --compile out."
        )
    if objective is not None:
        reporter.say(f"the run trains {objective.trained}, from values alone; what is shown as loss is that.")
    train = Prepared(examples.train, scorer, device, None, objective, each_row=config.on_activations)
    check_shapes(base.model, scorer, train.encoded, config.batch_size)
    if config.steps is None:
        steps = steps_of(config, len(train))
        if config.epochs is None and config.budget_forwards is None:
            reporter.say(
                f"{steps:,} steps of {config.batch_size} rows, {steps * config.batch_size / len(train):.2g} times each row; "
                "give --steps or --epochs for others."
            )
        config = replace(config, steps=steps)
    learns = (config.optimizer_name, config.adapter_name, config.estimator) == ("adazeta", "tt-lora", None)
    if learns and config.of_weights is not None:
        reporter.say(
            f"queries are on weights and not on activations, which learn faster: {config.of_weights} asks for it."
        )
    recipe = resolve(config, base.model, scorer)
    if recipe.estimator is not None:
        reporter.say(f"a text is learned, by --estimator {recipe.estimator}; learned-feedback serves labels.")
    model = get_adapter_model(base.model, recipe.adapter)
    model.to(device)
    model.eval()
    if (queries := queries_beside(config, model)) is not None:
        reporter.say(
            f"{queries} queries a step: in this encoder a query is one token beside its row. --schedule asks for others."
        )
        recipe = replace(recipe, queries=queries)
    if recipe.adapter.reads_rows:
        _begin(model, config, train)
    train.prompts = prompts = (
        model.prompt_forward() if config.prompt_cache != "off" and config.prompt_cache_mb else None
    )
    held_out = Prepared(examples.held_out, scorer, device, prompts, trained_on=examples.record.trained_on)
    for name, prepared in (("training", train), ("held-out", held_out)):
        if prepared.truncated:
            reporter.say(
                f"{prepared.truncated} of {len(prepared)} {name} prompts were longer than {scorer.max_length} tokens with what follows them; "
                + (
                    "the beginning of the conversation was cut."
                    if examples.task.conversation
                    else "the end of their longest columns was cut, template and label words are whole."
                )
            )
        if prepared.shortened:
            reporter.say(
                f"{prepared.shortened} of {len(prepared)} {name} targets were longer than {scorer.max_length} tokens have room for; "
                "their beginnings are learned."
            )
    return Tools(model, train, held_out, prompts, base.precision, device, recipe, config.most_steps)


@torch.no_grad()
def _begin(model: AdapterModel, config: TrainConfig, rows: Prepared) -> None:
    """Show an adapter that starts from the rows those of the first step, before anything else runs it."""
    first = BatchOrder(rows.labels, config.batch_size, config.seed, config.batch_order).indices(0)
    rows.losses(model, rows.batch(first))


__all__ = ["Base", "Examples", "Tools", "build_tools", "load_base", "load_examples"]
