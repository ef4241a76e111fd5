"""Taking up a run again: its options, its checkpoint, and on top of that the steps that the journal and metrics.jsonl have beyond."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from zo_opt.adapters import AdapterModel
from zo_opt.errors import ZOError
from zo_opt.journal import NAME, Contents, Journal, read_journal
from zo_opt.journal.provenance import check_described, device_type, is_portable, tuned_names
from zo_opt.optim import Update, ZerothOrderOptimizer
from zo_opt.optim.first_order import FirstOrder
from zo_opt.record import checkpoint
from zo_opt.record.metrics import Line, read_lines
from zo_opt.record.output import RUN_NAME, never_begun
from zo_opt.record.progress import Reporter
from zo_opt.system.checksum import fingerprint
from zo_opt.training.config import TrainConfig
from zo_opt.training.evaluate_run import read_config, read_record

# What a resumed run can be told otherwise.
_ANEW = (
    "save_steps", "max_failed_steps", "report_to", "share", "rank_timeout", "rank_check_every", "prefix_cache_dir", "trust_remote_code",
)  # fmt: skip


def resumed_config(
    config: TrainConfig, given: Collection[str] | None, reporter: Reporter
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The options that the interrupted run was started with, save those that can be told otherwise and are; and its record.

    A run that was killed before its first step is begun anew, without a record.

    Args:
        config: the options given now.
        given: their names; those that differ from their defaults if None.
        reporter: told of what is damaged, or begins anew.

    Raises:
        ZOError: there is no run to resume, its files are damaged, or it was started with another value of an option given now.
    """
    directory = config.output_dir
    if directory is None:
        raise ZOError("--resume needs --output_dir, the directory of the interrupted run.")
    if given is None:
        given = [f.name for f in fields(TrainConfig) if getattr(config, f.name) != f.default]
    record: dict[str, Any] | None = None
    if begins := (directory / RUN_NAME).is_file() and never_begun(directory):
        saved = read_config(directory)
    else:
        path = checkpoint.newest(directory, reporter.say)
        record = checkpoint.read_state(path)["extra"].get("run")
        if record is None:  # of an earlier version
            saved, record = read_config(directory), read_record(directory)
        else:
            saved = _config_of(path, record)
    saved = replace(saved, trust_remote_code=False)  # a file may not allow itself to run code
    check_given(config, saved, given, (*_ANEW, "output_dir", "resume"))
    anew = {name: getattr(config, name) for name in _ANEW if name in given}
    if begins:
        reporter.say(f"the run in {directory} was stopped before its first step; it begins anew.")
    return replace(saved, resume=not begins, output_dir=directory, **anew), record


def check_given(now: Any, then: Any, given: Collection[str], free: Collection[str]) -> None:
    """Whether the options given with --resume are those of the run.

    Args:
        now: options as a dataclass.
        then: those that the run was started with.
        given: names of the options that were given.
        free: names of those that may be told otherwise.

    Raises:
        ZOError: one is another.
    """
    for name in (f.name for f in fields(now)):
        values = [getattr(options, name) for options in (now, then)]
        if name not in given or name in free or _absolute(values[0]) == _absolute(values[1]):
            continue
        shown = [str(value) if isinstance(value, Path) else repr(value) for value in values]
        raise ZOError(
            f"{name}={shown[0]} was given with --resume, and it was started with {shown[1]}; leave --{name} out, or start anew."
        )


def _absolute(value: Any) -> Any:
    return value.resolve() if isinstance(value, Path) else value


