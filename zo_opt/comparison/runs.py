"""A run of ``zo-opt train`` in a process of its own: started or taken up again, judged at its end, read."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from zo_opt.errors import ZOError
from zo_opt.record import checkpoint, metrics
from zo_opt.record.output import RESULTS_NAME, writer
from zo_opt.system.files import write_atomically
from zo_opt.system.plain_json import is_number, read_object
from zo_opt.tasks.metrics import METRICS
from zo_opt.training.config import TrainConfig
from zo_opt.training.parsing import own_code

RISE = 2.0  # [choice] how far the training loss may rise above its start before a run counts as diverged
_DIVERGED = "training failed"  # what the command line says of losses that are not finite
_AGAIN = "delete it and resume: the run is made again"
_WEIGHTS = (
    "adapter_model.safetensors", "adapter_schedule.safetensors", checkpoint.NAME, checkpoint.PREVIOUS_NAME,
    "journal", "journal.damaged", "start", "tensorboard",
)  # fmt: skip
_LARGEST = 1e150  # number in results.json that is computed with, which squares it
_NUMBERS = (
    "lr", "batch_size", "trainable", "trainable_end", "adapter_bytes", "train_peak_memory", "steps", "forwards",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "finished", "diverged" (no finite loss any more, or one that rose a lot) or "failed", and why."""

    state: str
    reason: str = ""


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

    def _beside(self, kind: str) -> Path:
        return self.directory.with_name(f"{self.directory.name}.{kind}")  # a learning rate's name has dots in it

    def outcome(self) -> Outcome | None:
        """How it ended; None if it has not."""
        path = self._beside("json")
        if not path.is_file():
            return None
        values = read_object(path, _AGAIN)
        if values.keys() != {"state", "reason"} or not all(isinstance(value, str) for value in values.values()):
            raise ZOError(f"{path} is damaged (it says no state and reason); {_AGAIN}.")
        outcome = Outcome(**values)
        lost = outcome.state == "finished" and not (self.directory / RESULTS_NAME).is_file()
        return None if lost else outcome

    def results(self) -> dict[str, Any] | None:
        """What it measured; None if it did not come to its end."""
        path = self.directory / RESULTS_NAME
        if not path.is_file():
            return None
        results = read_object(path, _AGAIN)
        if not _is_whole(results):
            raise ZOError(f"{path} is damaged (it lacks what a run measures); {_AGAIN}.")
        return results

    def steps_done(self) -> list[dict[str, Any]]:
        """Its steps so far, as in metrics.jsonl."""
        return metrics.read_metrics(self.directory)

    def forget_failure(self) -> None:
        """Let it be tried again if it failed; one that diverged would do so again."""
        outcome = self.outcome()
        if outcome is not None and outcome.state == "failed":
            self._beside("json").unlink()

    def start(self, threads: int, prefixes: Path) -> psutil.Popen:
        """Begin it, or go on from its checkpoint.

        Args:
            threads: of its process.
            prefixes: where a cache on disk is, which runs before it may have filled.

        Raises:
            ZOError: a process that outlived an earlier comparison is still at it.
        """
        if (process := writer(self.directory)) is not None:
            raise ZOError(
                f"{self.directory} is still being written by {process}, of an earlier comparison; wait for its end, then resume."
            )
        resume = any((self.directory / name).is_file() for name in (checkpoint.NAME, checkpoint.PREVIOUS_NAME))
        if not resume and self.directory.exists():  # it was stopped before its first checkpoint
            shutil.rmtree(self.directory)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        options, config = self._beside("yaml"), self.config
        if resume:  # with its own options; but the cache on disk that it had may be another run's by now
            given = ["--output_dir", str(self.directory), "--resume"]
            given += ["--trust_remote_code"] * config.trust_remote_code
            known = read_object(options, _AGAIN) if options.is_file() else {}
            if own_code(known):  # named again, it may run
                given = ["--config", str(options), *given]
            if config.prompt_cache_dir is None and "prompt_cache_dir" in known:
                given += ["--prompt_cache_dir", str(prefixes)]
        else:
            if config.prompt_cache == "disk" and config.prompt_cache_dir is None:
                config = replace(config, prompt_cache_dir=prefixes)
            options.write_text(json.dumps(config.given(), indent=1), encoding="utf-8")
            given = ["--config", str(options)]
        command = [sys.executable, "-m", "zo_opt.cli.main", "train", *given]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with self.log.open("ab") as log:
            return psutil.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,  # Ctrl-C reaches it through us, once
            )  # fmt: skip

    def ended(self, code: int, *, keep_models: bool) -> Outcome:
        """Take down how it ended."""
        outcome = self._how(code)
        if not keep_models and outcome.state != "failed":  # which can go on from its checkpoint
            for path in (self.directory / name for name in _WEIGHTS):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write_atomically(self._beside("json"), json.dumps(vars(outcome)).encode())
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
        try:
            results = self.results()
        except ZOError as error:  # which ends no other run
            return Outcome("failed", str(error))
        # A dropped step alone is no divergence.
        curve = [s["loss"] for s in self.steps_done() if math.isfinite(s["loss"])]
        if results is None or results["after"]["loss"] is None or not curve:
            return Outcome("diverged", "the held-out loss is not finite after training")
        tenth = math.ceil(len(curve) / 10)
        first, last_loss = (sum(part) / tenth for part in (curve[:tenth], curve[-tenth:]))
        if not last_loss <= RISE * max(first, results["before"]["loss"] or 0.0):
            return Outcome("diverged", f"the training loss went from {first:.3g} to {last_loss:.3g}")
        return Outcome("finished")


def _is_whole(results: dict[str, Any]) -> bool:
    """Whether results.json has all that a comparison looks at, each of its kind."""
    try:
        metric, before, after = results["metric"], results["before"], results["after"]
        scores, weights = after["row_scores"], after.get("row_weights")
        losses = [before["loss"], after["loss"]]
        return (
            metric in METRICS
            and all(is_number(results[name], most=_LARGEST) for name in _NUMBERS)
            and all(is_number(loss, null=True, most=_LARGEST) for loss in losses)
            and all(is_number(side[metric], null=True) for side in (before, after))
            and isinstance(scores, list)
            and len(scores) > 0
            and all(is_number(score, null=True, most=_LARGEST) for score in scores)
            and (weights is None or len(weights) == len(scores))
            and all(is_number(weight, most=_LARGEST) and weight > 0 for weight in weights or ())
        )
    except (KeyError, TypeError, AttributeError):
        return False
