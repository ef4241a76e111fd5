"""A PEFT checkpoint as a configuration and tensors of ours; checked against the model before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_opt.adapters.config import AdapterConfig
from zo_opt.adapters.peft_format.method import PREFIX, Checkpoint, PeftMethod
from zo_opt.adapters.peft_format.methods import PEFT_METHODS
from zo_opt.adapters.shapes import adapter_shapes
from zo_opt.adapters.storage import CONFIG_NAME, WEIGHTS_NAME, read_tensors
from zo_opt.adapters.targets import matches
from zo_opt.adapters.weights import is_conv1d, shared_parameters
from zo_opt.errors import ZOError
from zo_opt.system.plain_json import read_object

# Options that may have any value: they say where the adapters came from or how they were trained, or are read here.
_KNOWN = frozenset(
    (
        *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type"),
        *("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "loftq_config", "megatron_core"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("bias", "inference_mode", "runtime_config"),
    )
)


def is_peft(directory: Path) -> bool:
    """Whether a directory holds a PEFT checkpoint rather than one of this package."""
    try:
        return "peft_type" in read_object(directory / CONFIG_NAME, "")
    except ZOError:
        return False


def read_peft(model: nn.Module, directory: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The configuration and the tensors, float32, by their names in ``AdapterModel.adapter_state``. The model is not changed.

    Raises:
        ZOError: the method or an option is not known here, files are missing or damaged, or made for a model of other shapes.
    """
    values = read_object(directory / CONFIG_NAME, "copy it anew from where the adapter was saved")
    method = PEFT_METHODS.get(str(values["peft_type"]))
    if method is None:
        raise ZOError(
            f"{directory} holds a PEFT adapter of type {values['peft_type']!r}; those of type {', '.join(PEFT_METHODS)} can be loaded."
        )
    _check_options(values, method)
    if not (directory / WEIGHTS_NAME).exists():
        raise ZOError(
            f"{directory} holds no {WEIGHTS_NAME}; save it with PEFT again (pickled .bin files are never read)."
        )
    saved_tensors = read_tensors(directory / WEIGHTS_NAME)
    tensors = {name: _float32(name, tensor) for name, tensor in saved_tensors.items()}
    shared = {name: tensors.pop(name) for name in method.shared if name in tensors}
    found, rest = _by_module(tensors, method)
    parts = {path: found[path] for path, _ in model.named_modules() if path in found}
    if not parts or len(parts) < len(found):
        other = next((path for path in found if path not in parts), None)
        raise ZOError(
            f"the checkpoint in {directory} adapts {f'{other!r}, which this model does not have' if other else 'nothing'}; load the model it "
            f"was made for ({values.get('base_model_name_or_path') or 'not named in it'})."
        )
    saved = _saved_modules(model, values.get("modules_to_save"))
    targets = _target_names(model, values, parts, saved)
    config, state = method.read(Checkpoint(values, parts, shared, targets))
    whole = _whole(model, {name: saved_tensors[PREFIX + name] for name in rest}, saved)
    config = replace(config, modules_to_save=saved or None)
    _check_shapes(model, config, state)
    return config, state | whole


def _check_options(values: Mapping[str, Any], method: PeftMethod) -> None:
    """No option that would change the function may be passed over."""
    if values.get("bias", "none") != "none":
        raise ZOError(
            f"the checkpoint has bias={values['bias']!r}, trained biases of the model; only bias='none' can be loaded."
        )
    for name, value in values.items():
        if value and name not in _KNOWN | method.options:
            raise ZOError(f"the checkpoint has {name}={value!r}, which this package does not know; load it with PEFT.")


