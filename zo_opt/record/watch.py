"""What a run's files say of it, read while it goes on or afterwards; nothing is written or locked for longer than a look."""

from __future__ import annotations

import re
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from zo_opt.errors import ZOError
from zo_opt.journal import NAME as JOURNAL_NAME
from zo_opt.journal import read_journal
from zo_opt.record import checkpoint, metrics
from zo_opt.record.output import LOCK_NAME, RESULTS_NAME, RUN_NAME, writer
from zo_opt.record.summary import Progress
from zo_opt.system.plain_json import read_object

RUNNING, FINISHED, STOPPED, KILLED, STARTING = "running", "finished", "stopped", "killed", "starting"
_RECENT = 50  # [choice] steps whose pace the time left is reckoned from


@dataclass(frozen=True)
class Status:
    """Where a run stands."""

    state: str  # STARTING (no step yet), RUNNING, FINISHED, STOPPED (in order, or by an error that was said) or KILLED
    writer: str | None  # the process that writes now, in words
    steps: int
    total: int | None  # steps in all; None if the run's options cannot be read
    loss: float | None  # running mean, as on the progress bar
    queries: int
    forwards: int
    dropped: int  # queries whose loss was not finite
    seconds: float  # of training
    seconds_left: float | None  # at the pace of the last steps; None before the second one, and at the end
    memory: int | None  # resident bytes of the writing process, if it is on this machine
    checkpoint_step: int | None  # steps in the newest checkpoint
    checkpoint_age: float | None  # seconds since it was written
    journal: str | None  # "verified up to step n", or what is wrong; None if there is none or it was not looked at
    sound: bool  # whether the journal and the checkpoint can be used


class Watched:
    """A run's directory; each ``look`` reads only what is new in metrics.jsonl.

    Raises:
        ZOError: it is no run's directory.
    """

    def __init__(self, directory: Path) -> None:
        if not any((directory / name).exists() for name in (RUN_NAME, LOCK_NAME, checkpoint.NAME)):
            raise ZOError(f"{directory} holds no run; give the output_dir of zo-opt train or zo-opt compare.")
        self.directory = directory
        self._forget()

    def look(self, *, verify: bool = True) -> Status:
        """Where the run stands now; ``verify``: read the whole journal and checkpoint as well."""
        self._read_metrics()
        held = writer(self.directory)
        state, total, last = self._state(held), self._total(), self._last
        steps = last["step"] + 1 if last else 0
        saved, age, sound = self._checkpoint(verify)
        journal, whole = self._journal() if verify else (None, True)
        return Status(
            state=state, writer=held, memory=_memory(held), steps=steps, total=total, loss=self._progress.loss,
            queries=self._queries, dropped=self._dropped, forwards=last["forwards"] if last else 0,
            seconds=last["seconds"] if last else 0.0,
            seconds_left=self._left(steps, total) if state == RUNNING else None,
            checkpoint_step=saved, checkpoint_age=age, journal=journal, sound=sound and whole,
        )  # fmt: skip

    def _state(self, held: str | None) -> str:
        if held is not None:
            return RUNNING if self._last else STARTING
        if (self.directory / RESULTS_NAME).exists():
            return FINISHED
        return KILLED if (self.directory / LOCK_NAME).exists() else STOPPED  # who ends in order takes the lock away

    def _forget(self) -> None:
        self._queries = self._dropped = 0
        self._tail = metrics.Tail(self.directory)
        self._last: dict[str, Any] | None = None
        self._progress = Progress()
        self._recent: deque[float] = deque(maxlen=_RECENT + 1)

    def _read_metrics(self) -> None:
        if self._tail.was_cut:
            self._forget()
        for values in self._tail.read():
            self._queries += values["queries"]
            self._dropped += values["dropped"]
            self._recent.append(values["seconds"])
            self._progress.smooth(values["loss"])
            self._last = values

    def _total(self) -> int | None:
        with suppress(ZOError, KeyError, TypeError):
            steps = read_object(self.directory / RUN_NAME, "")["config"]["steps"]
            return steps if type(steps) is int and steps > 0 else None
        return None

    def _left(self, steps: int, total: int | None) -> float | None:
        if total is None or len(self._recent) < 2:
            return None
        pace = (self._recent[-1] - self._recent[0]) / (len(self._recent) - 1)
        return max(pace, 0.0) * (total - steps)

    def _checkpoint(self, verify: bool) -> tuple[int | None, float | None, bool]:
        for name in (checkpoint.NAME, checkpoint.PREVIOUS_NAME):
            path = self.directory / name
            with suppress(OSError, ZOError):
                written = path.stat().st_mtime
                if verify:
                    checkpoint.verify(path)
                return checkpoint.step_of(path), max(time.time() - written, 0.0), name == checkpoint.NAME
        return None, None, not (self.directory / checkpoint.NAME).exists()

    def _journal(self) -> tuple[str | None, bool]:
        path = self.directory / JOURNAL_NAME
        if not path.exists():
            return None, True
        try:
            contents = read_journal(path)
        except ZOError as error:
            return str(error), False
        return f"verified up to step {contents.steps}", True


def _memory(held: str | None) -> int | None:
    found = re.fullmatch(r"process (\d+) on (.*)", held or "")
    if found is None or found[2] != socket.gethostname():
        return None
    with suppress(psutil.Error):
        return int(psutil.Process(int(found[1])).memory_info().rss)
    return None


def runs_under(directory: Path) -> list[Path]:
    """The directories of a comparison's runs; of a single run itself alone."""
    if not (directory / "compare.json").is_file():
        return [directory]
    found = {path.parent for name in (RUN_NAME, LOCK_NAME) for path in directory.glob(f"*/*/*/{name}")}
    return sorted(found)
