"""The loop behind ``zo-opt train``: evaluate, tune, evaluate, save, report."""

from __future__ import annotations

import signal
import time
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zo_opt.adapters.uses import Uses, uses_of
from zo_opt.distributed import meet, world_size
from zo_opt.errors import ZOError
from zo_opt.journal import NAME as JOURNAL_NAME
from zo_opt.journal import Journal
from zo_opt.optim import ZerothOrderOptimizer
from zo_opt.record import card, checkpoint, report
from zo_opt.record.metrics import MetricsWriter, step_values
from zo_opt.record.output import RESULTS_NAME, RUN_NAME, START_NAME, output_directory
from zo_opt.record.progress import Reporter
from zo_opt.record.summary import Progress, Summary
from zo_opt.record.trackers import Trackers, check_trackers
from zo_opt.system.files import write_atomically
from zo_opt.system.memory import current_memory, peak_memory, readable, reset_peak_memory
from zo_opt.tasks.evaluation import Evaluation, evaluate
from zo_opt.tasks.metrics import CLASSIFICATION
from zo_opt.training.config import TrainConfig
from zo_opt.training.curve import Curve
from zo_opt.training.examples import load_examples
from zo_opt.training.given import GivenRows
from zo_opt.training.private import make_privacy
from zo_opt.training.regression import regression_accuracy
from zo_opt.training.resume import keeps_journal, resume, resumed_config
from zo_opt.training.row_record import RowRecord, check_resumed
from zo_opt.training.run_record import default_directory, new_record, record_bytes
from zo_opt.training.setup import Tools, build_tools
from zo_opt.training.shown import show
from zo_opt.training.stepper import Stepper
from zo_opt.training.stop import InterruptedRunError, StopSignals
from zo_opt.training.summarise import summarise


