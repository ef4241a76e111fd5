"""The loop behind ``zo-opt train``: evaluate, tune, evaluate, save, report."""

from __future__ import annotations

import json
import signal
import time
import uuid
from contextlib import nullcontext
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_opt.adapters import AdapterModel
from zo_opt.distributed import meet, world_size
from zo_opt.errors import ZOError
from zo_opt.files import write_atomically
from zo_opt.journal import NAME as JOURNAL_NAME
from zo_opt.journal import Journal
from zo_opt.memory import current_memory, peak_memory, readable, reset_peak_memory
from zo_opt.optim import ZerothOrderOptimizer
from zo_opt.training import checkpoint, report
from zo_opt.training.batches import BatchOrder
from zo_opt.training.build_optimizer import make_optimizer, make_param_groups
from zo_opt.training.config import TrainConfig
from zo_opt.training.evaluate_run import read_config, read_record
from zo_opt.training.evaluation import Evaluation, Prepared, evaluate
from zo_opt.training.first_order import FirstOrder
from zo_opt.training.metrics import MetricsWriter, step_values
from zo_opt.training.output import RUN_NAME, START_NAME, never_begun, output_directory
from zo_opt.training.private import PoissonOrder, make_privacy, private_step
from zo_opt.training.progress import Reporter
from zo_opt.training.resume import keeps_journal, resume
from zo_opt.training.setup import Tools, build_tools, load_examples
from zo_opt.training.stop import InterruptedRunError, StopSignals
from zo_opt.training.summary import Progress, summarise, versions
from zo_opt.training.trackers import Trackers, check_trackers

_ANEW = (
    "save_steps",
    "max_failed_steps",
    "report_to",
    "share",
    "trust_remote_code",
)  # what a resumed run can be told otherwise


def train(config: TrainConfig, reporter: Reporter, command: str) -> tuple[report.Summary, Path]:
    """One run from options to report; returns what it measured and where it wrote.

    Raises:
        ZOError: a mistake in the options or files, or a full disk; what was written before is intact.
        NonFiniteLossError: training failed; the last checkpoint is intact.
        InterruptedRunError: SIGINT or SIGTERM; a checkpoint was left, unless no step was made yet.
    """
    record: dict[str, Any] | None = None
    if config.resume:
        config, record = resumed_config(config, reporter)
    config.check()
    meet()  # the other ranks have read what is changed from here on
    directory = config.output_dir or _default_directory(config)
    unique = config.output_dir is None
    with StopSignals() as stop, output_directory(directory, resume=config.resume, unique=unique) as output_dir:
        try:
            examples = load_examples(config, reporter)
            tools = build_tools(config, examples, reporter)
            privacy = make_privacy(config, tools.train, reporter.say)
            order = BatchOrder(tools.train.labels, config.batch_size, config.seed, config.batch_order)
            order = order if privacy is None else PoissonOrder(privacy)
            params = make_param_groups(config, tools.model, tools.recipe.lr)
            optimizer = make_optimizer(config, tools.model, params, tools.recipe.lr, order.steps_per_epoch, privacy)
            reporter.say(f"{tools.model.trainable_summary()}, frozen base in {tools.precision} on {tools.device.type}")
            if record is None:
                record = _new_record(config, command, tools)
            run = _Run(config, reporter, record, output_dir, tools, optimizer, order, stop)
            run.prepare()
            return run.finish(), output_dir
        except KeyboardInterrupt as request:
            signum = getattr(request, "signum", signal.SIGINT)
            begun = (output_dir / checkpoint.NAME).exists()
            raise InterruptedRunError(output_dir, signum, begun=begun) from None


