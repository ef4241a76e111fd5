"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class Reporter:
    """Says sentences and shows progress on one console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console if console is not None else Console(highlight=False, soft_wrap=True)

    def say(self, sentence: str) -> None:
        """One line."""
        self.console.print(sentence, markup=False, emoji=False)

    def show(self, *tables: Table) -> None:
        """Tables, whole in whatever width there is: what is too wide is folded."""
        for table in tables:
            self.console.print(table, soft_wrap=False)

    @contextmanager
    def track(self, what: str, total: int, unit: str, done: int = 0) -> Iterator[Tracker]:
        """A stretch of work of ``total`` units, of which some are done already."""
        if not self.console.is_terminal:
            yield _Lines(self, what, total, unit, done)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left  {task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=False) as progress:
            yield _Bar(progress, progress.add_task(what, total=total, completed=done, note=""))


class Tracker:
    """Told how far the work has come."""

    def advance(self, count: int, note: str = "") -> None:
        """``count`` more units are done; ``note`` is what to show beside the bar."""
        raise NotImplementedError


class _Bar(Tracker):
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: int, note: str = "") -> None:
        self._progress.update(self._task, advance=count, note=note)


class _Lines(Tracker):
    """At most ten lines for the whole stretch and one in two seconds, and the last, so that logs stay short."""

    def __init__(self, reporter: Reporter, what: str, total: int, unit: str, done: int) -> None:
        self._reporter, self._what, self._total, self._unit = reporter, what, total, unit
        self._begin, self._done, self._shown = done, done, 10 * done // total
        self._start = self._last = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        self._done += count
        tenth, now = 10 * self._done // self._total, time.monotonic()
        finished = self._done >= self._total and note
        if tenth > self._shown and (now - self._last > 2 or finished):
            self._shown, self._last = tenth, now
            elapsed = now - self._start
            left = elapsed * (self._total - self._done) / (self._done - self._begin)
            parts = [
                f"{self._what}: {self._done}/{self._total} {self._unit}",
                f"{elapsed:.0f} s",
                f"{left:.0f} s left",
                note,
            ]
            self._reporter.say("  ".join(p for p in parts if p))
