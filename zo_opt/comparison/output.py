"""The result of a comparison: one table (terminal, CSV, Markdown) and its pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from zo_opt.comparison.plots import draw
from zo_opt.comparison.results import CONFIDENCE, Row
from zo_opt.comparison.runs import Run
from zo_opt.system.files import write_atomically
from zo_opt.system.memory import readable
from zo_opt.tasks.metrics import METRICS
from zo_opt.training.config import TrainConfig
from zo_opt.training.methods import get_method

NAME = "compare"
_GONE = "-"
_TABLES = {  # each fits 80 columns; neighbours are put together where there is room
    "size": ("kind", "trainable", "at end", "adapter", "peak memory"),
    "cost": ("batch", "lr", "steps", "s a step", "forwards", "search"),
    "result": ("train loss", "loss", "before"),  # and the metric, its interval, and what became of the runs
}
_WORDS = ("method", "kind", "state")


def write(
    directory: Path, rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], command: str, base: TrainConfig
) -> None:
    """Write compare.csv, compare.md, compare.png and rows.json."""
    write_atomically(directory / f"{NAME}.csv", to_csv(rows).encode())
    write_atomically(directory / f"{NAME}.md", to_markdown(rows, command, base).encode())
    write_atomically(directory / "rows.json", (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())
    draw(rows, runs, directory / f"{NAME}.png")


def cells(row: Row) -> dict[str, str]:
    """A row as a person reads it."""
    order = "forward" if get_method(row.method).zeroth_order else "backward"
    if row.score is None:
        return {"method": row.method, "kind": order, "state": row.state}
    metric = METRICS[row.metric]
    assert row.low is not None and row.high is not None and row.before is not None
    assert row.train_loss is not None and row.loss is not None and row.peak_memory is not None
    assert row.trainable is not None and row.step_seconds is not None and row.lr is not None
    changed = {"at end": f"{row.trainable_end:,}"} if row.trainable_end != row.trainable else {}
    searched = {"search": f"{row.search_forwards:,}"} if row.search_forwards else {}
    return {
        "method": row.method,
        "kind": order,
        "trainable": f"{row.trainable:,}",
        **changed,
        "adapter": readable(row.adapter_bytes or 0),
        "peak memory": readable(row.peak_memory),
        "batch": f"{row.batch_size}",
        "lr": f"{row.lr:.3g}{'*' if row.lr_at_edge else ''}",
        "steps": f"{row.steps:,}",
        "s a step": f"{row.step_seconds:.3g}",
        "forwards": f"{row.forwards:,}",
        **searched,
        "train loss": f"{row.train_loss:.3f}",
        "loss": f"{row.loss:.3f}",
        "before": metric.show(row.before),
        metric.label: metric.show(row.score),
        f"{CONFIDENCE:.0%} interval": f"{metric.show(row.low)} to {metric.show(row.high)}",
        **({"state": row.state} if row.state != "finished" else {}),
    }


def to_terminal(rows: Sequence[Row], console: Console) -> list[Table]:
    """For a terminal: one table where it is wide enough, else parts that fit it: how large methods are, what they cost and give."""
    described = [cells(row) for row in rows]
    names = [name for name in _columns(described) if name != "method"]
    groups = {title: [n for n in columns if n in names] for title, columns in _TABLES.items()}
    groups["result"] += [n for n in names if not any(n in columns for columns in _TABLES.values())]
    parts: list[tuple[str, list[str]]] = []
    unbounded = console.options.update(max_width=10_000)
    for title, columns in groups.items():
        if parts:
            joined = (f"{parts[-1][0]}, {title}", parts[-1][1] + columns)
            if Measurement.get(console, unbounded, _table(*joined, described)).maximum <= console.width:
                parts[-1] = joined
                continue
        if columns:
            parts.append((title, columns))
    return [_table(title, columns, described) for title, columns in parts]


def reasons(rows: Sequence[Row]) -> list[str]:
    """A sentence on every method that did not finish."""
    return [f"{row.method}: {row.state}: {row.reason}" for row in rows if row.reason]


def _table(title: str, columns: Sequence[str], described: Sequence[Mapping[str, str]]) -> Table:
    table = Table(box=box.SIMPLE, title=title, title_justify="left", padding=(0, 1, 0, 0))
    columns = ["method", *columns]
    for name in columns:
        table.add_column(name, justify="left" if name in _WORDS else "right", no_wrap=True)
    for cell in described:
        table.add_row(*(_cell(cell, name) for name in columns))
    return table


def to_csv(rows: Sequence[Row]) -> str:
    """All figures, unrounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def to_markdown(rows: Sequence[Row], command: str, base: TrainConfig) -> str:
    """The table as a page, with what was compared and how to read it."""
    described = [cells(row) for row in rows]
    columns = _columns(described)
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---" if name in _WORDS else "---:" for name in columns) + "|",
    ]
    lines += ["| " + " | ".join(_cell(cell, name) for name in columns) + " |" for cell in described]
    notes = "".join(f"- {reason}\n" for reason in reasons(rows))
    task = base.task if base.train_file is None else str(base.train_file)
    seeds = max(row.seeds for row in rows)
    return (
        f"# {len(rows)} methods on {task}\n\n{base.model_name_or_path}\n\n"
        + "\n".join(lines)
        + "\n\n"
        + (f"{notes}\n" if notes else "")
        + f"![loss against forward passes, loss against seconds, result against peak memory]({NAME}.png)\n\n```\n{command}\n```\n\n"
        "A forward pass is one evaluation of the loss on one batch; a backward pass counts as two. What trials of learning rates took "
        "(search) comes on top of a run's own forwards. Peak memory is that of the whole process while training. "
        + (
            f"Means over {seeds} seeds; the 95 % interval speaks of other seeds and other held-out rows. "
            if seeds > 1
            else "One seed; the 95 % interval speaks of other held-out rows, not of other seeds. "
        )
        + "Train loss is the mean over the last tenth of the steps. Kind: forward passes alone, or with backward passes."
        + (" *: at the edge of the learning rates tried." if any(row.lr_at_edge for row in rows) else "")
        + "\n"
    )


def _columns(described: Sequence[Mapping[str, str]]) -> list[str]:
    """All columns, the outcome of what did not finish last."""
    fullest = max(described, key=len)
    order = [*fullest, *(name for cell in described for name in cell if name not in fullest)]
    found = dict.fromkeys(name for name in order if name not in ("state", "at end", "search"))
    names = list(found)
    for late, after in (("at end", "trainable"), ("search", "forwards")):
        if any(late in cell for cell in described):
            names.insert(names.index(after) + 1, late)
    return [*names, "state"] if any("state" in cell for cell in described) else names


def _cell(cell: Mapping[str, str], name: str) -> str:
    return cell.get(name, "finished" if name == "state" else _GONE)
