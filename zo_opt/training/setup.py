"""From options to things: task and rows, model with adapters, batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zo_opt.adapters import AdapterModel, get_adapter_model
from zo_opt.adapters.kept import KeptForward
from zo_opt.errors import ZOError
from zo_opt.models.compilation import compile_layers, running_layers
from zo_opt.models.models import load_model, pick_device
from zo_opt.models.precision import set_precision
from zo_opt.models.quantisation import quantised_layers
from zo_opt.prompts.store import FILE_NAME, FileStore, MemoryStore
from zo_opt.record.progress import Reporter
from zo_opt.tasks import builtin
from zo_opt.tasks import rows as data
from zo_opt.tasks.builtin import OWN_TEXT, get_task
from zo_opt.tasks.chat import chat_task
from zo_opt.tasks.evaluation import Prepared
from zo_opt.tasks.metrics import CLASSIFICATION, GENERATION, LANGUAGE_MODELLING
from zo_opt.tasks.objectives import make_objective
from zo_opt.tasks.rows import Example
from zo_opt.tasks.scoring import LabelScorer, Scorer, make_scorer
from zo_opt.tasks.tables import Rows
from zo_opt.tasks.tasks import (
    Task,
    check_template,
    custom_generation_task,
    custom_task,
    parse_verbalizers,
    placeholders,
)
from zo_opt.training.budget import steps_of
from zo_opt.training.config import TrainConfig
from zo_opt.training.given import GivenRows, own_rows
from zo_opt.training.options import WHOLE_MODEL, FirstOptions
from zo_opt.training.recipe import Recipe, resolve
from zo_opt.training.row_record import hashes_of, say_of_held_out, seen


@dataclass(frozen=True)
class Examples:
    """A task with its training and held-out examples; and how many of the latter are trained on, None where nobody looked."""

    task: Task
    train: Sequence[Example]
    held_out: Sequence[Example]
    trained_on: int | None = 0


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


def load_examples(config: TrainConfig, reporter: Reporter, given: GivenRows | None = None) -> Examples:
    """Read and check the rows; ``given``: those from Python, where the files are ``IN_PYTHON``.

    Raises:
        ZOError: on the first thing wrong with files, columns or labels.
    """
    if config.rows_name is None:
        task = _with_prompt(get_task(config.task), config)
        _check_kind(config, task)
        train_rows = builtin.task_rows(config.task, reporter.say)
        held_out_rows = builtin.task_rows(config.task, reporter.say, "held_out")
        sources = (f"built-in {config.task}",) * 2
    else:
        own = own_rows(config, given)
        train_rows, held_out_rows, sources = own.train, own.held_out, own.sources
        task = _task_for_file(config, own.train)
        _check_kind(config, task)
        if not held_out_rows and len(train_rows) < 2:
            raise ZOError(f"{sources[0]} has one row only; give more, or an eval_file.")
    # Before rows are held out, so that a sentence has the row's number in its file.
    train = data.make_examples(train_rows, task, sources[0])
    held_out = data.make_examples(held_out_rows, task, sources[1])
    last = task.kind == LANGUAGE_MODELLING
    if not held_out:
        train, held_out = data.hold_out(train, config.held_out, last=last)
    if config.validation:
        if len(train) < 2:
            raise ZOError("validation needs at least two training rows; give more.")
        train, held_out = data.hold_out(train, config.held_out, last=last)
    train = train[: config.max_train_rows] if config.max_train_rows is not None else train
    if task.kind == CLASSIFICATION and (missing := data.check_classes(train, task, sources[0])):
        reporter.say(
            f"no training row has the label{'s' if len(missing) > 1 else ''} {', '.join(missing)}, which the run cannot learn."
        )
    for examples, source in ((train, sources[0]), (held_out, sources[1])):
        data.check_text(examples, task, source)
    trained_on = None if config.private else seen(held_out, task, set(hashes_of(train, task)))
    say_of_held_out(len(held_out), trained_on, reporter.say)
    return Examples(task, train, held_out, trained_on)


def load_base(config: TrainConfig, task: Task, reporter: Reporter) -> Base:
    """Load the frozen model in its precision, and what learns the task with it.

    Raises:
        ZOError: it cannot be loaded, or has no head for the task.
    """
    device = pick_device(config.device)
    model, tokenizer = load_model(
        config.model_name_or_path,
        head=config.head,
        labels=len(task.labels),
        trust_remote_code=config.trust_remote_code,
        say=reporter.say,
    )
    # Weights that are trained in place must be the checkpoint's, not rounded ones.
    precision: str = "fp32" if config.adapter_name in WHOLE_MODEL else config.precision
    if config.quantise is not None:
        precision += f", {config.quantise}"
    precision = set_precision(model, precision, device)
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
    if isinstance(scorer, LabelScorer):
        for note in scorer.notes():
            reporter.say(note)
    objective = make_objective(config.objective, scorer)
    if objective is not None and config.compile and objective.writes(scorer):
        raise ZOError(
            f"compiled layers cannot write with a key-value cache, which objective={config.objective!r} asks for; leave --compile out."
        )
    if objective is not None:
        reporter.say(f"the run trains {objective.trained}, from values alone; what is shown as loss is that.")
    if config.budget_forwards is not None and not config.resume:  # of running text the rows are blocks of tokens
        config = replace(config, steps=steps_of(config, len(scorer.encode_all(examples.train))))
    learns = (config.optimizer_name, config.adapter_name, config.estimator) == ("adazeta", "tt-lora", None)
    if learns and config.of_weights is not None:
        reporter.say(
            f"queries are on weights and not on activations, which learn faster: {config.of_weights} asks for it."
        )
    recipe = resolve(config, base.model, scorer)
    model = get_adapter_model(base.model, recipe.adapter)
    model.to(device)
    model.eval()
    prompts = model.prompt_forward() if config.prompt_cache != "off" and config.prompt_cache_mb else None
    train = Prepared(examples.train, scorer, device, prompts, objective)
    held_out = Prepared(examples.held_out, scorer, device, prompts, trained_on=examples.trained_on)
    for name, prepared in (("training", train), ("held-out", held_out)):
        if prepared.truncated:
            reporter.say(
                f"{prepared.truncated} of {len(prepared)} {name} prompts were too long for {scorer.max_length} tokens with what follows them; "
                + (
                    "the beginning of the conversation was cut."
                    if examples.task.conversation
                    else "the end of their longest columns was cut, template and label words are whole."
                )
            )
        if prepared.shortened:
            reporter.say(
                f"{prepared.shortened} of {len(prepared)} {name} targets were too long for {scorer.max_length} tokens; their beginnings are learned."
            )
    return Tools(model, train, held_out, prompts, base.precision, device, recipe, config.steps)


def _task_for_file(config: TrainConfig, rows: Rows) -> Task:
    """The user's own task if a template or column is named or the built-in columns are not there."""
    if config.target_column is not None:
        own = custom_generation_task(
            text_column=config.text_column, target_column=config.target_column, template=config.template
        )
        return _with_length(own, config)
    task = get_task(config.task)
    if task.kind != CLASSIFICATION:
        return _with_prompt(task, config)
    for path in (config.train_file, config.eval_file):
        if path is not None and path.suffix == ".txt":
            raise ZOError(
                f"{path} is plain text, which has no labels; add --task {OWN_TEXT} to learn the text, or give a .jsonl, .csv or .tsv file."
            )
    columns = set(rows[0])
    named = (config.template, config.verbalizers, config.text_column, config.label_column)
    if named == (None, None, "text", "label") and set(task.required_columns()) <= columns:
        return task
    chat = chat_task(columns) if (*named, config.task) == (None, None, "text", "label", FirstOptions.task) else None
    if chat is not None:
        return _with_length(chat, config)
    if config.task != FirstOptions.task:
        raise ZOError(
            f"task={config.task!r} takes rows with the columns {', '.join(task.required_columns())} and has its own prompt and label words; "
            "leave --task out for other rows, a template, verbalizers or columns of your own."
        )
    labels = data.column_values(rows, config.label_column, str(config.rows_name))
    if len(labels) > 100:
        raise ZOError(
            f"column {config.label_column!r} holds {len(labels)} different labels; name the label column with --label_column."
        )
    own = custom_task(
        labels, text_column=config.text_column, label_column=config.label_column,
        template=config.template, verbalizers=config.verbalizers,
    )  # fmt: skip
    names = rows.names.get(config.label_column)
    if names is None or config.verbalizers is not None or labels != [str(i) for i in range(len(names))]:
        return own
    return replace(own, verbalizers=dict(zip(labels, names, strict=True)))  # what the table calls its labels


