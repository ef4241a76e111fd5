"""Taking up a run again: its options, its checkpoint, and on top of that the steps that the journal and metrics.jsonl have beyond."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from zo_opt.adapters import AdapterModel
from zo_opt.errors import ZOError
from zo_opt.journal import NAME, Contents, Journal, read_journal
from zo_opt.journal.provenance import check_described, here_in_words, tuned_names
from zo_opt.optim import CountingOptimizer, Update, ZerothOrderOptimizer, redo
from zo_opt.record import checkpoint
from zo_opt.record.metrics import Line, read_lines
from zo_opt.record.output import RUN_NAME, never_begun
from zo_opt.record.progress import Reporter
from zo_opt.training.config import TrainConfig
from zo_opt.training.parsing import own_code
from zo_opt.training.run_record import config_of, read_record

# What a resumed run can be told otherwise; beside it its steps (:func:`_longer`).
_ANEW = (
    "patience", "save_steps", "max_failed_steps", "report_to", "share", "rank_timeout", "rank_check_every", "prompt_cache_dir",
    "trust_remote_code",
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
        ZOError: there is no run to resume, its files are damaged, it was started with another value of an option given now, or cannot
            have other steps than it has.
    """
    directory = config.output_dir
    if directory is None:
        raise ZOError("--resume needs --output_dir, the directory of the interrupted run.")
    if given is None:
        given = config.given()
    allowed: Any = {"trust_remote_code": config.trust_remote_code, "named": own_code(config.to_dict())}
    record: dict[str, Any] | None = None
    if begins := (directory / RUN_NAME).is_file() and never_begun(directory):
        saved = config_of(read_record(directory), directory / RUN_NAME, **allowed)
    else:
        path = checkpoint.newest(directory, reporter.say)
        record = checkpoint.read_state(path)["extra"].get("run")
        saved = config_of(record, path, **allowed)
    longer = not begins and "steps" in given and config.steps not in (None, saved.steps)
    check_given(config, saved, given, (*_ANEW, "output_dir", "resume", *(["steps"] if longer else [])))
    anew = {name: getattr(config, name) for name in _ANEW if name in given}
    if longer:
        anew |= _longer(config, saved, checkpoint.step_of(path))
    if begins:
        reporter.say(f"the run in {directory} was stopped before its first step; it begins anew.")
        anew["steps"] = (
            saved.steps if (saved.budget_forwards or saved.epochs) is None else TrainConfig.steps
        )  # found anew
    return replace(saved, resume=not begins, output_dir=directory, **anew), record


def _longer(config: TrainConfig, saved: TrainConfig, done: int) -> dict[str, Any]:
    """The options of a run that goes on to other steps than it was started with, ``done`` of which are made.

    Raises:
        ZOError: they are made already, or the run is of a kind that was laid out for its own.
    """
    steps = config.steps
    assert steps is not None
    bound = {
        "privacy, whose noise was": saved.private,
        f"adapter {saved.adapter_name!r}, whose phases were": hasattr(saved.make_adapter(), "total_steps"),
    }
    for what, is_bound in bound.items():
        if is_bound:
            raise ZOError(
                f"steps={steps} was given with --resume, and the run has {what} laid out for {saved.steps}; start anew with "
                "another --output_dir."
            )
    if steps <= done:
        raise ZOError(
            f"steps={steps} was given with --resume, and the run has taken {done}; give more, or leave --steps out."
        )
    return {"steps": steps, "epochs": None, "budget_forwards": None}


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
        if name not in given or name in free or _agree(*values):
            continue
        shown = [str(value) if isinstance(value, Path) else repr(value) for value in values]
        raise ZOError(
            f"{name}={shown[0]} was given with --resume, and it was started with {shown[1]}; leave --{name} out, or start anew."
        )


def _agree(now: Any, then: Any) -> bool:
    """Whether a value given is the run's; of a part, its name and the options given."""
    if isinstance(now, Path) and isinstance(then, Path):
        return now.resolve() == then.resolve()
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        return now.items() <= then.items()
    return bool(now == then)


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


def keeps_journal(optimizer: CountingOptimizer, model: AdapterModel) -> bool:
    """Only what zeroth-order steps do to weights follows from a few numbers, and only where nothing else moves them."""
    if not isinstance(optimizer, ZerothOrderOptimizer) or optimizer.own_directions:
        return False
    return not optimizer.choices.estimator.gives_gradient and model.schedule is None


