"""Runs of ``zo-opt train`` in processes of their own: started, watched, taken up again, read."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from zo_opt.comparison.options import given_options
from zo_opt.errors import ZOError
from zo_opt.record import checkpoint, metrics
from zo_opt.record.progress import Reporter
from zo_opt.system.files import write_atomically
from zo_opt.system.plain_json import is_number, read_object
from zo_opt.tasks.metrics import METRICS
from zo_opt.training.config import TrainConfig

_DIVERGED = "training failed"  # what the command line says of losses that are not finite
RISE = 2.0  # [choice] how far the training loss may rise above its start before a run counts as diverged
_POLL_SECONDS = 0.2
_LARGEST = 1e150  # number in results.json that is computed with, which squares it
_AGAIN = "delete it and resume: the run is made again"
_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_schedule.safetensors",
    checkpoint.NAME,
    checkpoint.PREVIOUS_NAME,
    "journal",
    "journal.damaged",
    "start",
    "tensorboard",
)


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a method.

    Attributes:
        method: its name.
        config: its options; ``output_dir`` is its directory.
    """

    method: str
    config: TrainConfig

    @property
    def directory(self) -> Path:
        """Where it writes."""
        assert self.config.output_dir is not None
        return self.config.output_dir

    @property
    def log(self) -> Path:
        """What it said, beside its directory."""
        return self._beside("log")

    @property
    def _status(self) -> Path:
        return self._beside("json")

    def outcome(self) -> Outcome | None:
        """How it ended; None if it has not."""
        if not self._status.is_file():
            return None
        values = read_object(self._status, _AGAIN)
        if values.keys() != {"state", "reason"} or not all(isinstance(value, str) for value in values.values()):
            raise ZOError(f"{self._status} is damaged (it says no state and reason); {_AGAIN}.")
        outcome = Outcome(**values)
        lost = outcome.state == "finished" and not (self.directory / "results.json").is_file()
        return None if lost else outcome

    def _beside(self, kind: str) -> Path:
        return self.directory.with_name(f"{self.directory.name}.{kind}")  # a learning rate's name has dots in it

    def results(self) -> dict[str, Any] | None:
        """What it measured; None if it did not come to its end."""
        path = self.directory / "results.json"
        if not path.is_file():
            return None
        results = read_object(path, _AGAIN)
        if not _is_whole(results):
            raise ZOError(f"{path} is damaged (it lacks what a run measures); {_AGAIN}.")
        return results

    def forget_failure(self) -> None:
        """Let it be tried again if it failed; one that diverged would do so again."""
        outcome = self.outcome()
        if outcome is not None and outcome.state == "failed":
            self._status.unlink()

    def steps_done(self) -> list[dict[str, Any]]:
        """Its steps so far, as in metrics.jsonl."""
        return metrics.read_metrics(self.directory)

    def start(self, threads: int, prefixes: Path) -> subprocess.Popen[bytes]:
        """Begin it, or go on from its checkpoint.

        Args:
            threads: of its process.
            prefixes: where a cache on disk is, which runs before it may have filled.

        Raises:
            ZOError: a process that outlived an earlier comparison is still at it.
        """
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        log = self.log.open("ab")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process holds it with its log, until it ends
        except BlockingIOError:
            log.close()
            raise ZOError(
                f"{self.directory} is still being written by a run of an earlier comparison; wait for its end, then resume."
            ) from None
        resume = any((self.directory / name).is_file() for name in (checkpoint.NAME, checkpoint.PREVIOUS_NAME))
        if not resume and self.directory.exists():  # it was stopped before its first checkpoint
            shutil.rmtree(self.directory)
        options, config = self._beside("yaml"), self.config
        if resume:  # with its own options; but the cache on disk that it had may be another run's by now
            given = ["--output_dir", str(self.directory), "--resume"]
            given += ["--trust_remote_code"] * config.trust_remote_code
            known = read_object(options, _AGAIN) if options.is_file() else {}
            if config.prefix_cache_dir is None and "prefix_cache_dir" in known:
                given += ["--prefix_cache_dir", str(prefixes)]
        else:
            if config.prefix_cache == "disk" and config.prefix_cache_dir is None:
                config = replace(config, prefix_cache_dir=prefixes)
            options.write_text(json.dumps(dict(given_options(config)), indent=1), encoding="utf-8")
            given = ["--config", str(options)]
        command = [sys.executable, "-m", "zo_opt.cli.main", "train", *given]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,  # Ctrl-C reaches it through us, once
            )  # fmt: skip

    def ended(self, code: int, *, keep_models: bool) -> Outcome:
        """Take down how it ended."""
        outcome = self._how(code)
        if not keep_models and outcome.state != "failed":  # which can go on from its checkpoint
            for name in _WEIGHTS:
                path = self.directory / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write_atomically(self._status, json.dumps(vars(outcome)).encode())
        return outcome

    def _how(self, code: int) -> Outcome:
        if code < 0:
            doubt = " (out of memory?)" if code == -signal.SIGKILL else ""
            return Outcome("failed", f"killed by {signal.Signals(-code).name}{doubt}")
        if code > 0:
            log = self.log.read_text(encoding="utf-8", errors="replace")
            last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), f"exit code {code}")
            state = "diverged" if code == 1 and _DIVERGED in last else "failed"
            return Outcome(state, last.removeprefix("zo-opt: ").removeprefix("error: "))
        # A dropped step alone is no divergence.
        try:
            results = self.results()
        except ZOError as error:  # which ends no other run
            return Outcome("failed", str(error))
        curve = [s["loss"] for s in self.steps_done() if math.isfinite(s["loss"])]
        if results is None or results["after"]["loss"] is None or not curve:
            return Outcome("diverged", "the held-out loss is not finite after training")
        tenth = math.ceil(len(curve) / 10)
        first, last_loss = (sum(part) / tenth for part in (curve[:tenth], curve[-tenth:]))
        if not last_loss <= RISE * max(first, results["before"]["loss"] or 0.0):
            return Outcome("diverged", f"the training loss went from {first:.3g} to {last_loss:.3g}")
        return Outcome("finished")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "finished", "diverged" (no finite loss any more, or one that rose a lot) or "failed", and why."""

    state: str
    reason: str = ""


def _is_whole(results: dict[str, Any]) -> bool:
    """Whether results.json has all that a comparison looks at, each of its kind."""
    numbers = (
        "lr",
        "batch_size",
        "trainable",
        "trainable_end",
        "adapter_bytes",
        "train_peak_memory",
        "steps",
        "forwards",
    )
    metric, before, after = (results.get(name) for name in ("metric", "before", "after"))
    if not (isinstance(metric, str) and metric in METRICS and isinstance(before, dict) and isinstance(after, dict)):
        return False
    scores, weights = after.get("row_scores"), after.get("row_weights")
    return (
        all(is_number(results.get(name), most=_LARGEST) for name in numbers)
        and all({"loss", metric} <= side.keys() for side in (before, after))
        and all(is_number(side["loss"], null=True, most=_LARGEST) and is_number(side[metric], null=True) for side in (before, after))
        and isinstance(scores, list) and len(scores) > 0 and all(is_number(score, null=True, most=_LARGEST) for score in scores)
        and (weights is None or _are_weights(weights, len(scores)))
    )  # fmt: skip


def _are_weights(values: Any, count: int) -> bool:
    return (
        isinstance(values, list) and len(values) == count and all(is_number(w, most=_LARGEST) and w > 0 for w in values)
    )


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
    """Make all runs that have not ended yet, ``jobs`` at a time; ``retry``: those that failed, too.

    Raises:
        StoppedError: SIGINT or SIGTERM came; the runs under way left their checkpoints.
    """
    if retry:
        for run in runs:
            run.forget_failure()
    if not runs:
        return
    waiting = [run for run in runs if run.outcome() is None]
    active: dict[Run, subprocess.Popen[bytes]] = {}
    places: dict[Run, int] = {}
    threads = int(os.environ.get("OMP_NUM_THREADS") or max((os.cpu_count() or 1) // jobs, 1))
    with _stop_signals() as stop, reporter.track(what, len(runs), "runs", len(runs) - len(waiting)) as tracker:
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    place = next(i for i in range(jobs) if i not in places.values())
                    active[waiting[0]] = waiting[0].start(
                        threads, prefixes / str(place)
                    )  # one run at a time has such a file
                    places[waiting[0]] = place
                    waiting.pop(0)
                time.sleep(_POLL_SECONDS)
                if stop:
                    raise StoppedError(stop[0])
                for run, process in list(active.items()):
                    if (code := process.poll()) is not None:
                        del active[run], places[run]
                        outcome = run.ended(code, keep_models=keep_models)
                        tracker.advance(1, _note(run))
                        if outcome.state != "finished":
                            reporter.say(f"{run.method}, {run.directory.name}: {outcome.state}: {outcome.reason}")
                tracker.advance(0, "; ".join(map(_note, active)))
        finally:
            for process in active.values():
                process.send_signal(signal.SIGTERM)
            for run, process in active.items():
                while process.poll() is None:
                    if len(stop) > 1:  # asked twice
                        process.kill()
                    time.sleep(_POLL_SECONDS)
                if process.returncode == 0:
                    run.ended(0, keep_models=keep_models)


class StoppedError(Exception):
    """A signal asked the comparison to stop; ``signum``: which."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def _note(run: Run) -> str:
    done = run.steps_done()
    where = f"{run.method} {run.directory.name}"
    if not done:
        return f"{where}: starting"
    return f"{where}: {len(done)}/{run.config.steps} steps, loss {done[-1]['loss']:.3f}"


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Signals that came, instead of their effect."""
    came: list[int] = []

    def take(signum: int, _frame: FrameType | None) -> None:
        came.append(signum)

    previous = {s: signal.signal(s, take) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
