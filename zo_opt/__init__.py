"""Fine-tune language models with forward passes alone: zeroth-order optimizers, query schedules, tensor-train adapters.

Names are imported when they are first used, so that the command line can answer before torch is loaded.
"""

from typing import TYPE_CHECKING, Any

from zo_opt.errors import NonFiniteLossError, ZOError

if TYPE_CHECKING:
    from zo_opt.adapters import (
        AdaLoRAConfig,
        AFLoRAConfig,
        BitFitConfig,
        BottleneckConfig,
        DoRAConfig,
        FullConfig,
        LaMDAConfig,
        LaMDAPlusPlusConfig,
        LISAConfig,
        LoRAConfig,
        LoRAFAConfig,
        SpectralConfig,
        TTConfig,
        TTLoRAConfig,
        VeRAConfig,
        ZOActConfig,
        get_adapter_model,
        load_adapter_model,
        lora_plus_groups,
        trainable_parameters,
    )
    from zo_opt.models.precision import set_precision
    from zo_opt.optim import (
        AGZO,
        FZOO,
        GRZO,
        LOZO,
        PGAP,
        AdaZeta,
        ForwardGradient,
        HiZOO,
        MeZO,
        MeZOSVRG,
        SparseMeZO,
        SubZero,
        ZOAdam,
        ZOConservative,
        ZOKalman,
        ZOMomentum,
        ZOSign,
    )
    from zo_opt.privacy import GaussianPrivacy
    from zo_opt.training.run import Run, load_run, train

__version__ = "0.1.0"

__all__ = [
    "AGZO",
    "FZOO",
    "GRZO",
    "LOZO",
    "PGAP",
    "AFLoRAConfig",
    "AdaLoRAConfig",
    "AdaZeta",
    "BitFitConfig",
    "BottleneckConfig",
    "DoRAConfig",
    "ForwardGradient",
    "FullConfig",
    "GaussianPrivacy",
    "HiZOO",
    "LISAConfig",
    "LaMDAConfig",
    "LaMDAPlusPlusConfig",
    "LoRAConfig",
    "LoRAFAConfig",
    "MeZO",
    "MeZOSVRG",
    "NonFiniteLossError",
    "Run",
    "SparseMeZO",
    "SpectralConfig",
    "SubZero",
    "TTConfig",
    "TTLoRAConfig",
    "VeRAConfig",
    "ZOActConfig",
    "ZOAdam",
    "ZOConservative",
    "ZOError",
    "ZOKalman",
    "ZOMomentum",
    "ZOSign",
    "get_adapter_model",
    "load_adapter_model",
    "load_run",
    "lora_plus_groups",
    "set_precision",
    "train",
    "trainable_parameters",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"zo_opt.{_where(name)}"), name)


def _where(name: str) -> str:
    """The folder or module of zo_opt that has a name."""
    if name in ("Run", "load_run", "train"):
        return "training.run"
    if name == "set_precision":
        return "models.precision"
    if name.endswith("Config") or name in (
        "get_adapter_model",
        "load_adapter_model",
        "lora_plus_groups",
        "trainable_parameters",
    ):
        return "adapters"
    return "privacy" if "Privacy" in name else "optim"
