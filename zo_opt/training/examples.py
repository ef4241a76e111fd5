"""From options to a task and its rows: read, checked, split into training and held-out ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from zo_opt.errors import ZOError
from zo_opt.record.progress import Reporter
from zo_opt.tasks import builtin
from zo_opt.tasks import rows as data
from zo_opt.tasks.builtin import OWN_TEXT, get_task
from zo_opt.tasks.cells import one_spelling
from zo_opt.tasks.chat import chat_task
from zo_opt.tasks.metrics import CLASSIFICATION, GENERATION, LANGUAGE_MODELLING
from zo_opt.tasks.rows import Example
from zo_opt.tasks.tables import Rows
from zo_opt.tasks.tasks import (
    Task,
    as_letters,
    check_template,
    custom_generation_task,
    custom_task,
    parse_verbalizers,
    placeholders,
)
from zo_opt.training.config import TrainConfig
from zo_opt.training.given import GivenRows, names_in, own_rows
from zo_opt.training.options import FirstOptions
from zo_opt.training.row_record import RowRecord, say_of_held_out


@dataclass(frozen=True)
class Examples:
    """A task with its training and held-out examples, and what goes on record of them."""

    task: Task
    train: Sequence[Example]
    held_out: Sequence[Example]
    record: RowRecord


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
        task = _with_optional(_task_for_file(config, own.train), config, own.train)
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
    if task.kind == CLASSIFICATION:
        absent = {
            "training row has": (data.check_classes(train, task, sources[0]), "which the run cannot learn"),
            "held-out row has": (data.missing_classes(held_out, task), "of which the figures say nothing"),
        }
        for rows_have, (missing, so) in absent.items():
            if missing:
                reporter.say(f"no {rows_have} the label{'s' if len(missing) > 1 else ''} {', '.join(missing)}, {so}.")
    for note in _notes(task):
        reporter.say(note)
    for examples, source in ((train, sources[0]), (held_out, sources[1])):
        data.check_text(examples, task, source)
    record = RowRecord.of(task, train, held_out, private=config.private)
    say_of_held_out(record.rows[1], record.trained_on, reporter.say)
    return Examples(task, train, held_out, record)


def _notes(task: Task) -> Iterator[str]:
    """What is possible in a prompt and seldom meant."""
    learned = {CLASSIFICATION: task.label_column, GENERATION: task.target_column}.get(task.kind)
    if not task.conversation and learned in [task.columns.get(name, name) for name in placeholders(task.template)]:
        yield f"the prompt shows the column {learned!r}, which is what the model is to find: the figures say nothing of rows without it."
    if "\\n" in task.template:
        yield "the template holds a backslash and an n, which are letters; a line end is written $'...\\n...' in a shell."


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
    if names is None:
        return own
    called = [names[int(label)] for label in labels]  # which column_values has checked
    words = dict(zip(labels, map(as_letters, called), strict=True)) if config.verbalizers is None else own.verbalizers
    return replace(own, verbalizers=words, label_names=tuple(map(one_spelling, called)))


def _with_optional(task: Task, config: TrainConfig, rows: Rows) -> Task:
    """The task with the columns that may be blank."""
    if config.optional_columns is None:
        return task
    named = names_in("optional_columns", config.optional_columns)
    if task.kind == LANGUAGE_MODELLING or task.conversation:
        what = "conversations" if task.conversation else "running text"
        raise ZOError(
            f"optional_columns was given, of which {what} make{'' if task.conversation else 's'} no use; leave it out."
        )
    shown = {task.columns.get(name, name): name for name in placeholders(task.template) if name != "mask"}
    for column in named:
        if column not in shown:
            raise ZOError(
                f"optional_columns names {column!r}, which the prompt does not show; it shows {', '.join(shown)}."
            )
        if not any(column in row for row in rows):
            raise ZOError(
                f"optional_columns names {column!r}, a column that no row has; the first row's are {', '.join(rows[0])}."
            )
    if len(named) == len(shown):
        raise ZOError(
            "optional_columns names all columns of the prompt, which would leave nothing of a row; leave one out."
        )
    return replace(task, optional=tuple(shown[column] for column in named))


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
