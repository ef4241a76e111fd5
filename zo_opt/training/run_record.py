"""What a finished run says of itself: the options and the task in its run.json."""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from zo_opt.adapters import AdapterModel, load_adapter_model
from zo_opt.errors import ZOError
from zo_opt.models.agreement import name_outputs
from zo_opt.models.models import load_model
from zo_opt.models.precision import set_precision
from zo_opt.record.output import RUN_NAME, START_NAME
from zo_opt.record.progress import Reporter
from zo_opt.record.summary import versions
from zo_opt.system.plain_json import read_object
from zo_opt.tasks.scoring import ClassificationScorer
from zo_opt.tasks.tasks import Task
from zo_opt.training.config import TrainConfig
from zo_opt.training.parsing import own_code
from zo_opt.training.row_record import RowRecord
from zo_opt.training.setup import Tools


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


def load_plain_base(
    config: TrainConfig, resolved: Mapping[str, Any], reporter: Reporter, form: str = "fp32"
) -> tuple[Any, Any]:
    """A run's base model in the checkpoint's own dtype, and its tokenizer: the run's precision is a form for running, not for keeping.

    ``form``: that which it will be brought into nevertheless, as of ``load_model``.
    """
    model, tokenizer = load_model(
        config.model_name_or_path,
        head=config.head,
        labels=resolved.get("labels", 2),
        trust_remote_code=config.trust_remote_code,
        form=form,
        say=reporter.say,
    )
    if names := resolved.get("outputs"):
        name_outputs(model, names)
    return model, tokenizer


def load_tuned(base: Any, directory: Path, reporter: Reporter) -> AdapterModel:
    """The base with a run's adapter in it; what it was trained on that this base is not is said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        model = load_adapter_model(base, directory)
    for warning in said:
        reporter.say(str(warning.message))
    return model


def load_start(
    directory: Path, config: TrainConfig, resolved: Mapping[str, Any], device: torch.device, reporter: Reporter
) -> AdapterModel:
    """The model as a run's training began, in the run's precision.

    Raises:
        ZOError: the base or the start cannot be read.
    """
    form = resolved.get("precision", config.precision)
    base, _ = load_plain_base(config, resolved, reporter, form if device.type == "cpu" else "fp32")
    set_precision(base, form, device)
    return load_tuned(base, directory / START_NAME, reporter).to(device).eval()


def task_in(record: Mapping[str, Any], path: Path) -> Task | None:
    """The task that a run learned, as its record has it; None in records of versions that did not keep it.

    Raises:
        ZOError: it is no task.
    """
    plain = record.get("resolved", {}).get("task")
    if plain is None:
        return None
    try:
        return Task.from_dict(plain)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ZOError(
            f"{path} is damaged, or of another version of zo_opt: it names no task ({error}); give the output_dir of a run of zo-opt train."
        ) from error


def new_record(config: TrainConfig, command: str, tools: Tools, rows: RowRecord) -> dict[str, Any]:
    """What run.json says, and every checkpoint: how the run was made."""
    scorer = tools.train.scorer
    return {
        "id": uuid.uuid4().hex[:16],
        "command": command,
        "config": config.to_dict(),
        "resolved": {"precision": tools.precision, "labels": len(scorer.task.labels), "task": scorer.task.to_dict()}
        | ({"outputs": scorer.names} if isinstance(scorer, ClassificationScorer) else {}),
        "rows": rows.to_plain(each=False),
        "versions": versions(),
        "started": _now(),
    }


def record_bytes(record: dict[str, Any], rows: RowRecord) -> bytes:
    """A record as run.json has it: each training row's hash besides."""
    whole = record | ({"rows": rows.to_plain(each=True)} if "rows" in record else {})
    return (json.dumps(whole, indent=2) + "\n").encode()


def default_directory(config: TrainConfig) -> Path:
    """Where a run goes that was not told where."""
    task = config.task if config.rows_name is None else Path(config.rows_name).stem.replace(" ", "-")
    return Path("runs") / f"{task}-{config.optimizer_name}-{_now().replace(':', '')}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")[:19]
