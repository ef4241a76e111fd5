"""Fine-tune language models with forward passes alone: zeroth-order optimizers, query schedules, tensor-train adapters."""

from zo_opt.adapters import (
    TTConfig,
    TTDeltaConfig,
    TTLoRAConfig,
    get_adapter_model,
    load_adapter_model,
    trainable_parameters,
)
from zo_opt.errors import NonFiniteLossError, ZOError
from zo_opt.optim import (
    FZOO,
    GRZO,
    LOZO,
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

__version__ = "0.1.0"

__all__ = [
    "FZOO",
    "GRZO",
    "LOZO",
    "AdaZeta",
    "ForwardGradient",
    "HiZOO",
    "MeZO",
    "MeZOSVRG",
    "NonFiniteLossError",
    "SparseMeZO",
    "SubZero",
    "TTConfig",
    "TTDeltaConfig",
    "TTLoRAConfig",
    "ZOAdam",
    "ZOConservative",
    "ZOError",
    "ZOKalman",
    "ZOMomentum",
    "ZOSign",
    "get_adapter_model",
    "load_adapter_model",
    "trainable_parameters",
]
