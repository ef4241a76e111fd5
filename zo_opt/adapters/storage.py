"""Adapter files: adapter_config.json and adapter_model.safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from zo_opt.adapters.config import AdapterConfig, config_from_dict
from zo_opt.errors import ZOError
from zo_opt.system.files import write_atomically
from zo_opt.system.plain_json import read_object

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SCHEDULE_NAME = "adapter_schedule.safetensors"


def save(
    directory: Path,
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    schedule: dict[str, Tensor],
    base_model: str | None,
) -> None:
    """Write the files, each atomically; the schedule's only where there is one."""
    values: dict[str, Any] = {"format": "zo_opt/1", "base_model_name_or_path": base_model} | config.to_dict()
    write_atomically(directory / WEIGHTS_NAME, safetensors_bytes({k: v.contiguous().cpu() for k, v in tensors.items()}))
    if schedule:
        content = safetensors_bytes({k: v.contiguous().cpu() for k, v in schedule.items()})
        write_atomically(directory / SCHEDULE_NAME, content)
    write_atomically(directory / CONFIG_NAME, (json.dumps(values, indent=2) + "\n").encode())


def load(directory: Path) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Configuration, weights and the schedule's state (empty without one); the error says which file is missing or damaged."""
    path = directory / CONFIG_NAME
    if not path.exists():
        raise ZOError(f"{directory} holds no {CONFIG_NAME}; give a directory written by save_pretrained.")
    values = read_object(path, "copy it anew from where the adapter was saved")
    if values.pop("format", None) != "zo_opt/1":
        raise ZOError(f"{path} was not written by zo_opt (its format is not 'zo_opt/1').")
    values.pop("base_model_name_or_path", None)
    schedule = directory / SCHEDULE_NAME
    return (
        config_from_dict(values),
        read_tensors(directory / WEIGHTS_NAME),
        read_tensors(schedule) if schedule.exists() else {},
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    if not path.is_file():
        raise ZOError(f"{path} does not exist; give a directory written by zo_opt.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        # Not SafetensorError alone: a type of number that torch lacks, a file of no bytes.
        raise ZOError(f"{path} is damaged ({error}); copy it anew from where it was saved.") from error


@torch.no_grad()
def restore(parameters: dict[str, Tensor], tensors: dict[str, Tensor], what: str) -> None:
    """Copy saved tensors into parameters; all names, shapes and dtypes must agree before anything is written."""
    missing, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or extra:
        raise ZOError(
            f"{what} does not fit this model: {len(missing)} tensors missing, {len(extra)} unknown (such as {(missing + extra)[0]!r})."
        )
    for name, parameter in parameters.items():
        saved = tensors[name]
        if saved.shape != parameter.shape or saved.dtype != parameter.dtype:
            raise ZOError(
                f"{what} does not fit this model: {name!r} is {saved.dtype} {tuple(saved.shape)}, "
                f"expected {parameter.dtype} {tuple(parameter.shape)}."
            )
        if not saved.isfinite().all():
            raise ZOError(f"{what} holds NaN or infinity in {name!r}; it cannot be used.")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
