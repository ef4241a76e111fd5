"""The directory that a run writes to: made, one process's own while it lives, and removed again if nothing came of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zo_opt.adapters.storage import CONFIG_NAME, SCHEDULE_NAME, WEIGHTS_NAME
from zo_opt.errors import ZOError
from zo_opt.journal import NAME as JOURNAL_NAME
from zo_opt.prompts import store
from zo_opt.record import checkpoint
from zo_opt.system.files import try_lock, unfinished

LOCK_NAME = ".lock"
RUN_NAME = "run.json"  # command, options, versions: the first file of a run, the checkpoint before step 0 the last before it trains
RESULTS_NAME = "results.json"  # the last file of a run: with it, it is finished
START_NAME = "start"  # the adapter as training began: what the journal is replayed on
_WRITTEN = (  # atomically: a killed process may leave an unfinished one of them
    RUN_NAME, JOURNAL_NAME, checkpoint.NAME, checkpoint.PREVIOUS_NAME, WEIGHTS_NAME, CONFIG_NAME, SCHEDULE_NAME,
    RESULTS_NAME, "report.md", "report.png", "report.html",
)  # fmt: skip


@contextmanager
def output_directory(
    directory: Path, what: str = "output_dir", *, resume: bool = False, unique: bool = False
) -> Iterator[Path]:
    """Create a directory to write to and lock it; remove it again if the work inside fails before anything was written.

    What a run left that was killed before its first step is removed, hidden states on disk excepted.

    Args:
        directory: its path.
        what: its name in sentences.
        resume: it is that of an earlier run, and its files stay.
        unique: take the first of ``directory``, ``directory-2``, ... that is not there.

    Raises:
        ZOError: it cannot be written; another process writes to it; or it is not empty and nothing is to be resumed.
    """
    try:
        created, above = unique or not directory.exists(), [path for path in directory.parents if not path.exists()]
        directory = _first_free(directory) if unique else directory
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory, what)
    except OSError as error:
        raise ZOError(f"{what} {directory} cannot be written ({error.strerror}); give a directory that can.") from error
    try:
        for path in unfinished(directory, *_WRITTEN):
            path.unlink(missing_ok=True)
        if not resume:
            if not never_begun(directory):
                to_resume = ", or --resume to continue the run in it" if what == "output_dir" else ""
                raise ZOError(f"{what} {directory} is not empty; give a new one{to_resume}.")
            _clear(directory)
        yield directory
    finally:
        with suppress(OSError):
            (directory / LOCK_NAME).unlink()  # while it is locked: who opened it before will find that it is gone
        os.close(lock)
        with suppress(OSError):  # somebody else may have removed it
            if created and not any(directory.iterdir()):
                directory.rmdir()
                for path in above:
                    path.rmdir()


def never_begun(directory: Path) -> bool:
    """Whether nothing is in a directory but what a run writes before its first step."""
    names = {path.name for path in directory.iterdir()}
    names -= {store.FILE_NAME, LOCK_NAME} | {path.name for path in unfinished(directory, *_WRITTEN)}
    if RUN_NAME not in names:
        return not names
    if not _is_record(directory / RUN_NAME):
        return False  # somebody else's file of that name
    journal = directory / JOURNAL_NAME
    steps = journal.is_file() and journal.read_bytes().count(b"\n") > 1
    return names <= {RUN_NAME, START_NAME, JOURNAL_NAME} and not steps


def _is_record(path: Path) -> bool:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return "zo-opt" in json.loads(path.read_bytes())["versions"]
    return False


def writer(directory: Path) -> str | None:
    """Which process writes to a directory now, in words; None if none does. Changes nothing."""
    path = directory / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
    except OSError:
        return None
    try:
        return None if _locked(descriptor) else _holder(path)
    finally:
        os.close(descriptor)


def _lock(directory: Path, what: str) -> int:
    """The open lock file; the lock ends when it is closed, with the process at the latest."""
    path = directory / LOCK_NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _locked(descriptor):
            os.close(descriptor)
            raise ZOError(
                f"{what} {directory} is being written by {_holder(path)}; wait for its end, or give another directory."
            )
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # of a run that ended just now, and took the file away
    with suppress(OSError):  # a full disk: it is locked all the same
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    return descriptor


def _locked(descriptor: int) -> bool:
    """Lock it; who only looks whether somebody writes has the lock for an instant."""
    if try_lock(descriptor):
        return True
    time.sleep(0.1)
    return try_lock(descriptor)


def _holder(path: Path) -> str:
    with suppress(ValueError, KeyError, TypeError, OSError):
        found = json.loads(path.read_bytes())
        return f"process {found['pid']} on {found['host']}"
    return "another process"


def _first_free(directory: Path) -> Path:
    """Made, so that of two runs that ask at once each has one of its own."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        name = directory if number == 1 else directory.with_name(f"{directory.name}-{number}")
        with suppress(FileExistsError):
            name.mkdir()
            return name
    raise ZOError(f"{directory} and 998 more of that name are there already; give an --output_dir.")


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name not in (store.FILE_NAME, LOCK_NAME):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
