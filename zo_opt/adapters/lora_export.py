"""Adapters as an ordinary LoRA in PEFT's file format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from zo_opt.adapters.adapted import AdaptedModule
from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.storage import CONFIG_NAME, WEIGHTS_NAME
from zo_opt.adapters.weights import is_conv1d
from zo_opt.errors import ZOError
from zo_opt.files import write_atomically

_PREFIX = "base_model.model."


@runtime_checkable
class LowRank(Protocol):
    """An adapter that adds scaling * B A to a weight."""

    scaling: float

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank)."""


@torch.no_grad()
def export_lora(
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
        ZOError: an adapter is no pair of low-rank factors.
    """
    low_rank = {n: m.adapter for n, m in adapted.items() if isinstance(m.adapter, LowRank)}
    if len(low_rank) < len(adapted):
        other = next(n for n in adapted if n not in low_rank)
        raise ZOError(
            f"the adapter of type {config.adapter_type!r} at {other!r} is no pair of low-rank factors and cannot be exported as "
            "LoRA; merge it (merge_and_unload), or keep zo_opt's own format (save_pretrained)."
        )
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, adapter in low_rank.items():
        a, b = adapter.lora_factors()
        ranks[name], alphas[name] = len(a), adapter.scaling * len(a)
        infix, suffix = (
            ("lora_embedding_", "") if isinstance(adapted[name].base_layer, nn.Embedding) else ("lora_", ".weight")
        )
        tensors |= {f"{_PREFIX}{name}.{infix}A{suffix}": a, f"{_PREFIX}{name}.{infix}B{suffix}": b}
    own = tuple(f"{name}.adapter." for name in adapted)
    whole = {n: t for n, t in state.items() if not n.startswith(own)}
    tensors |= {_PREFIX + n: t for n, t in whole.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(wrapped, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(low_rank),
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {n: x for n, x in alphas.items() if x != alpha},
        "fan_in_fan_out": any(is_conv1d(m.base_layer) for m in adapted.values()),
        "modules_to_save": sorted({n.rpartition(".")[0] for n in whole}) or None,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / WEIGHTS_NAME, safetensors_bytes({k: v.contiguous().cpu() for k, v in tensors.items()}))
    write_atomically(directory / CONFIG_NAME, (json.dumps(values, indent=2) + "\n").encode())
