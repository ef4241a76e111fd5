"""A comparison from options to table and pictures."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from zo_opt.comparison import output
from zo_opt.comparison.config import CompareConfig, own_methods
from zo_opt.comparison.fitting import Sizes, fitting_batch, sizes_of
from zo_opt.comparison.lr_search import best_lr, lr_grid, model_parameters
from zo_opt.comparison.options import SECONDS_PROBE_STEPS, check, check_heeded, plain, recorded, run_config
from zo_opt.comparison.results import Row, step_seconds, summarise, unlearned
from zo_opt.comparison.runs import Run
from zo_opt.comparison.supervisor import run_all
from zo_opt.errors import ZOError
from zo_opt.models.models import pick_device
from zo_opt.record.output import output_directory
from zo_opt.record.progress import Reporter
from zo_opt.system.files import write_atomically
from zo_opt.system.memory import parse_bytes
from zo_opt.system.plain_json import read_object
from zo_opt.training.budget import steps_of
from zo_opt.training.config import TrainConfig
from zo_opt.training.examples import load_examples
from zo_opt.training.parsing import own_code
from zo_opt.training.resume import check_given
from zo_opt.training.row_record import check_resumed
from zo_opt.training.run_record import check_allowed
from zo_opt.training.stop import InterruptedRunError

RECORD_NAME = "compare.json"


def compare(
    options: CompareConfig, base: TrainConfig, reporter: Reporter, command: str, given: Collection[str]
) -> tuple[list[Row], Path]:
    """Run every method with every seed at one budget; returns the table's rows and where everything is.

    Args:
        options: of the comparison.
        base: of all its runs.
        reporter: told and shown what happens.
        command: the command line, for the record.
        given: names of the options that were given; a resumed comparison has no others than it was started with.

    Raises:
        ZOError: a mistake in the options or files; nothing was overwritten.
        InterruptedRunError: SIGINT or SIGTERM; the runs under way left checkpoints.
    """
    if options.resume:
        options, base, command = resumed_options(options, base, given)
    pairings = check(options)
    check_heeded(base, pairings)
    for pairing in pairings:
        try:
            run_config(base, pairing, validation=options.lr_trials > 0).check()
        except ZOError as error:
            raise ZOError(f"method {pairing.name}: {error}") from error
    directory = options.output_dir or Path("runs") / f"compare-{datetime.now():%Y%m%d-%H%M%S}"
    with output_directory(directory, resume=options.resume, unique=options.output_dir is None) as directory:
        record = {"command": command, "options": plain(options), "base": base.to_dict()}
        if base.prompt_cache == TrainConfig.prompt_cache and pick_device(base.device).type == "cpu":
            base = replace(base, prompt_cache="disk")  # computed once for all runs, read as fast as from memory
        examples = load_examples(base, reporter)
        if options.resume:
            before = read_object(directory / RECORD_NAME, "give the output_dir of a zo-opt compare")
            check_resumed(before, examples.record, f"the comparison in {directory}", reporter.say)
        record["rows"] = examples.record.to_plain(each=False)
        sizes = sizes_of(base, examples) if options.budget_memory is not None else None
        comparison = _Comparison(options, base, sizes, directory, reporter)
        configs = {pairing.name: replace(run_config(base, pairing), lr=options.lr) for pairing in pairings}
        for config in configs.values():  # can every method make a step?
            for forwards in (options.forwards, options.trial_forwards):
                steps_of(replace(config, budget_forwards=forwards), len(examples.train))
        write_atomically(directory / RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())
        try:
            return comparison.run(configs, command), directory
        except KeyboardInterrupt as request:
            signum = getattr(request, "signum", signal.SIGINT)
            raise InterruptedRunError(directory, signum, command="compare") from None


def resumed_options(
    options: CompareConfig, base: TrainConfig, given: Collection[str]
) -> tuple[CompareConfig, TrainConfig, str]:
    """What the comparison in output_dir was started with, save what can be told otherwise; and its command line.

    Raises:
        ZOError: there is none, its record is damaged, or another value of an option is given now.
    """
    if options.output_dir is None:
        raise ZOError("resume needs output_dir, the directory of the comparison to go on with.")
    path = options.output_dir / RECORD_NAME
    record = read_object(path, "give the output_dir of a zo-opt compare")
    try:
        strange = own_methods(record["options"]["methods"]) | own_code(record["base"])
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    named = own_methods(options.methods) | own_code(base.to_dict())
    check_allowed(strange - named, path, trust_remote_code=base.trust_remote_code)
    try:
        saved, saved_base = recorded(record["options"], record["base"])
        command = str(record["command"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # ZOError among them
        raise _damaged(path, error) from error
    check_given(options, saved, given, ("output_dir", "resume", "jobs"))
    check_given(base, saved_base, given, ("output_dir", "resume", "trust_remote_code"))
    jobs = options.jobs if "jobs" in given else saved.jobs
    saved = replace(saved, output_dir=options.output_dir, resume=True, jobs=jobs)
    return saved, replace(saved_base, trust_remote_code=base.trust_remote_code), command


def _damaged(path: Path, error: Exception) -> ZOError:
    return ZOError(f"{path} is damaged ({error}); give the output_dir of a zo-opt compare.")


@dataclass
class _Comparison:
    """Configs of methods, by name, on their way to a table; ``left_out``: rows of methods that are not run at the whole budget."""

    options: CompareConfig
    base: TrainConfig
    sizes: Sizes | None
    directory: Path
    reporter: Reporter
    left_out: dict[str, Row] = field(default_factory=dict)

    def run(self, configs: dict[str, TrainConfig], command: str) -> list[Row]:
        """Batches, learning rates, runs, table."""
        names = list(configs)
        configs = self._with_batches(configs)
        configs, trials = self._with_lrs(configs)
        if (forwards := self.options.forwards) is None:
            configs = self._within_seconds(configs)
        else:
            configs = {name: replace(config, budget_forwards=forwards) for name, config in configs.items()}
        runs = {
            name: [self._run("runs", name, f"seed-{s}", replace(config, seed=s)) for s in self.options.seed_list]
            for name, config in configs.items()
        }
        try:  # one seed of all methods after another
            self._make([run for of_seed in zip(*runs.values(), strict=True) for run in of_seed], "comparing")
        finally:
            table = [self.left_out.get(n) or summarise(n, runs[n], trials.get(n, ())) for n in names]
            output.write(self.directory, table, runs, command, self.base)
        shutil.rmtree(self._prefixes, ignore_errors=True)
        return table

    def _with_batches(self, configs: dict[str, TrainConfig]) -> dict[str, TrainConfig]:
        """The largest ones whose step fits in the memory budget."""
        if (budget := self.options.budget_memory) is None:
            return configs
        assert self.sizes is not None
        fitting = {}
        for name, config in configs.items():
            try:
                batch_size = fitting_batch(config, self.sizes, parse_bytes(budget))
            except (ZOError, RuntimeError) as error:
                self.left_out[name] = Row(name, "failed", f"its memory is not known: {error}", 0)
                continue
            if batch_size is not None:
                fitting[name] = replace(config, batch_size=batch_size)
            else:
                reason = f"a step on one row is predicted to take more than {budget}"
                self.left_out[name] = Row(name, "does not fit", reason, 0)
        return fitting

    def _with_lrs(self, configs: dict[str, TrainConfig]) -> tuple[dict[str, TrainConfig], dict[str, list[Run]]]:
        """The learning rates that did best, each method's on its own grid; and the trials."""
        if not self.options.lr_trials:
            return configs, {}
        parameters = model_parameters(self.base)
        changes: dict[str, Any] = {"validation": True, "budget_forwards": self.options.trial_forwards}
        trials = {
            name: [
                self._run("lr", name, f"{lr:.3g}", replace(config, lr=lr, **changes))
                for lr in lr_grid(config, self.options.lr_trials, parameters)
            ]
            for name, config in configs.items()
        }
        self._make([run for runs in trials.values() for run in runs], "trying learning rates")
        lrs = {name: best_lr(runs) for name, runs in trials.items()}
        self.left_out |= {name: unlearned(name, trials[name]) for name, lr in lrs.items() if lr is None}
        return {name: replace(configs[name], lr=lr) for name, lr in lrs.items() if lr is not None}, trials

    def _within_seconds(self, configs: dict[str, TrainConfig]) -> dict[str, TrainConfig]:
        """Runs of as many forward passes as the budget buys at the speed of a few steps."""
        seconds = self.options.budget_seconds
        assert seconds is not None
        probes = {
            name: self._run(
                "speed", name, "probe", replace(config, steps=SECONDS_PROBE_STEPS, validation=True, held_out=8)
            )
            for name, config in configs.items()
        }
        self._make(list(probes.values()), "measuring seconds a step")
        found: dict[str, TrainConfig] = {}
        for name, config in configs.items():
            if not (curve := probes[name].steps_done()):
                found[name] = replace(config, steps=1)  # it will fail as its probe did
                continue
            steps = seconds / max(float(np.median(step_seconds(curve))), 1e-4)
            forwards = round(steps * curve[-1]["forwards"] / len(curve))
            found[name] = replace(config, budget_forwards=max(forwards, curve[0]["forwards"]))  # one step at least
        return found

    def _run(self, kind: str, method: str, name: str, config: TrainConfig) -> Run:
        directory = self.directory / kind / method.replace(":", "_") / name
        if config.eval_file is not None and not config.validation:  # held_out is of the trials alone
            config = replace(config, held_out=TrainConfig.held_out)
        return Run(method, replace(config, output_dir=directory))

    @property
    def _prefixes(self) -> Path:
        return self.directory / "prefixes"

    def _make(self, runs: Sequence[Run], what: str) -> None:
        run_all(
            runs, self.reporter, what, jobs=self.options.jobs, prefixes=self._prefixes,
            keep_models=self.options.keep_models, retry=self.options.resume,
        )  # fmt: skip
