"""All runs of a comparison, several at a time: one process watches them, and passes on that it is asked to stop."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from zo_opt.comparison.runs import Run
from zo_opt.record.metrics import Tail
from zo_opt.record.progress import Reporter
from zo_opt.training.stop import StopRequest, StopSignals

LOOK_SECONDS = 0.2  # between two looks at what is under way


def run_all(
    runs: Sequence[Run],
    reporter: Reporter,
    what: str,
    *,
    jobs: int,
    prefixes: Path,
    keep_models: bool,
    retry: bool = False,
) -> None:
    """Make all runs that have not ended yet.

    Args:
        runs: in the order in which they start.
        reporter: shown how far they are, and told of those that do not finish.
        what: this is, in words.
        jobs: runs at a time.
        prefixes: directory of the caches on disk, one for each run at a time.
        keep_models: keep the tuned weights of runs that ended.
        retry: make those that failed again, too.

    Raises:
        StopRequest: SIGINT or SIGTERM came; the runs under way left their checkpoints (a second one kills them).
    """
    if not runs:
        return
    if retry:
        for run in runs:
            run.forget_failure()
    waiting = [run for run in runs if run.outcome() is None]
    active: dict[psutil.Process, tuple[_Course, int]] = {}
    places = list(range(jobs))
    threads = int(os.environ.get("OMP_NUM_THREADS") or max((os.cpu_count() or 1) // jobs, 1))
    tracked = reporter.track(what, len(runs), "runs", len(runs) - len(waiting))
    with StopSignals() as stop, stop.held(), tracked as tracker:
        try:
            while (waiting or active) and stop.signum is None:
                while waiting and places:
                    run, place = waiting.pop(0), places.pop(0)
                    active[run.start(threads, prefixes / str(place))] = (_Course(run), place)
                for process in psutil.wait_procs(active, timeout=LOOK_SECONDS)[0]:
                    course, place = active.pop(process)
                    run = course.run
                    places.append(place)
                    code = process.wait()
                    assert code is not None  # it is our child
                    outcome = run.ended(code, keep_models=keep_models)
                    tracker.advance(1, course.note())
                    if outcome.state != "finished":
                        reporter.say(f"{run.method}, {run.directory.name}: {outcome.state}: {outcome.reason}")
                tracker.advance(0, "; ".join(course.note() for course, _ in active.values()))
        finally:
            _stop(active)
            for process, (course, _) in active.items():
                if process.wait() == 0:  # it came to its end all the same
                    course.run.ended(0, keep_models=keep_models)


def _stop(active: Collection[psutil.Process]) -> None:
    """Let them end after the step they are at."""
    for process in active:
        process.terminate()
    try:
        psutil.wait_procs(active)
    except StopRequest:  # asked twice
        for process in active:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(active)
        raise


class _Course:
    """How far a run is. It is looked at often, so that each look reads only what is new."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._begin_anew()

    def note(self) -> str:
        """In words."""
        if self._tail.was_cut:
            self._begin_anew()
        if new := self._tail.read():
            self._steps += len(new)
            self._loss, self._forwards = new[-1]["loss"], new[-1]["forwards"]
        where = f"{self.run.method} {self.run.directory.name}"
        if not self._steps:
            return f"{where}: starting"
        return f"{where}: {self._steps} steps, {self._forwards} forward passes, loss {self._loss:.3f}"

    def _begin_anew(self) -> None:
        self._tail = Tail(self.run.directory)
        self._steps, self._forwards = 0, 0
        self._loss = math.nan