def resume(
    path: Path,
    model: AdapterModel,
    optimizer: CountingOptimizer,
    lr_scheduler: Any,
    say: Callable[[str], None],
    *,
    longer: bool = False,
) -> Resumed:
    """Bring model, optimizer and learning rate to where the run was killed, or as near to it as the records go.

    Args:
        path: the checkpoint.
        model: as at the start of the run.
        optimizer: as at the start of the run.
        lr_scheduler: as at the start of the run.
        say: told what cannot be used; those steps are done again.
        longer: the run is to have other steps than it had when its records were made.

    Raises:
        ZOError: the checkpoint is damaged or does not fit; the journal is of another run; or a longer run has steps beyond the checkpoint,
            which were made at other learning rates.
    """
    extra = checkpoint.load_checkpoint(path, model, optimizer, lr_scheduler)
    if not isinstance(optimizer, ZerothOrderOptimizer) or not keeps_journal(optimizer, model):
        return Resumed(extra, [], None)
    journal_path = path.with_name(NAME)
    contents, problem = _read(journal_path, optimizer.step_count)
    if contents is None:
        say(f"{problem} The run goes on without a journal and cannot be replayed.")
        return Resumed(extra, [], None)
    if longer and contents.steps > optimizer.step_count:
        raise ZOError(
            f"the run was killed after step {contents.steps}, and its checkpoint is of step {optimizer.step_count}; resume it without --steps "
            "first, to its end or until Ctrl-C stops it, then give --steps."
        )
    done, objection = _redo(contents, journal_path, model, optimizer, lr_scheduler)
    if done is None:
        extra, done = checkpoint.load_checkpoint(path, model, optimizer, lr_scheduler), []
    if objection is not None:
        say(f"{objection}; steps after step {optimizer.step_count} are done again.")
    return Resumed(extra, done, Journal.open(journal_path, optimizer, model, cut=True))


def _read(path: Path, steps: int) -> tuple[Contents | None, str]:
    """The journal; or what is wrong with its first ``steps`` steps, and it is put aside."""
    if not path.exists():
        return None, f"{path} is not there."
    try:
        contents = read_journal(path, needed=steps)
        if contents.steps >= steps:
            return contents, ""
        problem = f"{path} ends after {contents.steps} steps, before the checkpoint after step {steps}."
    except ZOError as error:
        problem = str(error)
    aside = path.rename(path.with_name(f"{NAME}.damaged"))
    return None, f"{problem} It is now {aside.name}."


def _redo(
    contents: Contents, path: Path, model: AdapterModel, optimizer: ZerothOrderOptimizer, lr_scheduler: Any
) -> tuple[list[dict[str, Any]] | None, str | None]:
    """Take the steps beyond the checkpoint again, in order, as far as journal and metrics.jsonl go.

    Returns what metrics.jsonl says of them (None if they lead to other weights than the journal's), and why it ended before the
    journal does.
    """
    header, here = contents.header, here_in_words(optimizer)
    check_described(header.optimizer, optimizer, model)
    updates = contents.updates[optimizer.step_count - contents.start :]
    if updates and header.machine != here and not header.optimizer["portable"]:
        return [], f"{path} was written on {header.machine}, this is {here}"
    lines = {line.values["step"]: line for line in read_lines(path.parent)}
    done: list[dict[str, Any]] = []
    # The scheduler looks for a call of step(), which a redone step is not.
    optimizer._opt_called = True  # type: ignore[attr-defined]
    for update in updates:
        line = lines.get(update.step)
        if line is None or not _fits(update, line, lr_scheduler.get_last_lr()):
            if update.step + 1 == contents.steps:
                break  # killed between the two records
            return done, f"metrics.jsonl has no whole line of step {update.step}"
        redo(optimizer, update, line.record(optimizer.history))
        lr_scheduler.step()
        done.append(line.values)
        if contents.differs(optimizer.step_count, tuned_names(optimizer, model)):
            return None, f"the steps in {path} lead to other weights than those of training"
    if contents.damaged is not None:
        return done, f"{path} is damaged in line {contents.damaged}, after step {contents.steps}"
    return done, None


def _fits(update: Update, line: Line, lrs: list[float]) -> bool:
    """Whether both records are of one step, at the learning rates that this run has there."""
    queries = len(line.values["projected_grads"])
    return list(update.lrs) == lrs and line.values["lr"] == lrs[0] and len(update.coefficients) in (0, queries)
