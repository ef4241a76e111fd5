"""Adapter files, in PEFT's format where PEFT has the method and in zo_opt's own otherwise. Nothing is ever unpickled.

Both are ``adapter_config.json`` and ``adapter_model.safetensors``. The metadata of the latter, which PEFT passes over, hold under
``zo_opt`` the tensors' fingerprint, precision and checksum of the base and, beside PEFT's format, the configuration whole: so they are
one with the tensors, and gone when PEFT writes the file anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from zo_opt.adapters.config import AdapterConfig, config_from_dict
from zo_opt.adapters.made_for import answers_stand, base_checksum, precision_of
from zo_opt.adapters.peft_write import is_native, own_state, to_peft
from zo_opt.errors import ZOError
from zo_opt.system.checksum import checksum, fingerprint
from zo_opt.system.files import write_atomically
from zo_opt.system.plain_json import parse, read_object

if TYPE_CHECKING:
    from zo_opt.adapters.model import AdapterModel

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SCHEDULE_NAME = "adapter_schedule.safetensors"
_FORMAT = "zo_opt/1"
# Of PEFT's options: a user may change them.
_FREE = ("base_model_name_or_path", "revision", "task_type", "inference_mode")
_COPY_ANEW = "copy it anew from where the adapter was saved"


@dataclass(frozen=True)
class Saved:
    """An adapter as read.

    Attributes:
        values: ``adapter_config.json``.
        config: None where PEFT wrote the files.
        tensors: those of ``adapter_model.safetensors``.
        schedule: the state of the method's schedule; empty without one.
        base: precision and checksum of the base that it was trained on; empty where nobody noted them.
    """

    values: dict[str, Any]
    config: AdapterConfig | None
    tensors: dict[str, Tensor]
    schedule: dict[str, Tensor]
    base: dict[str, Any] = field(default_factory=dict)

    def state(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """The tensors by their names in ``AdapterModel.adapter_state``, to the bit; ``shapes`` has these names."""
        return own_state(self.tensors, shapes) if "peft_type" in self.values else self.tensors


def save(model: AdapterModel, directory: Path, *, export: bool = False) -> None:
    """Write the files, each atomically; ``export``: in PEFT's format whatever the method, without the schedule's state.

    Raises:
        ZOError: PEFT has no form for an adapter that is exported; or the directory cannot be written.
    """
    config, native = model.adapter_config, is_native(model.wrapped, model.adapter_config)
    own: dict[str, Any] = {"base": {"precision": precision_of(model.wrapped), "checksum": base_checksum(model.wrapped)}}
    if (stand := answers_stand(model)) is not None:
        own["base"]["answers"] = stand
    tensors = model.adapter_state()
    values: dict[str, Any] = {"base_model_name_or_path": _base_name(model.wrapped)}
    if export or native:
        options, tensors = to_peft(model)
        values |= options
        if native:
            own |= {"config": config.to_dict(), "values": _digest(values)}
    else:
        values = {"format": _FORMAT} | values | config.to_dict()
    _write_tensors(directory / WEIGHTS_NAME, tensors, own)
    if not export and (schedule := model.schedule_state()):
        _write_tensors(directory / SCHEDULE_NAME, schedule, {})
    write_atomically(directory / CONFIG_NAME, (json.dumps(values, indent=2) + "\n").encode())


def load(directory: Path) -> Saved:
    """What ``save`` or PEFT wrote.

    Raises:
        ZOError: a file is missing, damaged or changed; the sentence says which.
    """
    path = directory / CONFIG_NAME
    if not path.exists():
        raise ZOError(f"{directory} holds no {CONFIG_NAME}; give a directory written by save_pretrained.")
    values = read_object(path, _COPY_ANEW)
    if "peft_type" not in values:
        if values.pop("format", None) != _FORMAT:
            raise ZOError(f"{path} was written neither by zo_opt (its format is not {_FORMAT!r}) nor by PEFT.")
        values.pop("base_model_name_or_path", None)
        config = config_from_dict(values)
        tensors, own = _read(directory / WEIGHTS_NAME)
    else:
        if not (directory / WEIGHTS_NAME).exists():
            raise ZOError(
                f"{directory} holds no {WEIGHTS_NAME}; save it with PEFT again (pickled .bin files are never read)."
            )
        tensors, own = _read(directory / WEIGHTS_NAME)
        if "config" not in own:
            return Saved(values, None, tensors, {}, own.get("base", {}))
        if own.get("values") != _digest(values):
            raise ZOError(
                f"{path} was changed after it was saved; put it back as it was, or, if the change is meant, load the adapter with PEFT and "
                "save it there."
            )
        config = config_from_dict(own["config"])
    schedule = directory / SCHEDULE_NAME
    later = read_tensors(schedule) if schedule.exists() else {}
    return Saved(values, config, tensors, later, own.get("base", {}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, verified where it carries their fingerprint.

    Raises:
        ZOError: it is missing or damaged.
    """
    return _read(path)[0]


@torch.no_grad()
def restore(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
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


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], own: dict[str, Any]) -> None:
    plain = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    # One name alone: safetensors writes several in an order that changes.
    write_atomically(path, safetensors_bytes(plain, {"zo_opt": json.dumps({"tensors": fingerprint(plain)} | own)}))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what its metadata say of them (nothing in files of others)."""
    if not path.is_file():
        raise ZOError(f"{path} does not exist; give a directory written by zo_opt.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            own = parse((file.metadata() or {}).get("zo_opt", "{}"))
        if not isinstance(own, dict) or not all(isinstance(own.get(part, {}), dict) for part in ("config", "base")):
            raise ValueError("its metadata are not zo_opt's")
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        # Not SafetensorError alone: a type of number that torch lacks, a file of no bytes.
        raise ZOError(f"{path} is damaged ({error}); copy it anew from where it was saved.") from error
    if "tensors" in own and own["tensors"] != fingerprint(tensors):
        raise ZOError(
            f"{path} is damaged (its tensors have another checksum than when they were saved); copy it anew from where it was saved."
        )
    return tensors, own


def _digest(values: Mapping[str, Any]) -> str:
    """Of PEFT's options that decide what the tensors mean."""
    return checksum([json.dumps({k: v for k, v in sorted(values.items()) if k not in _FREE}).encode()])


def _base_name(wrapped: nn.Module) -> str | None:
    """The base model's Hugging Face id; of a directory its last part alone, for where it lies is nobody else's business."""
    name = getattr(getattr(wrapped, "config", None), "_name_or_path", None)
    if not name:
        return None
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).is_dir()
    return str(name) if is_id else Path(name).resolve().name or None
