"""The Hugging Face Trainer, zeroth-order: a mixin, its arguments, and the callback that drives adapters which change."""

from zo_opt.training.trainer.arguments import ZOArguments, ZOTrainingArguments
from zo_opt.training.trainer.callback import AdapterScheduleCallback
from zo_opt.training.trainer.mixin import ZOTrainer, ZOTrainerMixin

__all__ = ["AdapterScheduleCallback", "ZOArguments", "ZOTrainer", "ZOTrainerMixin", "ZOTrainingArguments"]
