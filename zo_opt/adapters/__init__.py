"""Adapters: one small file a method, one table (ADAPTERS), one injector, one save and load."""

from zo_opt.adapters.config import ADAPTERS, AdapterConfig
from zo_opt.adapters.model import AdapterModel, get_adapter_model, load_adapter_model, trainable_parameters
from zo_opt.adapters.tt import TTConfig

__all__ = [
    "ADAPTERS",
    "AdapterConfig",
    "AdapterModel",
    "TTConfig",
    "get_adapter_model",
    "load_adapter_model",
    "trainable_parameters",
]
