"""Training on labelled rows: tasks and prompts, scoring, the loop behind the command line; and the Hugging Face Trainer.

The Trainer's names are imported when they are first used: with them comes all that ``transformers.Trainer`` needs.
"""

from typing import TYPE_CHECKING, Any

from zo_opt.training.config import TrainConfig
from zo_opt.training.loop import train

if TYPE_CHECKING:
    from zo_opt.trainer import (
        AdapterScheduleCallback,
        ZOArguments,
        ZOTrainer,
        ZOTrainerMixin,
        ZOTrainingArguments,
    )

__all__ = [
    "AdapterScheduleCallback",
    "TrainConfig",
    "ZOArguments",
    "ZOTrainer",
    "ZOTrainerMixin",
    "ZOTrainingArguments",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from zo_opt import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
