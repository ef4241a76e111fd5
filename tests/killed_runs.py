"""A tiny job that is killed with SIGKILL at random instants and resumed, until it ends; every attempt is a fork of this process."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked_runs import ForkedRun

import zo_opt.cli.status
import zo_opt.cli.train
import zo_opt.record.report  # noqa: F401 (imported once, for all forks)
from zo_opt.errors import ZOError
from zo_opt.journal import read_journal
from zo_opt.record import checkpoint, metrics


@dataclass
class Tally:
    """What was seen.

    Attributes:
        phases: where kills hit: "before the first step", "training", "ending" (all steps done), "missed" (it had ended).
        redone: steps that a kill cost and that were made again, over all kills.
        failures: what went wrong, in words.
    """

    phases: Counter[str] = field(default_factory=Counter)
    redone: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.phases.values()) - self.phases["missed"]


def start(line: Sequence[str], log: Path, prepare: Callable[[], Any] = lambda: None) -> ForkedRun:
    """``zo-opt`` in a process of its own, its words in a file; ``prepare`` is called in it first."""
    with log.open("wb") as file:
        return ForkedRun(["python", "-m", "zo_opt.cli.main", *line], stdout=file, env={}, preexec_fn=prepare)


def finish(line: Sequence[str], log: Path, prepare: Callable[[], Any] = lambda: None) -> tuple[int, str]:
    """Exit code and words of a run that is left alone."""
    code = start(line, log, prepare).wait()
    return code, log.read_text()


def kill_until_done(
    line: Sequence[str],
    directory: Path,
    rng: random.Random,
    seconds: tuple[float, float],
    kills: int,
    tally: Tally,
    *,
    journal: bool,
    prepare: Callable[[], Any] = lambda: None,
) -> None:
    """Run a job, kill it so many times, resume it each time, and let it end.

    Of four instants one is uniform over an attempt from its first instruction on, three are uniform over a share of the training, from
    where that begins or goes on; the share is such that the kills together reach a little beyond the end.

    Args:
        line: the command of a fresh start; writes to ``directory``.
        directory: the run's.
        rng: chooses the instants.
        seconds: that a whole run takes, and its training.
        kills: how many.
        tally: counts.
        journal: whether the run keeps one, so that no recorded step may be lost.
        prepare: called in every process first.
    """
    log = directory.with_name("log")
    resume = ["train", "--output_dir", str(directory), "--resume"]
    attempt: Sequence[str] = line
    recorded = 0
    for number in range(kills + 1):
        process = start(attempt, log, prepare)
        if number < kills:
            if rng.random() < 0.25:
                time.sleep(rng.uniform(0, seconds[0] - seconds[1]))
            else:
                _wait_for_training(process, directory, log, resumed=attempt is resume)
                time.sleep(rng.uniform(0, 2.5 * seconds[1] / kills))
            process.kill()
        code, said = process.wait(), log.read_text()
        found = re.search(r"resuming after step (\d+)", said)
        if found is not None and journal and int(found[1]) != recorded:
            tally.failures.append(f"{recorded} steps were on record, resumed after {found[1]}")
        if code == 0:
            tally.phases["missed"] += number < kills
            return
        if number == kills or code != -9:
            tally.failures.append(f"exit code {code}: {said[-500:]}")
            return
        has_checkpoint = (directory / checkpoint.NAME).exists()
        if not has_checkpoint and (directory / "results.json").exists():
            tally.phases["ending"] += 1  # between the last file and the end of the process
            return
        attempt = resume if has_checkpoint else line
        recorded, started = _recorded(directory, journal) if has_checkpoint else (0, 0)
        tally.redone += started - recorded
        if started - recorded > 1:
            tally.failures.append(f"{started} steps were begun and {recorded} recorded")
        total = int(line[line.index("--steps") + 1])
        phase = "training" if recorded < total else "ending"
        tally.phases[phase if has_checkpoint else "before the first step"] += 1


def _wait_for_training(process: ForkedRun, directory: Path, log: Path, *, resumed: bool) -> None:
    while process.poll() is None:
        if "resuming after" in log.read_text() if resumed else (directory / checkpoint.NAME).exists():
            return
        time.sleep(0.002)


def differences(run: Path, whole: Path, *, journal: bool) -> list[str]:
    """In which files a resumed run differs from an uninterrupted one; seconds are not looked at."""
    found = [
        name
        for name in ("adapter_model.safetensors", *(["journal"] if journal else []))
        if not _same_bytes(run / name, whole / name)
    ]
    if _steps(run) != _steps(whole):
        found.append(metrics.NAME)
    if _results(run) != _results(whole):
        found.append("results.json")
    names = [{path.name for path in directory.iterdir()} for directory in (run, whole)]
    return found + sorted(names[0] ^ names[1])


def _recorded(directory: Path, journal: bool) -> tuple[int, int]:
    """Steps that a resumed run must not make again, and those of which anything is on record."""
    lines = len(metrics.read_lines(directory))
    if not journal:
        done = checkpoint.step_of(directory / checkpoint.NAME)
        return done, done
    try:
        steps = read_journal(directory / "journal").steps
    except ZOError:
        steps = -1
    return min(lines, steps), max(lines, steps)


def _same_bytes(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()


def _steps(directory: Path) -> list[dict[str, Any]]:
    return [{k: repr(v) for k, v in line.items() if k != "seconds"} for line in metrics.read_metrics(directory)]


def _results(directory: Path) -> dict[str, Any]:
    found = json.loads((directory / "results.json").read_text()) if (directory / "results.json").exists() else {}
    return {k: found.get(k) for k in ("before", "after", "steps", "queries", "forwards", "dropped")}
