"""Options that another option leaves nothing to do: they are refused, so that nobody believes in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zo_opt.errors import ZOError
from zo_opt.training.options import WHOLE_MODEL

if TYPE_CHECKING:
    from zo_opt.training.config import TrainConfig


def check_heeded(config: TrainConfig) -> None:
    """Whether something looks at every option that was given.

    Raises:
        ZOError: beside another option, nothing does.
    """
    no_privacy = (not config.private, "without privacy_epsilon or privacy_noise; add one of them, or leave it out")
    no_rows = (config.rows_name is None, "without train_file; give both, or neither for the built-in rows")
    no_data_set = (config.dataset is None, "without dataset; give both, or a file's own name")
    no_evaluations = (config.eval_steps is None, "without eval_steps; give both, or leave it out")
    unheeded: dict[str, tuple[bool, str]] = {  # option -> whether it is, and what to say then
        "steps": (
            (config.budget_forwards or config.epochs) is not None and not config.resume,  # a run under way has both
            f"with {'epochs' if config.budget_forwards is None else 'budget_forwards'}, from which the steps follow; leave one out",
        ),
        "epochs": (config.budget_forwards is not None, "with budget_forwards; leave one out"),
        "keep": no_evaluations,
        "patience": no_evaluations,
        "eval_file": no_rows,
        "train_file": (config.dataset is not None, "with dataset; leave one out"),
        "dataset_config": no_data_set,
        "split": no_data_set,
        "eval_split": no_data_set
        if config.dataset is None
        else (config.eval_file is not None, "with eval_file; leave one out"),
        "column_names": (
            config.train_file is None,
            "without train_file, a .csv or .tsv file that has no header line; leave it out",
        ),
        "target_column": no_rows,
        "label_column": no_rows,
        "optional_columns": no_rows,
        "verbalizers": (
            config.head == "classification",
            "with head='classification', whose labels need no words; leave one out",
        ),
        "task": (
            config.target_column is not None,
            "with target_column, which makes a task of its own; leave one out",
        ),
        "held_out": (
            (config.eval_file or config.eval_split) is not None and not config.validation,
            f"with {'eval_split' if config.eval_file is None else 'eval_file'}, whose rows are held out; leave one out, or add --validation",
        ),
        "precision": (
            config.precision == "mixed" and config.adapter_name in WHOLE_MODEL,
            f"with adapter {config.adapter_name!r}, which trains the model's own weights in fp32; leave it out",
        ),
        "prompt_cache_dir": (
            config.prompt_cache != "disk",
            f"with prompt_cache={config.prompt_cache!r}; add --prompt_cache disk, or leave it out",
        ),
        "prompt_cache_mb": (
            config.prompt_cache == "off" and config.prompt_cache_mb > 0,
            "with prompt_cache='off'; leave one out",
        ),
        "loraplus_lr_embedding": (
            config.loraplus_lr_ratio is None,
            "without loraplus_lr_ratio; give both, or leave it out",
        ),
        "privacy_delta": no_privacy,
        "privacy_clip": no_privacy,
    }
    given = config.given()
    for name, (is_so, why) in unheeded.items():
        if is_so and name in given:
            raise ZOError(f"{name} was given {why}.")