class _Run:
    """One run's state: ``prepare`` takes it to the first step (or to where it was killed), ``finish`` from there to the report."""

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter,
        record: dict[str, Any],
        output_dir: Path,
        tools: Tools,
        optimizer: ZerothOrderOptimizer | FirstOrder,
        order: BatchOrder,
        stop: StopSignals,
    ) -> None:
        from transformers import get_scheduler

        self.config, self.reporter, self.record, self.output_dir = config, reporter, record, output_dir
        self.tools, self.optimizer, self.progress, self.stop = tools, optimizer, Progress(), stop
        scheduled = optimizer.adamw if isinstance(optimizer, FirstOrder) else optimizer
        self.lr_scheduler = get_scheduler(config.lr_schedule, scheduled, config.warmup_steps, config.steps)
        self.order = order
        self.journal: Journal | None = None
        self.done_before: list[dict[str, Any]] = []  # steps beyond the checkpoint that were not lost
        self._training = False

    def prepare(self) -> None:
        """Everything before the next step; of a new run, only at its end are files written, the checkpoint last."""
        start = time.monotonic()
        if self.config.resume:
            self._resume()
        self.tools.record_prefixes(self.config, self.output_dir, self.reporter)
        if not self.config.resume:
            self.tools.place_adapters(self.config, self.reporter)
        if self.config.compile:
            self.tools.compile_model(self.reporter)
        if not self.config.resume:
            self.progress.before = self._evaluate("zero-shot evaluation").to_dict()
            self._write_record()
            if keeps_journal(self.optimizer, self.tools.model):
                assert not isinstance(self.optimizer, FirstOrder)
                self.tools.model.save_pretrained(self.output_dir / START_NAME)
                self.journal = Journal.create(self.output_dir / JOURNAL_NAME, self.optimizer, self.tools.model)
            self._save()
        meet()  # the other ranks start from the checkpoint
        self.progress.other_seconds += time.monotonic() - start

    def finish(self) -> report.Summary:
        """Train, evaluate, save and report."""
        device = self.tools.device
        self.progress.peak_memory = max(self.progress.peak_memory, peak_memory(device))
        reset_peak_memory(device)
        first = self.done_before[0]["step"] if self.done_before else self.optimizer.step_count
        trackers = Trackers(
            check_trackers(self.config.report_to), self.output_dir, self.config.to_dict(),
            self.record.get("id", "run"), first, self.reporter.say,
        )  # fmt: skip
        try:
            if first == 0:
                trackers.log_evaluation(self.progress.before, 0)
            for line in self.done_before:
                trackers.log_step(line)
            self._training = True
            self._train(trackers)
            self._note_peak()
            self._training = False
            start = time.monotonic()
            after = self._evaluate("evaluation")
            trackers.log_evaluation(after.to_dict(), self.optimizer.step_count)
        finally:
            trackers.close()
        self.tools.close_cache(self.config, self.reporter)
        self.tools.model.save_pretrained(self.output_dir)
        self.progress.other_seconds += time.monotonic() - start
        summary = summarise(
            self.config, self.record["command"], self.tools, self.optimizer, self.progress, after
        )  # fmt: skip
        report.write(self.output_dir, summary)
        checkpoint.remove(self.output_dir)
        return summary

    def _resume(self) -> None:
        """Back to where the run was: the checkpoint, and the steps on record beyond it."""
        path = checkpoint.newest(self.output_dir, lambda _: None)  # which was said already
        resumed = resume(path, self.tools.model, self.optimizer, self.lr_scheduler, self.reporter.say)
        path.replace(
            self.output_dir / checkpoint.NAME
        )  # if it is the one before, the damaged one must not take its place
        self.progress, self.journal = Progress(**resumed.extra["progress"]), resumed.journal
        self.done_before = resumed.steps
        done, again = self.optimizer.step_count, len(resumed.steps)
        for line in resumed.steps:
            self.progress.smooth(line["loss"])
            self.progress.train_seconds = line["seconds"]
        split = f" ({done - again} of them in the checkpoint, {again} from the journal)" if again else ""
        self.reporter.say(f"resuming after step {done} of {self.config.steps}{split}")
        self._write_record()  # in case it was lost or damaged
        if again and (world_size() > 1 or done % self.config.save_steps == 0 or done == self.config.steps):
            self._save()  # as the killed run was about to

    def _write_record(self) -> None:
        write_atomically(self.output_dir / RUN_NAME, (json.dumps(self.record, indent=2) + "\n").encode())

    def _evaluate(self, what: str) -> Evaluation:
        with self.reporter.track(what, len(self.tools.held_out), "rows") as tracker:
            result = evaluate(self.tools.model, self.tools.held_out, self.config.eval_batch_size, tracker.advance)
        self.reporter.say(f"{what}: {result.describe()}")
        return result

    def _train(self, trackers: Trackers) -> None:
        config, optimizer, prepared = self.config, self.optimizer, self.tools.train
        model: AdapterModel = self.tools.model
        ranks = None if isinstance(optimizer, FirstOrder) else optimizer.ranks
        offset = self.progress.train_seconds
        start = time.monotonic()
        metrics = MetricsWriter(self.output_dir, keep_steps=optimizer.step_count)
        done = optimizer.step_count
        tracked = self.reporter.track("training", config.steps, "steps", done)
        with metrics, self.journal or nullcontext(), self.stop.held(), tracked as tracker:
            while optimizer.step_count < config.steps:
                indices = self.order.indices(optimizer.step_count)
                lr = self.lr_scheduler.get_last_lr()[0]
                with torch.no_grad():
                    penalty = model.penalty()
                if isinstance(self.order, PoissonOrder):
                    assert not isinstance(optimizer, FirstOrder)
                    private_step(optimizer, model, prepared, indices)
                else:
                    batch = shared_batch(prepared, indices, optimizer)
                    if ranks is not None:
                        ranks.stop_wanted = self.stop.signum or 0
                    optimizer.step(lambda b: training_loss(model, prepared, b), batch)
                self._advance_adapter()
                self.lr_scheduler.step()
                self.progress.train_seconds = offset + time.monotonic() - start
                record = optimizer.last_record
                assert record is not None
                if penalty is not None:  # the task's loss is what can be compared
                    record = replace(record, loss=record.loss - float(penalty))
                metrics.write(record, lr, optimizer.history, self.progress.train_seconds)
                trackers.log_step(step_values(record, lr, optimizer.history, self.progress.train_seconds))
                tracker.advance(1, self._note(record.loss, record.queries))
                done = optimizer.step_count
                stopping = self.stop.signum if ranks is None else ranks.stop or None
                if stopping is not None or done % config.save_steps == 0 or done == config.steps:
                    metrics.sync()
                    self._save()
                if stopping is not None:
                    meet()  # what ends before may have this process ended by its launcher
                    raise InterruptedRunError(self.output_dir, stopping, after=f" after step {done}")

    def _advance_adapter(self) -> None:
        """What follows a step: on record, and what changes in the adapter as training goes on."""
        optimizer, model = self.optimizer, self.tools.model
        reads_grad = model.schedule is not None and model.schedule.needs_grad
        if not isinstance(optimizer, FirstOrder):
            if self.journal is not None:
                self.journal.append(optimizer.last_update)
            if reads_grad:
                optimizer.write_last_grad()  # zeros if the step was dropped
        elif optimizer.failed_steps and reads_grad:  # gradients of a dropped step are not finite
            optimizer.zero_grad()
            return
        model.step(optimizer.step_count - 1)
        optimizer.zero_grad()

    def _save(self) -> None:
        """The journal first: what a checkpoint has done must be on record. What writing takes is not counted as training's memory."""
        self._note_peak()
        if self.journal is not None:
            self.journal.seal()
        extra = {"progress": vars(self.progress), "run": self.record}
        path = self.output_dir / checkpoint.NAME
        checkpoint.save_checkpoint(path, self.tools.model, self.optimizer, self.lr_scheduler, extra)
        self.progress.peak_memory = max(self.progress.peak_memory, peak_memory(self.tools.device))
        reset_peak_memory(self.tools.device)

    def _note_peak(self) -> None:
        if self._training:
            seen = peak_memory(self.tools.device)
            self.progress.train_peak_memory = max(self.progress.train_peak_memory, seen)

    def _note(self, loss: float, queries: int) -> str:
        forwards, memory = self.optimizer.history.forwards, readable(current_memory(self.tools.device))
        note = f"loss {self.progress.smooth(loss):.3f}  queries {queries}  forwards {forwards}  memory {memory}"
        dropped = self.optimizer.dropped_queries
        return note + (f"  dropped {dropped}" if dropped else "")


