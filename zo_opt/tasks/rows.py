"""Tables of examples: read, checked, split into training and held-out rows."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from zo_opt.errors import ZOError
from zo_opt.tasks import cells
from zo_opt.tasks.chat import Turn, turns_of
from zo_opt.tasks.metrics import GENERATION, LANGUAGE_MODELLING
from zo_opt.tasks.tables import IN_PYTHON, Row, Rows, hub_name, read_dataset, read_parquet
from zo_opt.tasks.tasks import Task, placeholders

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One row: the text of each placeholder; and the label's number, or the right texts (the first is learned). ``where``: its file and row."""

    fields: dict[str, str]
    label: int = 0
    references: tuple[str, ...] = ()
    where: str = field(default="this row", compare=False)
    turns: tuple[Turn, ...] = ()  # of a conversation


def read_rows(path: Path, column_names: Sequence[str] | None = None) -> Rows:
    """Rows of a .jsonl, .json (an array), .csv, .tsv or .parquet file; the lines of a .txt file as rows with one column "text"; or the train
    split of a data set of the hub, ``org/name``.

    Args:
        path: the file.
        column_names: of a .csv or .tsv file without a header line; elsewhere that line has them.

    Raises:
        ZOError: the file is missing, empty, of another kind, or a line cannot be read.
    """
    if path == IN_PYTHON:
        raise ZOError("the rows were given in Python and are in no file; give them again.")
    if (name := hub_name(path)) is not None:
        return read_dataset(name, None, None)
    if not path.is_file():
        raise ZOError(
            f"{path} does not exist or is no file; give the path of a .jsonl, .json, .csv, .tsv or .parquet file, or org/name of the hub."
        )
    if column_names is not None and path.suffix not in (".csv", ".tsv"):
        raise ZOError(
            f"column_names are of .csv and .tsv files without a header line, and {path} is none; leave them out."
        )
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix not in _READERS:
        raise ZOError(
            f"{path} ends in {path.suffix or 'nothing'!r}; give a .jsonl, .json, .csv, .tsv or .parquet file, or a .txt file as plain text."
        )
    try:
        # In a .csv a line end may stand inside a field, as it is.
        with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ZOError(f"{path} cannot be read ({error}); give a readable file in UTF-8.") from error
    if "\0" in text:
        raise ZOError(f"{path} holds NUL characters, as a file in UTF-16 does; save it in UTF-8.")
    rows = _READERS[path.suffix](path, text) if column_names is None else _read_table(path, text, column_names)
    if not rows:
        needs = {".txt": "text", ".jsonl": "at least one row"}
        raise ZOError(f"{path} is empty; it needs {needs.get(path.suffix, 'at least one row under its header line')}.")
    return Rows(rows)


def make_examples(rows: Sequence[Row], task: Task, source: str) -> list[Example]:
    """Check the columns of all rows, and their labels or targets, and turn them into examples.

    Raises:
        ZOError: a column is missing, a label is unknown, or a cell holds no text.
    """
    examples, called = [], _names_of(rows, task.label_column)
    for number, row in enumerate(rows, start=1):
        place = f"{source}, row {number}"
        for column in task.required_columns():
            _check_column(row, column, place)
        examples.append(_make_example(row, task, place, called))
    return examples


def make_prompts(rows: Sequence[Row], task: Task, source: str) -> list[Example]:
    """Rows without label or target as examples: what the template shows of them.

    Raises:
        ZOError: a column that is shown is missing, or holds no text.
    """
    prompts = []
    for number, row in enumerate(rows, start=1):
        place = f"{source}, row {number}"
        for column in task.shown_columns():
            _check_column(row, column, place)
        prompts.append(Example(task.fields(row, place), references=("",), where=place))
    return prompts


def _make_example(row: Row, task: Task, place: str, called: Sequence[str]) -> Example:
    if task.kind == LANGUAGE_MODELLING:
        [name] = placeholders(task.template)  # its text as it is: blank lines and indentation are text too
        column = task.columns.get(name, name)
        return Example({name: cells.plain_text_of(row[column], column, place)}, where=place)
    if task.conversation:
        turns = turns_of(row, task.conversation, place)
        return Example({}, references=tuple(t.content for t in turns if t.learned), where=place, turns=turns)
    fields = task.fields(row, place)
    if task.kind == GENERATION:
        references = cells.answers_of(row[task.target_column], task.target_column, place)
        return Example(fields, references=references, where=place)
    value = row[task.label_column]
    label = task.label_of(value, place, called)
    if label is None:
        name = f", which its table calls {called[value]!r}," if called and isinstance(value, int) else ""
        raise ZOError(
            f"{place}: label {value!r}{name} is unknown; this task's labels are {', '.join(task.label_names or task.labels)}."
        )
    return Example(fields, label, where=place)


def check_text(examples: Sequence[Example], task: Task, source: str) -> None:
    """Of running text not every row may be blank."""
    if task.kind == LANGUAGE_MODELLING and not any(text.strip() for e in examples for text in e.fields.values()):
        raise ZOError(f"{source} holds no text; all its {len(examples)} rows are blank.")


