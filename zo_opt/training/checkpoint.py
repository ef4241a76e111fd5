"""Checkpoints: one safetensors file, atomic, holding everything the next step depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from zo_opt.adapters import AdapterModel
from zo_opt.adapters.model import restore_schedule
from zo_opt.adapters.storage import read_tensors, restore
from zo_opt.errors import ZOError
from zo_opt.files import write_atomically
from zo_opt.optim import ZerothOrderOptimizer
from zo_opt.training.first_order import FirstOrder

NAME = "checkpoint.safetensors"


def save_checkpoint(
    path: Path,
    model: AdapterModel,
    optimizer: ZerothOrderOptimizer | FirstOrder,
    lr_scheduler: Any,
    extra: dict[str, Any],
) -> None:
    """Write adapters and optimizer tensors, with the rest as JSON in the file's metadata."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {f"adapter.{n}": t for n, t in model.adapter_state().items()}
    tensors |= {f"schedule.{n}": t for n, t in model.schedule_state().items()}
    for index, slots in state["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in slots.items()}
    plain = {
        "format": "zo_opt.checkpoint/1",
        "zo": state["zo"],
        "param_groups": state["param_groups"],
        "lr_scheduler": {k: v for k, v in lr_scheduler.state_dict().items() if k != "lr_lambdas"},
        "extra": extra,
    }
    content = safetensors_bytes({k: v.contiguous().cpu() for k, v in tensors.items()}, {"state": json.dumps(plain)})
    write_atomically(path, content)


def load_checkpoint(
    path: Path, model: AdapterModel, optimizer: ZerothOrderOptimizer | FirstOrder, lr_scheduler: Any
) -> dict[str, Any]:
    """Put a checkpoint back; returns what was saved as ``extra``.

    Raises:
        ZOError: missing, damaged, or of another model or optimizer.
    """
    plain = read_state(path)
    tensors = read_tensors(path)
    restore(model.adapter_state(), _under("adapter.", tensors), f"the checkpoint {path}")
    restore_schedule(model, _under("schedule.", tensors), f"the checkpoint {path}")
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".")
            state.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"], "zo": plain["zo"]})
    lr_scheduler.load_state_dict(plain["lr_scheduler"] | {"lr_lambdas": [None] * len(plain["param_groups"])})
    extra: dict[str, Any] = plain["extra"]
    return extra


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON part."""
    if not path.is_file():
        raise ZOError(
            f"{path.parent} holds no {path.name}; give the output_dir of an interrupted run, or leave --resume out."
        )
    try:
        with safe_open(path, framework="pt") as file:
            plain = json.loads(file.metadata()["state"])
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ZOError(f"{path} is damaged ({error}); delete it and start anew, or restore it from a copy.") from error
    if plain.get("format") != "zo_opt.checkpoint/1":
        raise ZOError(f"{path} was not written by this version of zo_opt.")
    return dict(plain)
