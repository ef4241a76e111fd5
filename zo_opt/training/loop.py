"""The loop behind ``zo-opt train``: evaluate, tune, evaluate, save, report."""

from __future__ import annotations

import json
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from zo_opt.adapters import AdapterModel, trainable_parameters
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
from zo_opt.training.evaluate_run import RUN_NAME, read_config, read_record
from zo_opt.training.evaluation import Evaluation, Prepared, evaluate
from zo_opt.training.first_order import FirstOrder
from zo_opt.training.metrics import MetricsWriter
from zo_opt.training.prefix_store import FILE_NAME
from zo_opt.training.progress import Reporter
from zo_opt.training.setup import Tools, build_tools, load_examples

START_NAME = "start"  # the adapter as training began: what the journal is replayed on


class InterruptedRunError(RuntimeError):
    """The run was asked to stop and left a checkpoint; ``exit_code`` is 128 + the signal."""

    def __init__(self, output_dir: Path, signum: int, *, after: str = "", command: str = "train") -> None:
        super().__init__(f"stopped{after}; continue with: zo-opt {command} --output_dir {output_dir} --resume")
        self.exit_code = 128 + signum


@dataclass
class Progress:
    """What a run has measured so far; saved in every checkpoint."""

    before: dict[str, Any] = field(default_factory=dict)
    train_seconds: float = 0.0
    other_seconds: float = 0.0
    loss: float | None = None  # running mean, for the progress bar
    peak_memory: int = 0  # of everything before training
    train_peak_memory: int = 0

    def smooth(self, loss: float) -> float:
        """Update the running mean of the loss with one step's (non-finite ones are skipped)."""
        if isfinite(loss):
            self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        return self.loss if self.loss is not None else loss


def train(config: TrainConfig, reporter: Reporter, command: str) -> tuple[report.Summary, Path]:
    """One run from options to report; returns what it measured and where it wrote.

    Raises:
        ZOError: a mistake in the options or files; nothing was overwritten.
        NonFiniteLossError: training failed; the last checkpoint is intact.
        InterruptedRunError: SIGINT or SIGTERM; a checkpoint was left.
    """
    if config.resume:
        config = _resumed_config(config)
    config.check()
    with output_directory(config.output_dir or _default_directory(config), resume=config.resume) as output_dir:
        examples = load_examples(config, reporter)
        tools = build_tools(config, examples, reporter)
        order = BatchOrder(tools.train.labels, config.batch_size, config.seed, config.batch_order)
        params = make_param_groups(config, tools.model, tools.recipe.lr)
        optimizer = make_optimizer(config, tools.model, params, tools.recipe.lr, order.steps_per_epoch)
        reporter.say(f"{tools.model.trainable_summary()}, frozen base in {tools.precision} on {tools.device.type}")
        if config.resume:
            command = read_record(output_dir)["command"]
        run = _Run(config, reporter, command, output_dir, tools, optimizer, order)
        run.prepare()
    return run.finish(), output_dir


