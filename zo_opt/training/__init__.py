"""Training on labelled rows: tasks and prompts, scoring, the loop behind the command line."""

from zo_opt.training.config import TrainConfig
from zo_opt.training.loop import train

__all__ = ["TrainConfig", "train"]
