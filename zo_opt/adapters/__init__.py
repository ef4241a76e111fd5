"""Adapters: one small file a method, one table (ADAPTERS), one injector, one save and load."""

from zo_opt.adapters.config import ADAPTERS, AdapterConfig, make_config
from zo_opt.adapters.model import AdapterModel, get_adapter_model, load_adapter_model, trainable_parameters
from zo_opt.adapters.rank_pattern import search_rank_pattern
from zo_opt.adapters.tt import TTConfig
from zo_opt.adapters.tt_delta import TTDeltaConfig
from zo_opt.adapters.tt_lora import TTLoRAConfig

__all__ = [
    "ADAPTERS",
    "AdapterConfig",
    "AdapterModel",
    "TTConfig",
    "TTDeltaConfig",
    "TTLoRAConfig",
    "get_adapter_model",
    "load_adapter_model",
    "make_config",
    "search_rank_pattern",
    "trainable_parameters",
]