def _check_kind(config: TrainConfig, task: Task) -> None:
    """Options that this task has no use for."""
    if config.text_column != TrainConfig.text_column and "text" not in task.shown():
        raise ZOError("text_column was given, and the template shows no {text}; put it there, or leave the column out.")
    if task.kind == CLASSIFICATION:
        if config.max_new_tokens is not None:
            raise ZOError(
                f"max_new_tokens was given, but task {task.name!r} has labels and writes nothing; leave it out."
            )
        return
    if config.head == "classification":
        raise ZOError(f"head='classification' scores labels, of which a {task.kind} task has none; leave it out.")
    given = [
        name for name, unused in (("verbalizers", None), ("label_column", "label")) if getattr(config, name) != unused
    ]
    if task.kind == LANGUAGE_MODELLING:
        given += [name for name in ("template", "target_column", "max_new_tokens") if getattr(config, name) is not None]
    if given:
        raise ZOError(f"{given[0]} was given, of which a {task.kind} task makes no use; leave it out.")
    if config.compile and task.kind == GENERATION:
        raise ZOError("compiled layers cannot write with a key-value cache; leave --compile out for a generation task.")


def _with_length(task: Task, config: TrainConfig) -> Task:
    return task if config.max_new_tokens is None else replace(task, max_new_tokens=config.max_new_tokens)


def _with_prompt(task: Task, config: TrainConfig) -> Task:
    """A built-in task under the user's template or label words; what is not given stays the task's own."""
    template = check_template(config.template) if config.template is not None else task.template
    words = task.verbalizers
    if config.verbalizers is not None:
        words = parse_verbalizers(config.verbalizers, task.labels)
    columns = dict(task.columns)
    if "text" in placeholders(template) and "text" not in columns:
        columns["text"] = placeholders(task.template)[0]  # the text of a task with one text column
    if "text" in placeholders(template) and config.text_column != TrainConfig.text_column:
        columns["text"] = config.text_column
    return _with_length(replace(task, template=template, verbalizers=words, columns=columns), config)
