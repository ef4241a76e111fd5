"""Adapters: one small file a method (``baselines/``: what papers compare with), one table, one injector, one save and load."""

from zo_opt.adapters.adalora import AdaLoRAConfig
from zo_opt.adapters.baselines.aflora import AFLoRAConfig
from zo_opt.adapters.baselines.bitfit import BitFitConfig
from zo_opt.adapters.baselines.bottleneck import BottleneckConfig
from zo_opt.adapters.baselines.dora import DoRAConfig
from zo_opt.adapters.baselines.lisa import LISAConfig
from zo_opt.adapters.baselines.lora_fa import LoRAFAConfig
from zo_opt.adapters.baselines.spectral import SpectralConfig
from zo_opt.adapters.baselines.vera import VeRAConfig
from zo_opt.adapters.baselines.zo_act import ZOActConfig
from zo_opt.adapters.config import ADAPTERS, AdapterConfig, make_config
from zo_opt.adapters.full import FullConfig
from zo_opt.adapters.lamda import LaMDAConfig
from zo_opt.adapters.lamda_pp import LaMDAPlusPlusConfig
from zo_opt.adapters.lora import LoRAConfig
from zo_opt.adapters.lora_plus import lora_plus_groups
from zo_opt.adapters.model import AdapterModel, get_adapter_model, load_adapter_model, trainable_parameters
from zo_opt.adapters.tt import TTConfig
from zo_opt.adapters.tt_lora import TTLoRAConfig

ADAPTERS.entries.update(
    {
        "tt": TTConfig,
        "tt-lora": TTLoRAConfig,
        "full": FullConfig,
        "lora": LoRAConfig,
        "adalora": AdaLoRAConfig,
        "lamda": LaMDAConfig,
        "lamda++": LaMDAPlusPlusConfig,
        "dora": DoRAConfig,
        "lora-fa": LoRAFAConfig,
        "vera": VeRAConfig,
        "aflora": AFLoRAConfig,
        "adapter": BottleneckConfig,
        "bitfit": BitFitConfig,
        "spectral": SpectralConfig,
        "lisa": LISAConfig,
        "zo-act": ZOActConfig,
    }
)

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
    "TTLoRAConfig",
    "VeRAConfig",
    "ZOActConfig",
    "get_adapter_model",
    "load_adapter_model",
    "lora_plus_groups",
    "make_config",
    "trainable_parameters",
]
