"""``zo-opt diagnose``."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict, fields
from pathlib import Path

from rich import box
from rich.table import Table

from zo_opt.cli.options import DiagnoseConfig
from zo_opt.cli.say import print_json, reporter_of
from zo_opt.diagnosis.diagnose import Diagnosis, diagnose
from zo_opt.diagnosis.plot import picture
from zo_opt.errors import ZOError
from zo_opt.system.files import write_atomically
from zo_opt.system.plain_json import without_nan
from zo_opt.training.config import TrainConfig


def run(options: Namespace, command: str) -> None:
    """Measure, print the table and the advice, draw the picture."""
    reporter, as_json = reporter_of(options)
    values = vars(options)
    asked = DiagnoseConfig(**{f.name: values.pop(f.name) for f in fields(DiagnoseConfig) if f.name in values})
    out = asked.out
    if out.suffix != ".png":
        raise ZOError(f"out={out} is no picture; give a name that ends in .png.")
    data = out.with_suffix(".json")
    taken = [str(p) for p in (out, data) if p.exists()]
    if taken:
        raise ZOError(f"{' and '.join(taken)} {'is' if len(taken) == 1 else 'are'} there already; give another --out.")
    if not out.parent.is_dir():
        raise ZOError(f"the directory {out.parent} of --out does not exist; create it first.")
    config = TrainConfig(**values)
    found = diagnose(config, reporter, queries=asked.queries, eps_grid=asked.eps_grid, trial_steps=asked.trial_steps)
    reporter.show(table(found))
    for line in found.advice:
        reporter.say(line)
    measured = without_nan(asdict(found))
    write_atomically(data, (json.dumps(measured, indent=2) + "\n").encode())
    about = f"{Path(config.model_name_or_path).name} on {config.rows_name or config.task}: {config.optimizer_name}, {config.adapter_name}"
    write_atomically(out, picture(found, about))
    reporter.say(f"picture: {out}; numbers: {data}")
    if as_json:
        print_json(measured)


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
