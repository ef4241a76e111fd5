"""The Hugging Face Trainer, zeroth-order: a mixin, its arguments, and the callback that drives adapters which change."""

from zo_opt.trainer.arguments import ZOArguments, ZOTrainingArguments
from zo_opt.trainer.callback import AdapterScheduleCallback
from zo_opt.trainer.mixin import ZOTrainer, ZOTrainerMixin

__all__ = ["AdapterScheduleCallback", "ZOArguments", "ZOTrainer", "ZOTrainerMixin", "ZOTrainingArguments"]
