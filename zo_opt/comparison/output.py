"""The result of a comparison: one table (terminal, CSV, Markdown) and its pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from zo_opt.comparison.plots import picture
from zo_opt.comparison.results import CONFIDENCE, Row
from zo_opt.comparison.runs import Run
from zo_opt.system.files import write_atomically
from zo_opt.system.memory import readable
from zo_opt.tasks.metrics import METRICS
from zo_opt.training.config import TrainConfig
from zo_opt.training.pairings import get_pairing

NAME = "compare"
_NOTHING = "-"
_WORDS = ("method", "kind", "state")  # columns of words; the others are of numbers


def write(
    directory: Path, rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], command: str, base: TrainConfig
) -> None:
    """Write compare.csv, compare.md, compare.png and rows.json."""
    write_atomically(directory / f"{NAME}.csv", to_csv(rows).encode())
    write_atomically(directory / f"{NAME}.md", to_markdown(rows, command, base).encode())
    write_atomically(directory / "rows.json", (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())
    below = (
        f"{Path(base.model_name_or_path).name}; {_budget(rows)}, {_seeds(rows)}\n"
        "Peak memory is that of the whole process while training; the interval speaks of other rows"
        + (" and other seeds." if any(row.seeds > 1 for row in rows) else ".")
    )
    write_atomically(directory / f"{NAME}.png", picture(rows, runs, _title(rows, base), below))


def _title(rows: Sequence[Row], base: TrainConfig) -> str:
    return f"{len(rows)} method{'s' * (len(rows) != 1)} on {Path(base.rows_name or base.task).name}"


def _budget(rows: Sequence[Row]) -> str:
    """The forward passes of a run, which differ by less than a step's."""
    most = max((row.forwards for row in rows if row.forwards is not None), default=None)
    return "no run finished" if most is None else f"{most:,} forward passes each"


def _seeds(rows: Sequence[Row]) -> str:
    seeds = max(row.seeds for row in rows)
    return f"{seeds} seeds" if seeds > 1 else "one seed"


def parts(rows: Sequence[Row]) -> dict[str, dict[str, list[str]]]:
    """The table as a person reads it, in parts of which each fits 80 columns: heading -> cells; headings without any cell are left out."""
    metric = METRICS[next((row.metric for row in rows if row.score is not None), "accuracy")]
    columns: dict[str, dict[str, Callable[[Row], str]]] = {
        "size": {
            "kind": lambda r: "forward" if get_pairing(r.method).config().zeroth_order else "backward",
            "trainable": lambda r: _shown(r.trainable, ","),
            "at end": lambda r: _shown(r.trainable_end if r.trainable_end != r.trainable else None, ","),
            "adapter": lambda r: _shown(r.adapter_bytes, readable),
            "peak memory": lambda r: _shown(r.peak_memory, readable),
        },
        "cost": {
            "batch": lambda r: _shown(r.batch_size),
            "lr": lambda r: _shown(r.lr, ".3g") + "*" * r.lr_at_edge,
            "steps": lambda r: _shown(r.steps, ","),
            "s a step": lambda r: _shown(r.step_seconds, ".3g"),
            "forwards": lambda r: _shown(r.forwards, ","),
            "search": lambda r: _shown(r.search_forwards or None, ","),
        },
        "result": {
            "train loss": lambda r: _shown(r.train_loss, ".3f"),
            "loss": lambda r: _shown(r.loss, ".3f"),
            "before": lambda r: _shown(r.before, metric.show),
            metric.label: lambda r: _shown(r.score, metric.show),
            f"{CONFIDENCE:.0%} interval": lambda r: (
                f"{metric.show(r.low)} to {metric.show(r.high)}"
                if r.low is not None and r.high is not None
                else _NOTHING
            ),
            "state": lambda r: r.state,
        },
    }
    if all(row.state == "finished" for row in rows):
        del columns["result"]["state"]
    filled = {part: {head: [cell(r) for r in rows] for head, cell in of.items()} for part, of in columns.items()}
    return {
        part: {head: cells for head, cells in of.items() if set(cells) != {_NOTHING}} for part, of in filled.items()
    }


def to_terminal(rows: Sequence[Row]) -> list[Table]:
    """For a terminal or a pipe: how large methods are, what they cost, and what they give; what is too wide is folded, never cut."""
    tables = []
    for part, columns in parts(rows).items():
        if columns:
            table = Table(box=box.SIMPLE, title=part, title_justify="left", padding=(0, 1, 0, 0))
            for head in ("method", *columns):
                table.add_column(head, justify="left" if head in _WORDS else "right", overflow="fold")
            for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
                table.add_row(row.method, *cells)
            tables.append(table)
    return tables


def to_csv(rows: Sequence[Row]) -> str:
    """All figures, unrounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def to_markdown(rows: Sequence[Row], command: str, base: TrainConfig) -> str:
    """The table as a page, with what was compared and how to read it."""
    columns = {"method": [row.method for row in rows]}
    for part in parts(rows).values():
        columns |= part
    lines = [
        list(columns),
        ["---" if head in _WORDS else "---:" for head in columns],
        *zip(*columns.values(), strict=True),
    ]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    notes = "".join(f"- {reason}\n" for reason in reasons(rows))
    seeds = max(row.seeds for row in rows)
    means = (
        f"Means over {seeds} seeds; the 95 % interval speaks of other seeds and other rows."
        if seeds > 1
        else "One seed; the 95 % interval speaks of other rows, not of other seeds."
    )
    return (
        f"# {_title(rows, base)}\n\n{base.model_name_or_path}\n\n{table}\n"
        + (f"{notes}\n" if notes else "")
        + f"![results, peak memory and time of all methods, and loss against forward passes]({NAME}.png)\n\n```\n{command}\n```\n\n"
        "A forward pass is one evaluation of the loss on one batch; a backward pass counts as two. What trials of learning rates took "
        "(search) comes on top of a run's own forwards. Peak memory is that of the whole process while training. "
        f"{means} Train loss is the mean over the last tenth of the steps. Kind: forward passes alone, or with backward passes."
        + (" *: at the edge of the learning rates tried." if any(row.lr_at_edge for row in rows) else "")
        + "\n"
    )


def reasons(rows: Sequence[Row]) -> list[str]:
    """A sentence on every method that did not finish."""
    return [f"{row.method}: {row.state}: {row.reason}" for row in rows if row.reason]


def _shown(value: float | None, how: str | Callable[[float], str] | Callable[[int], str] = "") -> str:
    if value is None:
        return _NOTHING
    return format(value, how) if isinstance(how, str) else how(value)  # type: ignore[arg-type]