class _Run:
    """One run's state; ``go`` takes it from start (or checkpoint) to report."""

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter,
        command: str,
        output_dir: Path,
        tools: Tools,
        optimizer: ZerothOrderOptimizer | FirstOrder,
        order: BatchOrder,
    ) -> None:
        from transformers import get_scheduler

        self.config, self.reporter, self.command, self.output_dir = config, reporter, command, output_dir
        self.tools, self.optimizer, self.progress = tools, optimizer, Progress()
        scheduled = optimizer.adamw if isinstance(optimizer, FirstOrder) else optimizer
        self.lr_scheduler = get_scheduler(config.lr_schedule, scheduled, config.warmup_steps, config.steps)
        self.order = order
        self.journal: Journal | None = None
        self._training = False

    def prepare(self) -> None:
        """Everything before the first step (or from the checkpoint on); only at its end are files written."""
        start = time.monotonic()
        if self.config.resume:
            extra = checkpoint.load_checkpoint(
                self.checkpoint_path, self.tools.model, self.optimizer, self.lr_scheduler
            )
            self.progress = Progress(**extra)
            self._reopen_journal()
            self.reporter.say(f"resuming after step {self.optimizer.step_count} of {self.config.steps}")
        self.tools.record_prefixes(self.config, self.output_dir, self.reporter)
        if not self.config.resume:
            self.tools.place_adapters(self.config, self.reporter)
        if self.config.compile:
            self.tools.compile_model(self.reporter)
        if not self.config.resume:
            self.progress.before = self._evaluate("zero-shot evaluation").to_dict()
            record = {
                "command": self.command,
                "config": self.config.to_dict(),
                "resolved": {"precision": self.tools.precision, "labels": len(self.tools.train.scorer.task.labels)},
                "versions": versions(),
                "started": _now(),
            }
            self._start_journal()
            self._save()
            write_atomically(self.output_dir / RUN_NAME, (json.dumps(record, indent=2) + "\n").encode())
        self.progress.other_seconds += time.monotonic() - start

    def finish(self) -> report.Summary:
        """Train, evaluate, save and report."""
        device = self.tools.device
        self.progress.peak_memory = max(self.progress.peak_memory, peak_memory(device))
        reset_peak_memory(device)
        self._training = True
        self._train()
        self._note_peak()
        self._training = False
        start = time.monotonic()
        try:
            after = self._evaluate("evaluation")
        except KeyboardInterrupt:
            raise self._interrupted(signal.SIGINT) from None
        self.tools.close_cache(self.config, self.reporter)
        self.tools.model.save_pretrained(self.output_dir)
        self.progress.other_seconds += time.monotonic() - start
        summary = self._summary(after)
        report.write(self.output_dir, summary)
        self.checkpoint_path.unlink(missing_ok=True)
        return summary

    def _interrupted(self, signum: int) -> InterruptedRunError:
        return InterruptedRunError(self.output_dir, signum, after=f" after step {self.optimizer.step_count}")

    @property
    def checkpoint_path(self) -> Path:
        return self.output_dir / checkpoint.NAME

    def _evaluate(self, what: str) -> Evaluation:
        with self.reporter.track(what, len(self.tools.held_out), "rows") as tracker:
            result = evaluate(self.tools.model, self.tools.held_out, self.config.eval_batch_size, tracker.advance)
        self.reporter.say(f"{what}: {result.describe()}")
        return result

    def _train(self) -> None:
        config, optimizer, prepared = self.config, self.optimizer, self.tools.train
        model: AdapterModel = self.tools.model
        offset = self.progress.train_seconds
        start = time.monotonic()
        metrics = MetricsWriter(self.output_dir, keep_steps=optimizer.step_count)
        done = optimizer.step_count
        tracked = self.reporter.track("training", config.steps, "steps", done)
        with metrics, self.journal or nullcontext(), _stop_signals() as stop, tracked as tracker:
            while optimizer.step_count < config.steps:
                batch = prepared.batch(self.order.indices(optimizer.step_count))
                lr = self.lr_scheduler.get_last_lr()[0]
                with torch.no_grad():
                    penalty = model.penalty()
                optimizer.step(lambda b: training_loss(model, prepared, b), batch)
                self._advance_adapter()
                self.lr_scheduler.step()
                self.progress.train_seconds = offset + time.monotonic() - start
                record = optimizer.last_record
                assert record is not None
                if penalty is not None:  # the task's loss is what can be compared
                    record = replace(record, loss=record.loss - float(penalty))
                metrics.write(record, lr, optimizer.history, self.progress.train_seconds)
                tracker.advance(1, self._note(record.loss, record.queries))
                done = optimizer.step_count
                if done % config.save_steps == 0 or done == config.steps:
                    self._save()
                if stop.signum is not None:
                    self._save()
                    raise self._interrupted(stop.signum)

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

    def _start_journal(self) -> None:
        """Only what zeroth-order steps do to weights follows from a few numbers, and only where nothing else moves them."""
        if isinstance(self.optimizer, FirstOrder) or self.tools.model.schedule is not None:
            return
        self.tools.model.save_pretrained(self.output_dir / START_NAME)
        self.journal = Journal.create(self.output_dir / JOURNAL_NAME, self.optimizer, self.tools.model)

    def _reopen_journal(self) -> None:
        """Steps beyond the checkpoint are done again, to the same bits, and recorded again."""
        if isinstance(self.optimizer, FirstOrder) or self.tools.model.schedule is not None:
            return
        path = self.output_dir / JOURNAL_NAME
        if path.exists():
            self.journal = Journal.open(path, self.optimizer, self.tools.model, cut=True)
        else:
            self.reporter.say(f"{path} is not there; the run goes on without a journal and cannot be replayed.")

    def _save(self) -> None:
        """The journal first: what a checkpoint has done must be on record. What writing takes is not counted as training's memory."""
        self._note_peak()
        if self.journal is not None:
            self.journal.seal()
        checkpoint.save_checkpoint(
            self.checkpoint_path, self.tools.model, self.optimizer, self.lr_scheduler, vars(self.progress)
        )
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

    def _summary(self, after: Evaluation) -> report.Summary:
        tools, cache = self.tools, self.tools.cache
        depth = (cache.depth - cache.cut) / cache.depth if cache is not None else 1.0
        trainable = sum(p.numel() for p in trainable_parameters(tools.model))
        moving = tools.model.schedule.moving() if tools.model.schedule is not None else None
        return report.Summary(
            command=self.command,
            model=self.config.model_name_or_path,
            kind=tools.train.scorer.task.kind,
            metric=after.primary,
            task=self.config.task if self.config.train_file is None else str(self.config.train_file),
            optimizer=self.config.optimizer,
            adapter=tools.model.trainable_summary(),
            trainable=trainable,
            trainable_end=trainable if moving is None else moving,
            lr=tools.recipe.lr,
            before=Evaluation.from_dict(self.progress.before),
            after=after,
            train_rows=len(tools.train),
            steps=self.optimizer.step_count,
            queries=self.optimizer.history.queries,
            forwards=self.optimizer.history.forwards,
            forward_depth=depth,
            prepared_rows=cache.recorded_examples if cache is not None else tools.placed_rows,
            cache_bytes=cache.store.bytes if cache is not None else 0,
            cache_place=cache.place if cache is not None else "off",
            dropped=self.optimizer.dropped_queries,
            truncated=tools.train.truncated + tools.held_out.truncated,
            train_seconds=self.progress.train_seconds,
            other_seconds=self.progress.other_seconds,
            peak_memory=max(self.progress.peak_memory, peak_memory(tools.device)),
            train_peak_memory=self.progress.train_peak_memory,
            adapter_bytes=sum(t.numel() * t.element_size() for t in tools.model.adapter_state().values()),
            device=tools.device.type,
            precision=tools.precision,
            batch_size=self.config.batch_size,
            versions=versions(),
        )


