"""The user's own rows, wherever they are: in files, a data set, or Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zo_opt.errors import ZOError
from zo_opt.tasks.rows import read_rows
from zo_opt.tasks.tables import IN_PYTHON, Rows, read_dataset, rows_given
from zo_opt.training.config import TrainConfig


@dataclass(frozen=True)
class GivenRows:
    """Rows to train on and held-out ones, of which there may be none; and what both are called in sentences."""

    train: Rows = field(default_factory=Rows)
    held_out: Rows = field(default_factory=Rows)
    sources: tuple[str, str] = (str(IN_PYTHON), str(IN_PYTHON))


def given_rows(rows: Any, eval_rows: Any) -> tuple[GivenRows | None, dict[str, Any]]:
    """Rows from Python, and the options that stand for them; a path is an option alone.

    Raises:
        ZOError: they are no rows.
    """
    options: dict[str, Any] = {}
    found: dict[str, Rows] = {}
    for name, option, value in (("train", "train_file", rows), ("held_out", "eval_file", eval_rows)):
        if value is None:
            continue
        if isinstance(value, str | Path):
            options[option] = str(value)
        else:
            options[option] = str(IN_PYTHON)
            found[name] = rows_given(value, "rows" if name == "train" else "eval_rows")
    return (GivenRows(found.get("train", Rows()), found.get("held_out", Rows())) if found else None), options


def own_rows(config: TrainConfig, given: GivenRows | None) -> GivenRows:
    """The rows of a run that does not take its task's own.

    Raises:
        ZOError: they cannot be read, or were given in Python and are not given now.
    """
    held_out = held_out_apart(config, given)
    if config.train_file is None:
        assert config.dataset is not None
        train, source = read_dataset(config.dataset, config.dataset_config, config.split), f"data set {config.dataset}"
    else:
        train, source = _read(config.train_file, config, None if given is None else given.train), str(config.train_file)
    return (
        GivenRows(train, Rows(), (source, source))
        if held_out is None
        else GivenRows(train, held_out[0], (source, held_out[1]))
    )


def held_out_apart(config: TrainConfig, given: GivenRows | None) -> tuple[Rows, str] | None:
    """Held-out rows that are not cut from the training rows, and what they are called; None where there are none.

    Raises:
        ZOError: they cannot be read.
    """
    if config.eval_file is not None:
        return _read(config.eval_file, config, None if given is None else given.held_out), str(config.eval_file)
    if config.dataset is not None and config.eval_split is not None:
        source = f"data set {config.dataset}, split {config.eval_split}"
        return read_dataset(config.dataset, config.dataset_config, config.eval_split), source
    return None


def _read(path: Path, config: TrainConfig, given: Rows | None) -> Rows:
    if path == IN_PYTHON and given:
        return given
    names = None if config.column_names is None else names_in("column_names", config.column_names)
    return read_rows(path, names)


def names_in(option: str, text: str) -> list[str]:
    """The names of columns in an option.

    Raises:
        ZOError: one is empty, or stands there twice.

    >>> names_in("column_names", "text, label")
    ['text', 'label']
    """
    names = [name.strip() for name in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise ZOError(f"{option}={text!r} must be different names with commas between, such as text,label.")
    return names
