"""Rows that are in no text file: Parquet, data sets of the hub or on disk, ``datasets.Dataset`` objects, lists of mappings.

[choice] The ``datasets`` library reads what has types of its own: Parquet, the hub, Arrow. Its readers of CSV and JSON guess types ("007"
becomes 7, "NA" nothing, "2020-01-01" a time), so that files of text have exact readers of ours (:mod:`zo_opt.tasks.rows`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zo_opt.errors import ZOError, reason_of

Row = dict[str, Any]
IN_PYTHON = Path("rows given in Python")  # stands for a file where there is none
_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+", re.ASCII)


class Rows(list[Row]):
    """The rows of a table.

    Args:
        rows: each a mapping of columns.
        names: column -> the names of its labels 0, 1, ..., where the table has them (``ClassLabel``).
    """

    def __init__(self, rows: Iterable[Row] = (), names: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__(rows)
        self.names = dict(names or {})


def hub_name(path: Path | None) -> str | None:
    """The data set of the hub that is meant where a file's path was asked for: ``org/name``, and nothing is there.

    >>> hub_name(Path("stanfordnlp/sst2")), hub_name(Path("rows/train.csv"))
    ('stanfordnlp/sst2', None)
    """
    if path is None or path.exists() or path.is_absolute() or path.parent.exists():
        return None
    text = path.as_posix()
    files = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
    return text if _HUB_NAME.fullmatch(text) and path.suffix not in files and not text.startswith(".") else None


def read_parquet(path: Path) -> Rows:
    """The rows of a Parquet file.

    Raises:
        ZOError: it cannot be read.
    """
    import datasets
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        found = datasets.Dataset(datasets.table.InMemoryTable(table))  # the types that the hub's files say themselves
    except Exception as error:  # a damaged file fails in many ways
        raise ZOError(f"{path} cannot be read as Parquet ({reason_of(error)}); write the file anew.") from error
    return rows_of_dataset(found, str(path))


def read_dataset(name: str, config: str | None, split: str | None) -> Rows:
    """The rows of a data set: of the hub, a local copy of one, or a directory that ``save_to_disk`` wrote.

    Args:
        name: ``org/name``, or a directory.
        config: its configuration, where it has several.
        split: train if None; ``train[:100]`` and the like work as in ``datasets``.

    Raises:
        ZOError: it cannot be fetched, or has no such configuration or split.
    """
    import datasets

    split = split or "train"
    what = f"data set {name!r}{f' ({config})' if config else ''}, split {split!r},"
    saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if saved and config is not None:
        raise ZOError(
            f"dataset_config={config!r} was given, and what save_to_disk wrote to {name} has no configurations; leave it out."
        )
    try:
        if saved:
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise ValueError(f"it has the splits {', '.join(found)}")
                found = found[split]
        else:
            found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # a network, a hub and files of strangers fail in many ways
        raise ZOError(
            f"the {what} could not be fetched ({reason_of(error)}); look at its name, configuration and split, or give a file or a "
            "directory of yours."
        ) from error
    return rows_of_dataset(found, f"data set {name}")


def rows_of_dataset(dataset: Any, source: str) -> Rows:
    """The rows of a ``datasets.Dataset``, values as they are stored.

    Raises:
        ZOError: there are none.
    """
    features = dataset.features or {}
    names = {column: list(f.names) for column, f in features.items() if type(f).__name__ == "ClassLabel"}
    rows = dataset.to_list() if hasattr(dataset, "to_list") else [dict(row) for row in dataset]  # one that streams
    if not rows:
        raise ZOError(f"{source} is empty; it needs at least one row.")
    return Rows(rows, names)


def rows_given(given: Any, what: str) -> Rows:
    """Rows from Python: a ``datasets.Dataset``, or a list of mappings.

    Raises:
        ZOError: something else, or no rows.
    """
    kind = type(given)
    if kind.__module__.partition(".")[0] == "datasets":
        if isinstance(given, Mapping):
            raise ZOError(
                f"{what} are several splits ({', '.join(map(str, given))}); give one, such as dataset['train']."
            )
        return rows_of_dataset(given, what)
    if isinstance(given, Rows):
        return given
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(row, Mapping) for row in given):
        raise ZOError(
            f"{what} are of type {kind.__name__}; give a list of mappings from columns to values (of a DataFrame to_dict('records')), a "
            "datasets.Dataset, or the path of a file."
        )
    if not given:
        raise ZOError(f"{what} are none; give at least one.")
    return Rows([{name: _as_list(value) for name, value in row.items()} for row in given])


def _as_list(value: Any) -> Any:
    """An array, as pandas holds the lists of a Parquet file, as a list."""
    return value.tolist() if getattr(value, "ndim", 0) and hasattr(value, "tolist") else value