def check_classes(examples: Sequence[Example], task: Task, source: str) -> list[str]:
    """The labels that no row has; training needs rows of at least two.

    Raises:
        ZOError: all rows are of one class.
    """
    missing = missing_classes(examples, task)
    if len(task.labels) - len(missing) < 2:
        only = task.labels[examples[0].label]
        raise ZOError(
            f"{source} holds one class only ({only!r} in all {len(examples)} rows); add rows of another label."
        )
    return missing


def missing_classes(examples: Sequence[Example], task: Task) -> list[str]:
    """The labels that no row has."""
    present = {e.label for e in examples}
    return [label for number, label in enumerate(task.labels) if number not in present]


def column_values(rows: Sequence[Row], column: str, source: str) -> list[str]:
    """The different labels of a column, sorted (numbers by size).

    Raises:
        ZOError: a cell holds no label, or two spellings of one label stand in the column.
    """
    found: dict[str, str] = {}
    called = _names_of(rows, column)
    for number, row in enumerate(rows, start=1):
        place = f"{source}, row {number}"
        _check_column(row, column, place)
        label = cells.label_of(row[column], column, place)
        if called:
            cells.name_of(label, called, column, place)
        found.setdefault(label, place)
    cells.check_spellings(found, column)
    return cells.in_order(found)


def hold_out(rows: Sequence[T], held_out: int, *, last: bool = False) -> tuple[list[T], list[T]]:
    """Split rows into training and held-out ones, in an order fixed for good (seed 0, whatever the run's seed).

    At most 30 % are held out, so that small tables keep most of their rows for training. ``last``: the last rows are, for
    running text, whose neighbouring rows belong together.
    """
    count = max(1, min(held_out, 3 * len(rows) // 10))
    if last:
        return list(rows[:-count]), list(rows[-count:])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])]


def _names_of(rows: Sequence[Row], column: str) -> Sequence[str]:
    """What a table calls the labels 0, 1, ... of a column, where it does."""
    return rows.names.get(column, ()) if isinstance(rows, Rows) else ()


def _check_column(row: Row, column: str, place: str) -> None:
    if column in row:
        return
    raise ZOError(
        f"{place}: there is no column {column!r}; its columns are {', '.join(map(str, row))}; name the right one with "
        "--text_column, --label_column, --target_column or in --template."
    )


def _read_jsonl(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_each_once)
            if "\\ud" in line.lower():  # half of a character would be no text
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ZOError(f"{path}, line {number}: not JSON ({error}); each line must be one JSON object.") from error
        if not isinstance(row, dict):
            raise ZOError(f"{path}, line {number}: a {type(row).__name__}; each line must be one JSON object.")
        rows.append(row)
    return rows


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which the last of two values of one name would win."""
    if twice := _repeated([name for name, _ in pairs]):
        raise ValueError(f"{twice!r} stands twice in one object")
    return dict(pairs)


def _repeated(names: Sequence[str]) -> str | None:
    """A name that stands there twice."""
    return next((name for name, times in Counter(names).items() if name and times > 1), None)


def _read_array(path: Path, text: str) -> list[Row]:
    if text.lstrip()[:1] != "[":
        return _read_jsonl(path, text)  # which many call .json
    try:
        rows = json.loads(text, object_pairs_hook=_each_once)
        json.dumps(rows, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ZOError(f"{path}: not JSON ({error}); give an array of objects, or one object a line.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ZOError(f"{path}, row {number}: a {type(row).__name__}; each row must be one JSON object.")
    return list(rows)


def _read_table(path: Path, text: str, names: Sequence[str] | None = None) -> list[Row]:
    # GLUE's .tsv files hold bare quotation marks; in .csv they delimit fields.
    if path.suffix == ".tsv":
        reader = csv.DictReader(text.split("\n"), names, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""), names, strict=True)
    rows = []
    try:
        if twice := _repeated(reader.fieldnames or []):
            raise ZOError(f"{path}: two columns are named {twice!r}; rename or remove one.")
        header = list(reader.fieldnames or [])
        for row in reader:
            if len(header) > 1 and [str(value).lstrip("\ufeff") for value in row.values()] == header:
                raise ZOError(
                    f"{path}, line {reader.line_num}: the header line stands among the rows; remove it, or leave --column_names out where the "
                    "file begins with one."
                )
            if None in row:
                raise ZOError(
                    f"{path}, line {reader.line_num}: more fields than the header has columns; quote or remove the extra ones."
                )
            rows.append(row)
    except csv.Error as error:
        raise ZOError(f"{path}, line {reader.line_num}: not readable as a table ({error}).") from error
    return rows


def _read_lines(_path: Path, text: str) -> list[Row]:
    return [{"text": line} for line in text.replace("\r\n", "\n").rstrip("\n").split("\n")] if text.strip() else []


_READERS = {".jsonl": _read_jsonl, ".json": _read_array, ".csv": _read_table, ".tsv": _read_table, ".txt": _read_lines}