def train(
    config: TrainConfig,
    reporter: Reporter,
    command: str,
    given: Collection[str] | None = None,
    rows: GivenRows | None = None,
) -> tuple[Summary, Path]:
    """One run from options to report; returns what it measured and where it wrote.

    Args:
        config: the options.
        reporter: told and shown what happens.
        command: the command line, for the record.
        given: of a resumed run: names of the options that were given, as in :func:`~zo_opt.training.resume.resumed_config`.
        rows: those given in Python, for which ``train_file`` is ``IN_PYTHON``.

    Raises:
        ZOError: a mistake in the options or files, or a full disk; what was written before is intact.
        NonFiniteLossError: training failed; the last checkpoint is intact.
        InterruptedRunError: SIGINT or SIGTERM; a checkpoint was left, unless no step was made yet.
    """
    record: dict[str, Any] | None = None
    if config.resume:
        config, record = resumed_config(config, given, reporter)
    config.check()
    meet()  # the other ranks have read what is changed from here on
    directory = config.output_dir or default_directory(config)
    unique = config.output_dir is None
    with StopSignals() as stop, output_directory(directory, resume=config.resume, unique=unique) as output_dir:
        try:
            examples = load_examples(config, reporter, rows)
            if record is not None:
                check_resumed(record, examples.record, f"the run in {output_dir}", reporter.say)
            tools = build_tools(config, examples, reporter)
            config = replace(config, steps=tools.steps)
            stepper = Stepper(config, tools, make_privacy(config, tools.train, reporter.say))
            reporter.say(f"{tools.model.trainable_summary()}, frozen base in {tools.precision} on {tools.device.type}")
            if tools.precision.startswith("mixed"):
                reporter.say(
                    "products are rounded to bf16: a row's scores move by some hundredths with its batch and with --prompt_cache, and a run "
                    "that differs in them ends elsewhere; --precision fp32 is free of it."
                )
            uses = uses_of(tools.model)
            reporter.say(uses.before())
            if record is None:
                shown = show(tools.train.scorer, tools.train.encoded[0], private=config.private)
                for line in shown.lines():
                    reporter.say(line)
                record = new_record(config, command, tools, examples.record) | {"shown": shown.to_plain()}
            run = _Run(config, reporter, record, examples.record, output_dir, tools, stepper, stop)
            run.prepare()
            summary = run.finish(uses)
            reporter.say(uses.after(str(output_dir), labels=examples.task.kind == CLASSIFICATION))
            return summary, output_dir
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
        rows: RowRecord,
        output_dir: Path,
        tools: Tools,
        stepper: Stepper,
        stop: StopSignals,
    ) -> None:
        self.config, self.reporter, self.record, self.output_dir = config, reporter, record, output_dir
        self.rows, self.tools, self.stepper, self.progress, self.stop = rows, tools, stepper, Progress(), stop
        self.optimizer = stepper.optimizer
        self.curve = Curve(config, tools, self.progress.curve, output_dir, reporter)
        self.done_before: list[dict[str, Any]] = []  # steps beyond the checkpoint that were not lost
        self._training = False

    def prepare(self) -> None:
        """Everything before the next step; of a new run, only at its end are files written, the checkpoint last."""
        start = time.monotonic()
        if self.config.resume:
            self._resume()
        self.tools.record_prompts(self.config, self.output_dir, self.reporter)
        if self.config.compile:
            self.tools.compile_model(self.reporter)
        if not self.config.resume:
            self.progress.before = self._evaluate("zero-shot evaluation").to_dict()
            self._regress()
            self._write_record()
            if keeps_journal(self.optimizer, self.tools.model):
                assert isinstance(self.optimizer, ZerothOrderOptimizer)
                self.tools.model.save_pretrained(self.output_dir / START_NAME)
                self.stepper.journal = Journal.create(self.output_dir / JOURNAL_NAME, self.optimizer, self.tools.model)
            self._save()
        meet()  # the other ranks start from the checkpoint
        self.progress.other_seconds += time.monotonic() - start

    def finish(self, uses: Uses) -> Summary:
        """Train, evaluate, save and report; ``uses``: what the outcome is good for."""
        self._restart_peak()
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
            trackers.log_evaluation(after.to_dict(), done := self.optimizer.step_count)
            kept = done
            if self.config.eval_steps is not None:
                self.curve.add(after, done, self.optimizer.history.forwards)
                kept = self.curve.restore_best(done)
                after = after if kept == done else self._evaluate(f"evaluation of the weights after step {kept}")
        finally:
            trackers.close()
        self.tools.close_cache(self.config, self.reporter)
        self.tools.model.save_pretrained(self.output_dir)
        self.progress.other_seconds += time.monotonic() - start
        beaten = self.progress.regression
        if beaten is not None and beaten > after.accuracy:
            self.reporter.say(
                f"logistic regression on the frozen model's hidden states is better on these rows: accuracy {beaten:.1%}."
            )
        summary = summarise(
            self.config,
            self.record["command"],
            self.tools,
            self.optimizer,
            self.progress,
            after,
            None if kept == done else kept,
        )
        card.write(self.output_dir, summary, self.record, uses)
        report.write(self.output_dir, summary)
        checkpoint.close(self.output_dir, goes_on=not self.config.private)
        return summary

    def _resume(self) -> None:
        """Back to where the run was: the checkpoint, and the steps on record beyond it."""
        path = checkpoint.newest(self.output_dir, lambda _: None)  # which was said already
        longer = self.record["config"]["steps"] != self.tools.steps
        resumed = resume(
            path, self.tools.model, self.optimizer, self.stepper.lr_scheduler, self.reporter.say, longer=longer
        )
        # If it is the one before, the damaged one must not take its place.
        path.replace(self.output_dir / checkpoint.NAME)
        self.progress, self.stepper.journal = Progress(**resumed.extra["progress"]), resumed.journal
        self.curve.points = self.progress.curve
        self.done_before = resumed.steps
        done, again = self.optimizer.step_count, len(resumed.steps)
        for line in resumed.steps:
            self.progress.smooth(line["loss"])
            self.progress.train_seconds = line["seconds"]
        split = f" ({done - again} of them in the checkpoint, {again} from the journal)" if again else ""
        self.reporter.say(f"resuming after step {done} of {self.tools.steps}{split}")
        if longer:
            self._go_on()
        elif done == self.tools.steps:
            self.reporter.say(f"the run is at its end; --steps of more than {done} goes on beyond it.")
        self._write_record()  # in case it was lost or damaged
        if again and (world_size() > 1 or done % self.config.save_steps == 0 or done == self.tools.steps):
            self._save()  # as the killed run was about to

    def _go_on(self) -> None:
        """To other steps than the run was started with: what it left as its outcome stands no longer."""
        done, steps, before = self.optimizer.step_count, self.tools.steps, self.stepper.lr
        if self.curve.exhausted:
            raise ZOError(
                f"the run ended after {self.config.patience} evaluations that brought nothing better; give a larger --patience beside --steps."
            )
        self.stepper.relearn()
        (self.output_dir / RESULTS_NAME).unlink(missing_ok=True)
        went_on = [*self.record.get("went_on", []), {"after_step": done, "steps": steps}]
        self.record |= {"config": replace(self.config, resume=False).to_dict(), "went_on": went_on}
        self._save()
        self.reporter.say(
            f"it goes on to step {steps}; from here on its learning rate is that of a run of {steps} steps ({self.config.lr_schedule}): "
            f"{before:.3g} becomes {self.stepper.lr:.3g}"
        )

    def _write_record(self) -> None:
        """run.json: the checkpoints' record, and each training row's hash besides."""
        write_atomically(self.output_dir / RUN_NAME, record_bytes(self.record, self.rows))

    def _evaluate(self, what: str) -> Evaluation:
        with self.reporter.track(what, len(self.tools.held_out), "rows") as tracker:
            result = evaluate(self.tools.model, self.tools.held_out, self.config.eval_batch_size, tracker.advance)
        self.reporter.say(f"{what}: {result.describe()}")
        return result

    def _regress(self) -> None:
        """What is to be beaten: adapters start without effect, so that the model is its frozen base here."""
        tools, config = self.tools, self.config
        if not config.private:
            self.progress.regression = regression_accuracy(
                tools.model, tools.train, tools.held_out, config.eval_batch_size
            )
        if self.progress.regression is not None:
            self.reporter.say(
                f"logistic regression on the frozen model's hidden states: accuracy {self.progress.regression:.1%}"
            )

    def _train(self, trackers: Trackers) -> None:
        config, optimizer, stepper = self.config, self.optimizer, self.stepper
        offset = self.progress.train_seconds
        start = time.monotonic()
        metrics = MetricsWriter(self.output_dir, keep_steps=optimizer.step_count)
        done = optimizer.step_count
        tracked = self.reporter.track("training", self.tools.steps, "steps", done)
        with metrics, stepper.journal or nullcontext(), self.stop.held(), tracked as tracker:
            if (
                self.curve.points and self.curve.points[-1]["step"] == done
            ):  # whose line was cut off with what came after it
                metrics.write_evaluation(self.curve.points[-1])
            while optimizer.step_count < self.tools.steps:
                if self.curve.due(done):
                    start += self._look(metrics, trackers)
                if self.curve.exhausted:
                    self.reporter.say(
                        f"nothing better in {config.patience} evaluations: the run ends after step {done}."
                    )
                    break
                lr = stepper.lr
                with torch.no_grad():
                    penalty = self.tools.model.penalty()
                stepper.step(self.stop)
                self.progress.train_seconds = offset + time.monotonic() - start
                record = optimizer.last_record
                assert record is not None
                if penalty is not None:  # the task's loss is what can be compared
                    record = replace(record, loss=record.loss - float(penalty))
                metrics.write(record, lr, optimizer.history, self.progress.train_seconds)
                trackers.log_step(step_values(record, lr, optimizer.history, self.progress.train_seconds))
                tracker.advance(1, self._note(record.loss, record.queries))
                done = optimizer.step_count
                stopping = stepper.ending(self.stop)
                if stopping is not None or done % config.save_steps == 0 or done == self.tools.steps:
                    metrics.sync()
                    self._save()
                if stopping is not None:
                    meet()  # what ends before may have this process ended by its launcher
                    raise InterruptedRunError(self.output_dir, stopping, after=f" after step {done}")

    def _look(self, metrics: MetricsWriter, trackers: Trackers) -> float:
        """Evaluate on the way; a checkpoint makes it last. Returns the seconds that it took."""
        start, step = time.monotonic(), self.optimizer.step_count
        found = self.curve.measure(step, self.optimizer.history.forwards)
        metrics.write_evaluation(self.curve.points[-1])
        trackers.log_evaluation(found.to_dict(), step)
        metrics.sync()
        self._save()
        seconds = time.monotonic() - start
        self.progress.other_seconds += seconds
        return seconds

    def _save(self) -> None:
        """The journal first: what a checkpoint has done must be on record. What writing takes is not counted as training's memory."""
        self._note_peak()
        if self.stepper.journal is not None:
            self.stepper.journal.seal()
        extra = {"progress": vars(self.progress), "run": self.record}
        path = self.output_dir / checkpoint.NAME
        checkpoint.save_checkpoint(path, self.tools.model, self.optimizer, self.stepper.lr_scheduler, extra)
        self._restart_peak()

    def _restart_peak(self) -> None:
        """The peak so far is kept; from here on it is measured anew."""
        device = self.tools.device
        self.progress.peak_memory = max(self.progress.peak_memory, peak_memory(device))
        reset_peak_memory(device)

    def _note_peak(self) -> None:
        if self._training:
            seen = peak_memory(self.tools.device)
            self.progress.train_peak_memory = max(self.progress.train_peak_memory, seen)

    def _note(self, loss: float, queries: int) -> str:
        forwards, memory = self.optimizer.history.forwards, readable(current_memory(self.tools.device))
        note = f"loss {self.progress.smooth(loss):.3f}  queries {queries}  forwards {forwards}  memory {memory}"
        dropped = self.optimizer.dropped_queries
        return note + (f"  dropped {dropped}" if dropped else "")
