"""Adapters: one small file a method, one table (ADAPTERS), one injector, one save and load."""

from zo_opt.adapters.adalora import AdaLoRAConfig
from zo_opt.adapters.aflora import AFLoRAConfig
from zo_opt.adapters.bitfit import BitFitConfig
from zo_opt.adapters.bottleneck import BottleneckConfig
from zo_opt.adapters.config import ADAPTERS, AdapterConfig, make_config
from zo_opt.adapters.dora import DoRAConfig
from zo_opt.adapters.full import FullConfig
from zo_opt.adapters.lamda import LaMDAConfig
from zo_opt.adapters.lamda_pp import LaMDAPlusPlusConfig
from zo_opt.adapters.lisa import LISAConfig
from zo_opt.adapters.lora import LoRAConfig
from zo_opt.adapters.lora_fa import LoRAFAConfig
from zo_opt.adapters.lora_plus import lora_plus_groups
from zo_opt.adapters.model import AdapterModel, get_adapter_model, load_adapter_model, trainable_parameters
from zo_opt.adapters.rank_pattern import search_rank_pattern
from zo_opt.adapters.spectral import SpectralConfig
from zo_opt.adapters.tt import TTConfig
from zo_opt.adapters.tt_delta import TTDeltaConfig
from zo_opt.adapters.tt_lora import TTLoRAConfig
from zo_opt.adapters.vera import VeRAConfig

__all__ = [
    "ADAPTERS",
    "AFLoRAConfig",
    "AdaLoRAConfig",
    "AdapterConfig",
    "AdapterModel",
    "BitFitConfig",
    "BottleneckConfig",
    "DoRAConfig",
    "FullConfig",
    "LISAConfig",
    "LaMDAConfig",
    "LaMDAPlusPlusConfig",
    "LoRAConfig",
    "LoRAFAConfig",
    "SpectralConfig",
    "TTConfig",
    "TTDeltaConfig",
    "TTLoRAConfig",
    "VeRAConfig",
    "get_adapter_model",
    "load_adapter_model",
    "lora_plus_groups",
    "make_config",
    "search_rank_pattern",
    "trainable_parameters",
]