def training_loss(model: AdapterModel, prepared: Prepared, batch: Any) -> Tensor:
    """The loss that is trained: the task's, and what the adapter adds to it."""
    loss, penalty = prepared.loss(model, batch), model.penalty()
    return loss if penalty is None else loss + penalty


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import version

    packages = ("zo-opt", "torch", "transformers", "tensorly", "numpy", "scikit-learn", "rouge-score")
    return {"python": platform.python_version()} | {p: version(p) for p in packages}


@dataclass
class _Stop:
    signum: int | None = None


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM asks the loop to stop after the step; a second one stops at once."""
    stop = _Stop()

    def ask(signum: int, _frame: FrameType | None) -> None:
        if stop.signum is not None:
            raise KeyboardInterrupt
        stop.signum = signum

    try:
        previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are somebody else's
        yield stop
        return
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def output_directory(directory: Path, what: str = "output_dir", *, resume: bool = False) -> Iterator[Path]:
    """Create a directory to write to; remove it again if the work inside fails before anything was written.

    Raises:
        ZOError: it cannot be written, or is not empty (and nothing is to be resumed); ``what``: its name in that sentence.
    """
    try:
        created = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        # Hidden states that a run kept on disk before it was stopped at its start are no obstacle: they are taken up again.
        occupied = any(path.name != FILE_NAME for path in directory.iterdir())
        (probe := directory / ".writable").write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ZOError(f"{what} {directory} cannot be written ({error.strerror}); give a directory that can.") from error
    if occupied and not resume:
        to_resume = ", or --resume to continue the run in it" if what == "output_dir" else ""
        raise ZOError(f"{what} {directory} is not empty; give a new one{to_resume}.")
    try:
        yield directory
    except BaseException:
        if created and not any(directory.iterdir()):
            directory.rmdir()
        raise


def _default_directory(config: TrainConfig) -> Path:
    task = config.task if config.train_file is None else config.train_file.stem
    return Path("runs") / f"{task}-{config.optimizer}-{_now().replace(':', '')}"


def _resumed_config(config: TrainConfig) -> TrainConfig:
    """The options that the interrupted run was started with; of those given now only save_steps counts."""
    if config.output_dir is None:
        raise ZOError("--resume needs --output_dir, the directory of the interrupted run.")
    checkpoint.read_state(config.output_dir / checkpoint.NAME)
    saved = read_config(config.output_dir)
    return replace(saved, resume=True, output_dir=config.output_dir, save_steps=config.save_steps)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")[:19]