def _float32(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ZOError(f"the checkpoint's {name!r} is {tensor.dtype}, not floating point; it cannot be loaded.")
    try:
        wide = tensor.float()
    except (RuntimeError, NotImplementedError) as error:
        raise ZOError(
            f"the checkpoint's {name!r} is {tensor.dtype}, which torch cannot widen; save it in float32."
        ) from error
    if not wide.isfinite().all():
        raise ZOError(f"the checkpoint holds NaN or infinity in {name!r}; it cannot be used.")
    return wide


def _by_module(tensors: Mapping[str, Tensor], method: PeftMethod) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Path -> name in the module -> tensor, and the paths of what belongs to no adapter."""
    found: dict[str, dict[str, Tensor]] = {}
    rest: list[str] = []
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise ZOError(
                f"the checkpoint's tensor {name!r} is not named as PEFT names it ({PREFIX}...); save it with PEFT again."
            )
        inner = name.removeprefix(PREFIX)
        path, _, part = inner.removesuffix(".weight").rpartition(".")
        if part in method.names:
            found.setdefault(path, {})[part] = tensor
        else:
            rest.append(inner)
    return found, rest


def _saved_modules(model: nn.Module, names: Any) -> list[str]:
    """Paths of the modules that were trained whole: as in PEFT, those whose path ends in a name; the outermost ones."""
    if not isinstance(names, list | None):
        raise ZOError(f"the checkpoint's modules_to_save is {names!r}, not a list of names.")
    paths: list[str] = []
    for path, module in model.named_modules():
        wanted = any(path.endswith(str(name)) for name in names or ()) and any(True for _ in module.parameters())
        if wanted and not any(path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
    return paths


def _target_names(
    model: nn.Module, values: Mapping[str, Any], parts: Mapping[str, Any], saved: Sequence[str]
) -> list[str]:
    """The checkpoint's own names where they say which modules are adapted, else the paths of those that it holds.

    Raises:
        ZOError: names in a list reach modules that the file has nothing for.
    """
    names = values.get("target_modules")
    narrowed = any(values.get(n) not in (None, []) for n in ("layers_to_transform", "exclude_modules"))
    if not isinstance(names, list) or narrowed:
        return list(parts)
    reached = {
        path: module
        for path, module in model.named_modules()
        if any(matches(path, str(name)) for name in names) and not any(f"{path}.".startswith(f"{s}.") for s in saved)
    }
    absent = [p for p, m in reached.items() if p not in parts and (isinstance(m, nn.Linear) or is_conv1d(m))]
    if absent:
        raise ZOError(
            f"the checkpoint adapts {', '.join(map(str, names))} and has nothing for {absent[0]!r}; it is incomplete, or made for a smaller model."
        )
    used = [name for name in map(str, names) if any(matches(path, name) for path in parts)]
    return sorted(used) if reached.keys() == parts.keys() else list(parts)


def _whole(model: nn.Module, rest: Mapping[str, Tensor], saved: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of the modules trained whole. PEFT also saves base weights of adapted embeddings: they must be the model's own.

    Raises:
        ZOError: something is missing, unknown, of another shape or changed; or a module trained whole shares its weight.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = shared_parameters(model)
    wanted = {n for n in parameters if any(n.startswith(f"{path}.") for path in saved)}
    if lacking := sorted(wanted - rest.keys()):
        raise ZOError(
            f"the checkpoint trains {lacking[0]!r} whole and does not hold it; it is incomplete, copy it anew."
        )
    if shared := sorted(n for n in wanted if id(parameters[n]) in tied):
        raise ZOError(
            f"the checkpoint trains {shared[0]!r} whole, whose weight other modules of this model share; load the model with "
            "tie_word_embeddings=False."
        )
    for name, tensor in rest.items():
        weight = parameters.get(name.replace(".base_layer.", "."))
        if weight is None or weight.shape != tensor.shape:
            expected = "no such parameter" if weight is None else f"shape {tuple(weight.shape)}"
            raise ZOError(
                f"the checkpoint holds {name!r} of shape {tuple(tensor.shape)}, and this model has {expected}; it was made for another model."
            )
        if name not in wanted and not (_same(tensor, weight) or weight.is_meta):
            raise ZOError(
                f"the checkpoint holds a base weight {name!r} that is not this model's; load the very model it was made for."
            )
    return {n: rest[n].float() for n in wanted}


def _same(saved: Tensor, weight: Tensor) -> bool:
    """Whether they agree in the coarser of their dtypes."""
    coarser = min(saved.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(saved.to(coarser), weight.detach().cpu().to(coarser))


def _check_shapes(model: nn.Module, config: AdapterConfig, state: Mapping[str, Tensor]) -> None:
    """Adapters of this configuration, made without numbers, must have these names and shapes."""
    expected = adapter_shapes(model, config)
    for name in sorted(expected.keys() | state.keys()):
        ours, theirs = expected.get(name), tuple(state[name].shape) if name in state else None
        if ours != theirs:
            raise ZOError(f"the checkpoint does not fit this model: {name!r} has shape {theirs}, expected {ours}.")
