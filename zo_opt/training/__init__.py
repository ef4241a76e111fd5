"""A run: its options, its parts put together, the loop behind the command line. Names are imported when they are first used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zo_opt.trainer import AdapterScheduleCallback, ZOArguments, ZOTrainer, ZOTrainerMixin, ZOTrainingArguments
    from zo_opt.training.config import TrainConfig
    from zo_opt.training.loop import train

__all__ = [
    "AdapterScheduleCallback",
    "TrainConfig",
    "ZOArguments",
    "ZOTrainer",
    "ZOTrainerMixin",
    "ZOTrainingArguments",
    "train",
]
_MODULES = {"TrainConfig": "zo_opt.training.config", "train": "zo_opt.training.loop"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES.get(name, "zo_opt.trainer")), name)
