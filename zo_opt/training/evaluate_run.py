"""Evaluation of a finished run: its adapter on its held-out rows, or on others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zo_opt.adapters import load_adapter_model
from zo_opt.errors import ZOError
from zo_opt.models.models import load_model
from zo_opt.record.output import RUN_NAME
from zo_opt.record.progress import Reporter
from zo_opt.system.plain_json import read_object
from zo_opt.tasks.evaluation import Evaluation, Prepared, evaluate
from zo_opt.tasks.rows import check_text, make_examples, read_rows
from zo_opt.training.config import TrainConfig
from zo_opt.training.examples import Examples, load_examples, recorded_task
from zo_opt.training.parsing import own_code
from zo_opt.training.row_record import RowRecord, say_of_held_out
from zo_opt.training.setup import load_base


def read_config(run_dir: Path, *, trust_remote_code: bool = False) -> TrainConfig:
    """The options that a run was started with, save ``trust_remote_code``: no file may allow itself to run code.

    Raises:
        ZOError: the directory holds no readable run.json, or it names code that nobody allowed.
    """
    return config_of(read_record(run_dir), run_dir / RUN_NAME, trust_remote_code=trust_remote_code)


def config_of(
    record: dict[str, Any], path: Path, *, trust_remote_code: bool = False, named: Collection[str] = ()
) -> TrainConfig:
    """The options in a run's record.

    Args:
        record: the record.
        path: where it is, for sentences.
        trust_remote_code: whether code that the record names may run.
        named: code of the user's own that was named on the command line, too.

    Raises:
        ZOError: they are none that this version has, or name code that nobody allowed.
    """
    try:
        check_allowed(own_code(record["config"]) - set(named), path, trust_remote_code=trust_remote_code)
        return replace(TrainConfig.from_dict(record["config"]), trust_remote_code=trust_remote_code)
    except ZOError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZOError(
            f"{path} is damaged, or of another version of zo_opt ({error}); give the output_dir of a run of zo-opt train, and "
            "resume with the version that began it."
        ) from error


def check_allowed(strange: Collection[str], path: Path, *, trust_remote_code: bool) -> None:
    """Whether code outside zo_opt that a file names may run.

    Raises:
        ZOError: nobody allowed it.
    """
    if strange and not trust_remote_code:
        raise ZOError(
            f"{path} names code outside zo_opt ({', '.join(sorted(strange))}); give the option again, or --trust_remote_code to let it run."
        )


def read_record(run_dir: Path) -> dict[str, Any]:
    """What run.json says: command, config, versions, start.

    Raises:
        ZOError: the directory holds no readable run.json, or one of something else.
    """
    record = read_object(run_dir / RUN_NAME, "give the output_dir of a run of zo-opt train")
    if not isinstance(record.get("config"), dict) or not isinstance(record.get("resolved", {}), dict):
        raise ZOError(f"{run_dir / RUN_NAME} is missing its config; give the output_dir of a run of zo-opt train.")
    return record


def load_plain_base(config: TrainConfig, resolved: Mapping[str, Any], reporter: Reporter) -> tuple[Any, Any]:
    """A run's base model in the checkpoint's own dtype, and its tokenizer: the run's precision is a form for running, not for keeping."""
    return load_model(
        config.model_name_or_path,
        head=config.head,
        labels=resolved.get("labels", 2),
        trust_remote_code=config.trust_remote_code,
        say=reporter.say,
    )


def evaluate_run(
    run_dir: Path, eval_file: Path | None, zero_shot: bool, reporter: Reporter, *, trust_remote_code: bool = False
) -> Evaluation:
    """Metrics and loss of a run's model.

    Args:
        run_dir: the run's output_dir.
        eval_file: other rows with the run's columns; the run's held-out rows if None.
        zero_shot: leave the adapter out.
        reporter: shows progress.
        trust_remote_code: let the base model's own Python code run, whatever the run was started with.
    """
    record = read_record(run_dir)
    config = config_of(record, run_dir / RUN_NAME, trust_remote_code=trust_remote_code)
    if eval_file is not None and config.train_file is None:
        raise ZOError(
            "this run was made on built-in rows; eval_file needs a run with train_file, whose columns it shares."
        )
    examples = evaluated_examples(config, record, eval_file, reporter)
    base = load_base(config, examples.task, reporter)
    model = base.model
    if not zero_shot:
        model = load_adapter_model(model, run_dir)
    model.to(base.device).eval()
    prepared = Prepared(examples.held_out, base.scorer, base.device, None, trained_on=examples.trained_on)
    with reporter.track("evaluation", len(prepared), "rows") as tracker:
        return evaluate(model, prepared, config.eval_batch_size, tracker.advance)


def evaluated_examples(
    config: TrainConfig, record: Mapping[str, Any], eval_file: Path | None, reporter: Reporter
) -> Examples:
    """The rows that a finished run is evaluated on, without its training rows; these are read only where rows are cut from them.

    Args:
        config: the run's options.
        record: the run's record.
        eval_file: other rows; the run's held-out ones if None.
        reporter: told what is known of them.

    Raises:
        ZOError: the run's held-out rows are no longer what they were; or rows cannot be read.
    """
    then = RowRecord.from_plain(record.get("rows"))
    path = eval_file or (None if config.validation else config.eval_file)
    task = recorded_task(config, record.get("resolved", {}))
    if then is None:
        reporter.say(
            "this run has no record of its rows, being of an earlier version; which it was trained on is not known for sure."
        )
    if path is None or task is None:
        changed = config if eval_file is None else replace(config, eval_file=eval_file, validation=False)
        examples = load_examples(changed, reporter)
    else:
        held_out = make_examples(read_rows(path), task, str(path))
        check_text(held_out, task, str(path))
        trained_on = None if then is None else then.trained_on_of(held_out, task)
        examples = Examples(task, [], held_out, trained_on)
        say_of_held_out(len(held_out), trained_on, reporter.say)
    if then is None:
        return examples
    if eval_file is None:
        now = RowRecord.of(examples.task, examples.train, examples.held_out, private=config.private)
        then.check(now, "this run", training=False)
        return replace(examples, trained_on=then.trained_on)
    return replace(examples, trained_on=then.trained_on_of(examples.held_out, examples.task))
