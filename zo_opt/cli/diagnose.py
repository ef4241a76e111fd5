"""``zo-opt diagnose``."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich import box
from rich.table import Table

from zo_opt.diagnosis.diagnose import EPS_GRID, Diagnosis, diagnose
from zo_opt.diagnosis.plot import draw
from zo_opt.errors import ZOError
from zo_opt.record.progress import Reporter
from zo_opt.system.files import write_atomically
from zo_opt.training.config import TrainConfig
from zo_opt.training.options import PositiveInt


@dataclass(frozen=True)
class DiagnoseConfig:
    """What is measured, beside the options of a run.

    Args:
        queries: directions, each on an example of its own.
        eps_grid: values of zo_eps to try.
        out: the picture; numbers beside it as .json.
    """

    queries: PositiveInt = 48
    eps_grid: Sequence[float] = EPS_GRID
    out: Path = Path("diagnose.png")


def run(options: Namespace, command: str) -> None:
    """Measure, print the table and the advice, draw the picture."""
    reporter = Reporter()
    values = vars(options)
    asked = DiagnoseConfig(**{f.name: values.pop(f.name) for f in fields(DiagnoseConfig) if f.name in values})
    out = asked.out
    if out.suffix != ".png":
        raise ZOError(f"out={out} is no picture; give a name that ends in .png.")
    data = out.with_suffix(".json")
    taken = [str(p) for p in (out, data) if p.exists()]
    if taken:
        raise ZOError(f"{' and '.join(taken)} exist already; give another --out.")
    if not out.parent.is_dir():
        raise ZOError(f"the directory {out.parent} of --out does not exist; create it first.")
    diagnosis = diagnose(TrainConfig(**values), reporter, queries=asked.queries, eps_grid=asked.eps_grid)
    reporter.console.print(table(diagnosis))
    for line in diagnosis.advice:
        reporter.say(line)
    write_atomically(data, (json.dumps(asdict(diagnosis), indent=2) + "\n").encode())
    draw(diagnosis, out)
    reporter.say(f"picture: {out}; numbers: {data}")


def table(d: Diagnosis) -> Table:
    """A row for each zo_eps."""
    result = Table(box=box.SIMPLE, title=f"projected gradients along {d.queries} directions against {d.reference}")
    result.add_column("zo_eps", justify="right")
    for form in d.forms:
        for column in ("correl.", "error", "equal"):
            result.add_column(f"{form.precision}\n{column}", justify="right")
    for i, eps in enumerate(d.eps_grid):
        cells = [
            cell for f in d.forms for cell in (f"{f.correlations[i]:.4f}", f"{f.errors[i]:.3f}", f"{f.ties[i]:.0%}")
        ]
        result.add_row(f"{eps:g}", *cells, style="bold" if eps == d.zo_eps else None)
    return result