def training_loss(model: AdapterModel, prepared: Prepared, batch: Any) -> Tensor:
    """The loss that is trained: the task's, and what the adapter adds to it."""
    loss, penalty = prepared.loss(model, batch), model.penalty()
    return loss if penalty is None else loss + penalty


def shared_batch(prepared: Prepared, indices: list[int], optimizer: ZerothOrderOptimizer | FirstOrder) -> Any:
    """A step's batch, or this rank's rows of it where ranks share them; a tensor of no rows if it has none."""
    if not isinstance(optimizer, FirstOrder) and optimizer.ranks is not None:
        indices = list(optimizer.ranks.rows(indices))
    return prepared.batch(indices) if indices else torch.empty(0)


def _new_record(config: TrainConfig, command: str, tools: Tools) -> dict[str, Any]:
    """What run.json says, and every checkpoint: how the run was made."""
    return {
        "id": uuid.uuid4().hex[:16],
        "command": command,
        "config": config.to_dict(),
        "resolved": {"precision": tools.precision, "labels": len(tools.train.scorer.task.labels)},
        "versions": versions(),
        "started": _now(),
    }


def resumed_config(config: TrainConfig, reporter: Reporter) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The options that the interrupted run was started with, save those of ``_ANEW`` that are given now; and its record.

    A run that was killed before its first step is begun anew, without a record.
    """
    directory = config.output_dir
    if directory is None:
        raise ZOError("--resume needs --output_dir, the directory of the interrupted run.")
    if (directory / RUN_NAME).is_file() and never_begun(directory):
        reporter.say(f"the run in {directory} was stopped before its first step; it begins anew.")
        saved = read_config(directory, trust_remote_code=config.trust_remote_code)
        return replace(saved, resume=False, output_dir=directory), None
    path = checkpoint.newest(directory, reporter.say)
    record = checkpoint.read_state(path)["extra"].get("run")
    if record is None:  # of an earlier version
        saved, record = read_config(directory), read_record(directory)
    else:
        saved = _config_of(path, record)
    saved = replace(saved, trust_remote_code=False)  # a file may not allow itself to run code
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    anew = {name: getattr(config, name) for name in _ANEW if getattr(config, name) != defaults[name]}
    return replace(saved, resume=True, output_dir=directory, **anew), record


def _config_of(path: Path, record: dict[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.from_dict(record["config"])
    except (KeyError, TypeError) as error:
        raise ZOError(f"{path} was written by another version of zo_opt ({error}); resume with that one.") from error


def _default_directory(config: TrainConfig) -> Path:
    task = config.task if config.train_file is None else config.train_file.stem
    return Path("runs") / f"{task}-{config.optimizer}-{_now().replace(':', '')}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")[:19]
