"""A model's adapters as a PEFT checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.peft_format.method import PREFIX
from zo_opt.adapters.peft_format.methods import method_of
from zo_opt.adapters.storage import CONFIG_NAME, WEIGHTS_NAME
from zo_opt.adapters.weights import is_conv1d
from zo_opt.errors import ZOError
from zo_opt.system.files import write_atomically


@torch.no_grad()
def export_peft(
    wrapped: nn.Module,
    adapted: Mapping[str, AdaptedModule],
    config: AdapterConfig,
    state: Mapping[str, Tensor],
    directory: Path,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does.

    Args:
        wrapped: the model with adapters.
        adapted: its adapted modules by path.
        config: the method's configuration.
        state: the tensors that the frozen model does not have, ``modules_to_save`` included.
        directory: made if it is not there.

    Raises:
        ZOError: PEFT has no form for an adapter.
    """
    if not adapted:
        raise ZOError(
            f"adapter {config.adapter_type!r} trains the model's own weights and cannot be exported as an adapter of PEFT's; "
            "save the model (unload)."
        )
    method = method_of(config)
    tensors, values = method.write(config, adapted)
    own = tuple(f"{name}.adapter." for name in adapted)
    whole = {n: t for n, t in state.items() if not n.startswith(own)}
    tensors |= {PREFIX + n: t for n, t in whole.items()}
    common: dict[str, Any] = {
        "peft_type": method.peft_type,
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(wrapped, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "target_modules": sorted(adapted),
        "fan_in_fan_out": any(is_conv1d(m.base_layer) for m in adapted.values()),
        "modules_to_save": sorted({n.rpartition(".")[0] for n in whole}) or None,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / WEIGHTS_NAME, safetensors_bytes({k: v.contiguous().cpu() for k, v in tensors.items()}))
    write_atomically(directory / CONFIG_NAME, (json.dumps(common | values, indent=2) + "\n").encode())
