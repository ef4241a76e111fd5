"""Fine-tune language models with forward passes alone: zeroth-order optimizers, query schedules, tensor-train adapters."""

from zo_opt.adapters import TTConfig, get_adapter_model, load_adapter_model, trainable_parameters
from zo_opt.errors import NonFiniteLossError, ZOError
from zo_opt.optim import AdaZeta, MeZO

__version__ = "0.1.0"

__all__ = [
    "AdaZeta",
    "MeZO",
    "NonFiniteLossError",
    "TTConfig",
    "ZOError",
    "get_adapter_model",
    "load_adapter_model",
    "trainable_parameters",
]