def _config_of(path: Path, record: dict[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.from_dict(record["config"])
    except (KeyError, TypeError) as error:
        raise ZOError(f"{path} was written by another version of zo_opt ({error}); resume with that one.") from error


@dataclass(frozen=True)
class Resumed:
    """Where a run stands.

    Attributes:
        extra: what the checkpoint has besides model and optimizer.
        steps: what metrics.jsonl says of the steps that were taken again from the journal, without a forward pass.
        journal: to go on with; None where the run keeps none.
    """

    extra: dict[str, Any]
    steps: list[dict[str, Any]]
    journal: Journal | None


def keeps_journal(optimizer: ZerothOrderOptimizer | FirstOrder, model: AdapterModel) -> bool:
    """Only what zeroth-order steps do to weights follows from a few numbers, and only where nothing else moves them."""
    return not isinstance(optimizer, FirstOrder) and model.schedule is None


def resume(
    path: Path,
    model: AdapterModel,
    optimizer: ZerothOrderOptimizer | FirstOrder,
    lr_scheduler: Any,
    say: Callable[[str], None],
) -> Resumed:
    """Bring model, optimizer and learning rate to where the run was killed, or as near to it as the records go.

    Args:
        path: the checkpoint.
        model: as at the start of the run.
        optimizer: as at the start of the run.
        lr_scheduler: as at the start of the run.
        say: told what cannot be used; those steps are done again.

    Raises:
        ZOError: the checkpoint is damaged or does not fit; or the journal is of another run.
    """
    extra = checkpoint.load_checkpoint(path, model, optimizer, lr_scheduler)
    journal_path = path.with_name(NAME)
    if isinstance(optimizer, FirstOrder) or not keeps_journal(optimizer, model):
        return Resumed(extra, [], None)
    if not journal_path.exists():
        say(f"{journal_path} is not there; the run goes on without a journal and cannot be replayed.")
        return Resumed(extra, [], None)
    contents, problem = _read(journal_path, optimizer.step_count)
    if contents is None:
        aside = journal_path.rename(journal_path.with_name(f"{NAME}.damaged"))
        say(f"{problem} It is now {aside.name}; the run goes on without a journal and cannot be replayed.")
        return Resumed(extra, [], None)
    steps = _Steps(journal_path, contents, model, optimizer, lr_scheduler)
    done, objection = steps.redo()
    if objection is not None:
        say(f"{objection}; steps after that are done again.")
    if not steps.verified():
        say(f"the steps in {journal_path} lead to other weights than those of training; they are done again.")
        extra, done = checkpoint.load_checkpoint(path, model, optimizer, lr_scheduler), []
    return Resumed(extra, done, Journal.open(journal_path, optimizer, model, cut=True))


def _read(path: Path, steps: int) -> tuple[Contents | None, str]:
    """The journal; or what is wrong with its first ``steps`` steps."""
    try:
        contents = read_journal(path, needed=steps)
    except ZOError as error:
        return None, str(error)
    if contents.steps < steps:
        return None, f"{path} ends after {contents.steps} steps, before the checkpoint after step {steps}."
    return contents, ""


class _Steps:
    """The steps on record beyond a checkpoint."""

    def __init__(
        self,
        path: Path,
        contents: Contents,
        model: AdapterModel,
        optimizer: ZerothOrderOptimizer,
        lr_scheduler: Any,
    ) -> None:
        self.model, self.optimizer, self.lr_scheduler = model, optimizer, lr_scheduler
        self.path, self.contents, self.first = path, contents, optimizer.step_count
        check_described(contents.header.optimizer, optimizer, model)
        self.lines = {line.values["step"]: line for line in read_lines(path.parent)}
        self._differs = False

    def redo(self) -> tuple[list[dict[str, Any]], str | None]:
        """Take the steps again, in order, as far as both records go; what they say, and why it ended before the journal does."""
        if (foreign := self._foreign()) is not None:
            return [], foreign
        done: list[dict[str, Any]] = []
        # The scheduler looks for a call of step(), which a redone step is not.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        for update in self.contents.updates[self.first - self.contents.start :]:
            line = self.lines.get(update.step)
            if line is None or not self._fits(update, line):
                if update.step + 1 == self.contents.steps:
                    break  # killed between the two records
                return done, f"metrics.jsonl has no whole line of step {update.step}"
            self.optimizer.redo(update, line.record(self.optimizer.history.forwards))
            self.lr_scheduler.step()
            done.append(line.values)
            recorded = self.contents.weights.get(self.optimizer.step_count)
            self._differs |= recorded not in (None, self._fingerprint())
        if self.contents.damaged is not None:
            return done, f"{self.path} is damaged in line {self.contents.damaged}, after step {self.contents.steps}"
        return done, None

    def verified(self) -> bool:
        """Whether the weights are those that the journal says, wherever it does."""
        return not self._differs

    def _fits(self, update: Update, line: Line) -> bool:
        lrs = self.lr_scheduler.get_last_lr()
        queries = len(line.values["projected_grads"])
        return list(update.lrs) == lrs and line.values["lr"] == lrs[0] and len(update.coefficients) in (0, queries)

    def _foreign(self) -> str | None:
        """Why this machine would make other weights of the same steps."""
        header, here = self.contents.header, f"{device_type(self.optimizer)} with torch {torch.__version__}"
        if header.machine == here or is_portable(header.optimizer) or self.contents.steps <= self.first:
            return None
        return f"{self.path} was written on {header.machine}, this is {here}"

    def _fingerprint(self) -> str:
        return fingerprint(tuned_names(self.optimizer, self.model))
