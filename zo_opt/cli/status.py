"""``zo-opt status``: a run, or all runs of a comparison, seen from another terminal."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from zo_opt.cli.say import print_json
from zo_opt.errors import ZOError
from zo_opt.record.output import writer
from zo_opt.record.watch import FINISHED, RUNNING, STARTING, Status, Watched, runs_under
from zo_opt.system.memory import readable

_SECONDS = 1.0  # between two looks


def run(options: Namespace, command: str) -> int:
    """Show where a run stands; returns 0 if it is running or finished and its files are sound, else 1."""
    directory: Path = options.run_dir
    console = Console(highlight=False)
    if not directory.is_dir():
        raise ZOError(f"{directory} is no directory; give the output_dir of a run.")
    if options.follow:
        _follow(directory, console)
    statuses = {path: Watched(path).look() for path in runs_under(directory)}
    if options.json:
        print_json({str(path): asdict(status) for path, status in statuses.items()})
    else:
        console.print(_shown(directory, statuses))
    return 0 if all(s.state in (RUNNING, STARTING, FINISHED) and s.sound for s in statuses.values()) else 1


def _follow(directory: Path, console: Console) -> None:
    """Until no run is under way any more."""
    watched: dict[Path, Watched] = {}
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while True:
            watched |= {path: Watched(path) for path in runs_under(directory) if path not in watched}
            statuses = {path: run.look(verify=False) for path, run in watched.items()}
            live.update(_shown(directory, statuses), refresh=True)
            # A comparison is under way between its runs, too.
            if writer(directory) is None and not any(s.state in (RUNNING, STARTING) for s in statuses.values()):
                return
            time.sleep(_SECONDS)


def _shown(directory: Path, statuses: dict[Path, Status]) -> RenderableType:
    if list(statuses) == [directory]:
        return _one(directory, statuses[directory])
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("run", "state", "steps", "loss", "dropped", "left"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right", overflow="fold")
    for path, s in statuses.items():
        run = str(path.relative_to(directory))
        table.add_row(run, s.state, _steps(s), _number(s.loss), str(s.dropped), _time(s.seconds_left))
    return table


def _one(directory: Path, s: Status) -> RenderableType:
    dropped = f" ({s.dropped} dropped: loss not finite)" if s.dropped else ""
    left = f", {_time(s.seconds_left)} left" if s.seconds_left is not None else ""
    saved = f"after step {s.checkpoint_step}, {_time(s.checkpoint_age)} old" if s.checkpoint_step is not None else None
    rows = {
        "state": s.state + (f", {s.writer}" if s.writer else ""),
        "steps": _steps(s),
        "loss": _number(s.loss),
        "queries": f"{s.queries:,}{dropped}",
        "forward passes": f"{s.forwards:,}",
        "time": f"{_time(s.seconds)} training{left}",
        "memory": readable(s.memory) if s.memory is not None else None,
        "checkpoint": saved,
        "journal": s.journal,
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, value)
    bar = ProgressBar(total=s.total or 1, completed=s.steps if s.total else 0, width=40)
    hint = [] if s.state in (RUNNING, STARTING, FINISHED) else [_next(directory, s)]
    return Group(str(directory), bar, table, *hint)


def _next(directory: Path, s: Status) -> str:
    if s.checkpoint_step is None:
        return "no step was made; start it again with the same command"
    return f"continue with: zo-opt train --output_dir {directory} --resume"


def _steps(s: Status) -> str:
    return f"{s.steps:,} of {s.total:,}" if s.total is not None else f"{s.steps:,}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _time(seconds: float | None) -> str:
    """As hours, minutes and seconds; the largest two that count.

    >>> _time(3725.0), _time(59.4)
    ('1 h 2 min', '59 s')
    """
    if seconds is None:
        return "-"
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {s} s" if minutes else f"{s} s"
