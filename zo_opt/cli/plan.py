"""``zo-opt plan``."""

from __future__ import annotations

import csv
import io
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from zo_opt.errors import ZOError
from zo_opt.models import builtin
from zo_opt.planning.plan import Footprint, plan_method
from zo_opt.planning.plan_step import Setting
from zo_opt.planning.skeleton import make_skeleton, read_config
from zo_opt.record.progress import Reporter
from zo_opt.system.files import write_atomically
from zo_opt.system.memory import parse_bytes, readable
from zo_opt.training.config import to_plain
from zo_opt.training.methods import METHODS, get_method

FORMATS = (".json", ".csv", ".md")
ACCURACY = 0.15  # predictions are held to this (benchmarks/plan.py)
_COLUMNS = ("trained", "adapter", "weights", "gradients", "optimizer", "activations", "peak")


@dataclass
class PlanConfig:
    """Which methods to plan, for which model, batch and memory.

    Args:
        model_name_or_path: the built-in name, a local directory or a Hugging Face id, of which config.json alone is read.
        methods: names with commas between: those of zo-opt compare, or any optimizer:adapter; all if not given.
        memory: mark what fits in it, such as 24GB or 22.5GiB.
        batch_size: rows a step.
        length: tokens a row.
        precision: of the frozen base: mixed (bf16 matrices), fp32, bf16 (every tensor), or auto: mixed where the device is fast at it.
        device: cuda or cpu; it decides how AdamW goes through the parameters, and what auto means.
        head: lm (label words) or classification (a new head).
        logits: labels (the output head at label positions, as zo-opt trains) or all (language modelling).
        layers: adapters in the last so many layers; in all if not given (zo-opt train takes the last quarter).
        query_mode: of zeroth-order methods: sequential, batched, split or auto; the method's if not given.
        out: a file for the table: .json, .csv or .md.
        overwrite: replace the file if it is there.
    """

    model_name_or_path: str = builtin.DEFAULT_MODEL
    methods: str | None = None
    memory: str | None = None
    batch_size: int = 16
    length: int = 128
    precision: str = "auto"
    device: str = "cuda"
    head: str = "lm"
    logits: str = "labels"
    layers: int | None = None
    query_mode: str | None = None
    out: Path | None = None
    overwrite: bool = False

    @property
    def setting(self) -> Setting:
        """What all methods have in common."""
        return Setting(**{f.name: getattr(self, f.name) for f in fields(Setting)})


@dataclass(frozen=True)
class Row:
    """One method's figures, or why it has none; ``fits``: yes, tight (within the accuracy of predictions), no, or empty."""

    method: str
    footprint: Footprint | None
    fits: str
    note: str

    @property
    def values(self) -> dict[str, str | int | None]:
        """Plain values, bytes where there are any."""
        names = [f.name for f in fields(Footprint)]
        found = asdict(self.footprint) if self.footprint is not None else dict.fromkeys(names)
        return {"method": self.method, **found, "fits": self.fits, "note": self.note}


def run(options: Namespace, command: str) -> None:
    """Plan all methods, print the table, write the file."""
    config = PlanConfig(**options.as_dict())
    memory = parse_bytes(config.memory) if config.memory is not None else None
    _check_out(config)
    setting = config.setting
    names = config.methods.split(",") if config.methods is not None else METHODS
    methods = [get_method(name.strip()) for name in dict.fromkeys(names)]
    skeleton = make_skeleton(read_config(config.model_name_or_path), setting.head, config.model_name_or_path)
    rows, reporter = [], Reporter()
    with reporter.track("planning", len(methods), "methods") as tracker:
        for method in methods:
            try:
                found = plan_method(skeleton, method, setting)
                rows.append(Row(method.name, found, fits(found.peak, memory), ""))
            except (ZOError, RuntimeError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                rows.append(
                    Row(method.name, None, "", reason if isinstance(error, ZOError) else f"not foreseen: {reason}")
                )
            tracker.advance(1)
    if all(row.footprint is None for row in rows):
        raise ZOError(f"nothing could be planned; {rows[0].method}: {rows[0].note.rstrip('.')}.")
    Console().print(table(rows, config, setting.taken_precision))
    for row in rows:
        if row.note:
            reporter.say(f"{row.method}: {row.note}")
    if config.out is not None:
        write_atomically(config.out, rendered(rows, config).encode())
        reporter.say(f"written to {config.out}")


def fits(peak: int, memory: int | None) -> str:
    """Whether a peak fits: "tight" where a prediction too low by its accuracy would not.

    >>> [fits(peak, 100) for peak in (80, 90, 101)], fits(80, None)
    (['yes', 'tight', 'no'], '')
    """
    if memory is None:
        return ""
    return "no" if peak > memory else "tight" if peak * (1 + ACCURACY) > memory else "yes"


def table(rows: Sequence[Row], config: PlanConfig, precision: str) -> Table:
    """For the terminal."""
    title = (
        f"{config.model_name_or_path}: one step of {config.batch_size} x {config.length} tokens, {precision}, {config.device}"
        + (f", {config.memory} of memory" if config.memory is not None else "")
    )
    shown = Table(title=title, box=box.SIMPLE, title_justify="left")
    shown.add_column("method")
    for name in _COLUMNS:
        shown.add_column(name, justify="right")
    if config.memory is not None:
        shown.add_column("fits")
    for row in rows:
        if row.footprint is not None:
            shown.add_row(*_cells(row)[: len(shown.columns)])
    return shown


def rendered(rows: Sequence[Row], config: PlanConfig) -> str:
    """The file's content, by its ending."""
    assert config.out is not None
    if config.out.suffix == ".json":
        plain = {k: v for k, v in to_plain(config).items() if k not in ("out", "overwrite")}
        return json.dumps({"config": plain, "methods": [row.values for row in rows]}, indent=2) + "\n"
    if config.out.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0].values), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.values for row in rows)
        return text.getvalue()
    header = ("method", *_COLUMNS, "fits")
    lines = [header, ("---", *["---:"] * len(_COLUMNS), "---")]
    lines += [
        _cells(row) if row.footprint is not None else (row.method, *[""] * len(_COLUMNS), row.note) for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    found = row.footprint
    assert found is not None
    sizes = (found.adapter, found.weights, found.gradients, found.optimizer, found.activations, found.peak)
    return (row.method, f"{found.trainable:,}", *map(readable, sizes), row.fits)


def _check_out(config: PlanConfig) -> None:
    out = config.out
    if out is not None and out.suffix not in FORMATS:
        raise ZOError(f"out={out} ends in {out.suffix or 'nothing'!r}; give a name that ends in {', '.join(FORMATS)}.")
    if out is not None and not config.overwrite and out.exists():
        raise ZOError(f"{out} exists already; give another --out, or --overwrite.")
