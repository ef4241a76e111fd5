"""Tables of examples: read, checked, split into training and held-out rows."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zo_opt.errors import ZOError
from zo_opt.tasks.metrics import GENERATION, LANGUAGE_MODELLING
from zo_opt.tasks.tasks import Task, label_text, placeholders

Row = dict[str, Any]
_WHOLE = re.compile(r"-?\d{1,18}")


@dataclass(frozen=True)
class Example:
    """One row: the text of each placeholder; and the label's number, or the right texts (the first is learned)."""

    fields: dict[str, str]
    label: int = 0
    references: tuple[str, ...] = ()


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl, .csv or .tsv file (header line first), or the lines of a .txt file as rows with one column "text".

    Raises:
        ZOError: the file is missing, empty, of another kind, or a line cannot be read.
    """
    if not path.is_file():
        raise ZOError(f"{path} does not exist or is no file; give the path of a .jsonl, .csv or .tsv file.")
    if path.suffix not in _READERS:
        raise ZOError(
            f"{path} ends in {path.suffix or 'nothing'!r}; give a .jsonl, .csv or .tsv file, or a .txt file as plain text."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ZOError(f"{path} cannot be read ({error}); give a readable file in UTF-8.") from error
    rows = _READERS[path.suffix](path, text)
    if not rows:
        needs = {".txt": "text", ".jsonl": "at least one row"}
        raise ZOError(f"{path} is empty; it needs {needs.get(path.suffix, 'at least one row under its header line')}.")
    return rows


def make_examples(rows: Sequence[Row], task: Task, source: str) -> list[Example]:
    """Check the columns of all rows, and their labels or targets, and turn them into examples.

    Raises:
        ZOError: a column is missing, a label is unknown, a target is empty, or there is no text at all.
    """
    examples = []
    for number, row in enumerate(rows, start=1):
        place = f"{source}, row {number}"
        for column in task.required_columns():
            _check_column(row, column, place)
        examples.append(_make_example(row, task, place))
    if task.kind == LANGUAGE_MODELLING and not any(text.strip() for e in examples for text in e.fields.values()):
        raise ZOError(f"{source} holds no text; all its {len(examples)} rows are blank.")
    return examples


def _make_example(row: Row, task: Task, place: str) -> Example:
    if task.kind == LANGUAGE_MODELLING:
        [name] = placeholders(task.template)  # its text as it is: blank lines and indentation are text too
        return Example({name: str(row[task.columns.get(name, name)])})
    if task.kind == GENERATION:
        references = task.references_of(row[task.target_column])
        if not references:
            raise ZOError(f"{place}: column {task.target_column!r} holds no text to write; fill it or remove the row.")
        return Example(task.fields(row), references=references)
    label = task.label_of(row[task.label_column])
    if label is None:
        raise ZOError(
            f"{place}: label {row[task.label_column]!r} is unknown; this task's labels are {', '.join(task.labels)}."
        )
    return Example(task.fields(row), label)


def check_classes(examples: Sequence[Example], task: Task, source: str) -> None:
    """Training needs at least two classes."""
    present = {e.label for e in examples}
    if len(present) < 2:
        only = task.labels[present.pop()]
        raise ZOError(
            f"{source} holds one class only ({only!r} in all {len(examples)} rows); add rows of another label."
        )


def column_values(rows: Sequence[Row], column: str, source: str) -> list[str]:
    """The different values of a column, sorted (numbers by size)."""
    for number, row in enumerate(rows, start=1):
        _check_column(row, column, f"{source}, row {number}")
    values = {label_text(row[column]) for row in rows}
    return sorted(values, key=lambda v: (0, int(v), v) if _WHOLE.fullmatch(v) else (1, 0, v))


def hold_out(rows: Sequence[Row], held_out: int, *, last: bool = False) -> tuple[list[Row], list[Row]]:
    """Split rows into training and held-out ones, in an order fixed for good (seed 0, whatever the run's seed).

    At most 30 % are held out, so that small tables keep most of their rows for training. ``last``: the last rows are, for
    running text, whose neighbouring rows belong together.
    """
    count = max(1, min(held_out, 3 * len(rows) // 10))
    if last:
        return list(rows[:-count]), list(rows[-count:])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])]


def _check_column(row: Row, column: str, place: str) -> None:
    if row.get(column) is not None:
        return
    if column in row:
        raise ZOError(f"{place}: column {column!r} is empty; fill it or remove the row.")
    raise ZOError(f"{place}: there is no column {column!r}; its columns are {', '.join(map(str, row))}.")


def _read_jsonl(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\ud" in line.lower():  # half of a character would be no text
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ZOError(f"{path}, line {number}: not JSON ({error}); each line must be one JSON object.") from error
        if not isinstance(row, dict):
            raise ZOError(f"{path}, line {number}: a {type(row).__name__}; each line must be one JSON object.")
        rows.append(row)
    return rows


def _read_table(path: Path, text: str) -> list[Row]:
    # GLUE's .tsv files hold bare quotation marks; in .csv they delimit fields.
    if path.suffix == ".tsv":
        reader = csv.DictReader(text.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = []
    try:
        for row in reader:
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


_READERS = {".jsonl": _read_jsonl, ".csv": _read_table, ".tsv": _read_table, ".txt": _read_lines}
