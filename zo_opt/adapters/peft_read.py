"""PEFT's files of others as a configuration and tensors of ours; checked against the model before anything is changed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_opt.adapters.config import MOST_NAMES, AdapterConfig, make_config
from zo_opt.adapters.peft_write import PARTS, PREFIX, SHARED, commonest, exceptions, outermost, own_name, within
from zo_opt.adapters.shapes import adapter_shapes
from zo_opt.adapters.targets import matches
from zo_opt.adapters.weights import is_conv1d, shared_parameters
from zo_opt.errors import ZOError

# Options that may have any value: they say where the adapters came from or how they were trained, or are read here.
_KNOWN = (
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type"),
    *("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "loftq_config", "megatron_core"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("bias", "inference_mode", "runtime_config"),
)
_OPTIONS = {
    "LORA": ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "eva_config", "qalora_group_size"),
    "ADALORA": (
        *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        *("rank_pattern", "qalora_group_size"),
    ),
    "VERA": ("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"),
}
# Those that draw the factors alone. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the base weights when PEFT loads a checkpoint.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
Described = tuple[str, dict[str, Any]]  # an adapter of ours by name, and its options


def from_peft(
    model: nn.Module, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The configuration and the tensors, float32, by their names in ``AdapterModel.adapter_state``. The model is not changed.

    Args:
        model: the base model.
        values: ``adapter_config.json``.
        tensors: those of ``adapter_model.safetensors``.

    Raises:
        ZOError: the method or an option is not known here, or the tensors are damaged or made for another model.
    """
    peft_type = str(values["peft_type"])
    _check_options(values, peft_type)
    if other := [name for name in tensors if not name.startswith(SHARED)]:
        raise ZOError(
            f"the checkpoint's tensor {other[0]!r} is not named as PEFT names it ({PREFIX}...); save it with PEFT again."
        )
    rest = {own_name(name): tensor for name, tensor in tensors.items()}
    state = {n: _float32(n, rest.pop(n)) for n in list(rest) if n.rpartition(".adapter.")[2].startswith(PARTS)}
    found = {name.rpartition(".adapter.")[0] for name in state}
    paths = [path for path, _ in model.named_modules() if path in found]
    if not paths or len(paths) < len(found):
        absent = f"{min(found.difference(paths))!r}, which this model does not have" if found else "nothing"
        raise ZOError(
            f"the checkpoint adapts {absent}; load the model it was made for ({values.get('base_model_name_or_path') or 'not named in it'})."
        )
    names = values.get("modules_to_save")
    if not isinstance(names, list | None):
        raise ZOError(f"the checkpoint's modules_to_save is {names!r}, not a list of names.")
    saved = outermost(model, lambda path: path.endswith(tuple(map(str, names or ()))))
    for name in ("vera_A", "vera_B") if peft_type == "VERA" else ():
        if f"{SHARED}{name}" not in rest:
            raise ZOError("the VeRA checkpoint lacks vera_A or vera_B; save it with PEFT's save_projection=True.")
        # By the name of the first module, under which the model lists what all of them share.
        state[f"{paths[0]}.adapter.{name}"] = _float32(name, rest.pop(f"{SHARED}{name}"))
    method, options = {"LORA": _lora, "ADALORA": _adalora, "VERA": _vera}[peft_type](values, paths, state)
    options |= {"target_modules": _target_names(model, values, paths, saved), "modules_to_save": saved or None}
    config = make_config(method, options)
    if unknown := sorted(state.keys() - adapter_shapes(model, config).keys()):
        raise ZOError(f"the checkpoint holds {unknown[0]!r}, which its options leave no place for; copy it anew.")
    return config, state | _whole(model, rest, saved)


def _lora(values: Mapping[str, Any], paths: Sequence[str], state: dict[str, Tensor]) -> Described:
    if values.get("init_lora_weights") not in _HARMLESS_INITS:
        raise ZOError(
            f"the checkpoint was started with init_lora_weights={values['init_lora_weights']!r}, which also changes the base "
            "model's weights; save it with PEFT's path_initial_model_for_weight_conversion, as an ordinary LoRA."
        )
    ranks = {path: _rank(state, path) for path in paths}
    alphas = {path: _alpha(values, path) for path in paths}
    rank, alpha = commonest(ranks), commonest(alphas)
    return "dora" if values.get("use_dora") else "lora", {
        "rank": rank,
        "alpha": alpha,
        "use_rslora": bool(values.get("use_rslora")),
        "rank_pattern": exceptions(ranks, rank) or None,
        "alpha_pattern": exceptions(alphas, alpha) or None,
    }


def _alpha(values: Mapping[str, Any], path: str) -> float:
    """That of the first key of ``alpha_pattern`` that fits the path's end; a dot in a key stands for any character, as in PEFT.

    Raises:
        ZOError: a key is another regular expression, which could be one that takes for ever.
    """
    patterns = values.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > MOST_NAMES:
        raise ZOError(f"the checkpoint's alpha_pattern is no mapping of up to {MOST_NAMES:,} names to numbers.")
    for key, alpha in patterns.items():
        if not re.fullmatch(r"\^?[\w.-]+", key):
            raise ZOError(
                f"the checkpoint's alpha_pattern has {key[:80]!r}, a regular expression, where names and paths of modules are read; "
                "write the modules' names there."
            )
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return _as_number(f"alpha_pattern of {key}", alpha)
    return _number(values, "lora_alpha", 8)


def _adalora(values: Mapping[str, Any], paths: Sequence[str], state: dict[str, Tensor]) -> Described:
    rank = int(_number(values, "init_r", 12))
    alpha = _number(values, "lora_alpha", 8)
    ranks = {path: _rank(state, path) for path in paths}
    for path, there in ranks.items():
        if there != (left := _left(values, path, rank)):
            raise ZOError(
                f"the checkpoint's factors of {path!r} have rank {there}, and its configuration says {left}; it is damaged, copy it anew."
            )
        if there == 0:  # PEFT may prune a whole module; here it keeps one triplet, of zeros
            ranks[path] = 1
            for part, room in (("lora_A", (0, 0, 0, 1)), ("lora_E", (0, 0, 0, 1)), ("lora_B", (0, 1))):
                if (tensor := state.get(f"{path}.adapter.{part}")) is not None:
                    state[f"{path}.adapter.{part}"] = F.pad(tensor, room)
        state[f"{path}.adapter.ranknum"] = torch.tensor([float(rank)])
    return "adalora", {
        "rank": rank,
        "target_rank": min(int(_number(values, "target_r", 8)), rank),
        "alpha": alpha if alpha > 0 else float(rank),
        "orthogonality": _number(values, "orth_reg_weight", 0.5),
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank} or None,
    }


def _left(values: Mapping[str, Any], path: str, rank: int) -> int:
    """How many triplets the file holds: all, or those that ``rank_pattern`` marks (PEFT leaves pruned ones out)."""
    pattern = values.get("rank_pattern") or {}
    marks = pattern.get(f"{path}.lora_E") if isinstance(pattern, dict) else None
    if marks is None:
        return rank
    if not isinstance(marks, list) or len(marks) != rank or not all(type(mark) is bool for mark in marks):
        raise ZOError(f"the checkpoint's rank_pattern of {path!r} is no list of {rank} truth values; copy it anew.")
    return sum(marks)


def _vera(values: Mapping[str, Any], paths: Sequence[str], state: dict[str, Tensor]) -> Described:
    a = state[f"{paths[0]}.adapter.vera_A"]
    return "vera", {"rank": a.shape[0] if a.ndim else 0, "d_initial": _number(values, "d_initial", 0.1)}


def _rank(state: Mapping[str, Tensor], path: str) -> int:
    a = state.get(f"{path}.adapter.lora_A")
    if a is None or a.ndim != 2:
        raise ZOError(f"the checkpoint has no matrix lora_A for {path!r}; it is incomplete, copy it anew.")
    return len(a)


def _check_options(values: Mapping[str, Any], peft_type: str) -> None:
    """No option that would change the function may be passed over."""
    if peft_type not in _OPTIONS:
        raise ZOError(f"PEFT adapters of type {peft_type!r} cannot be loaded; those of type {', '.join(_OPTIONS)} can.")
    if values.get("bias", "none") != "none":
        raise ZOError(
            f"the checkpoint has bias={values['bias']!r}, trained biases of the model; only bias='none' can be loaded."
        )
    for name, value in values.items():
        if value and name not in _KNOWN and name not in _OPTIONS[peft_type]:
            raise ZOError(f"the checkpoint has {name}={value!r}, which this package does not know; load it with PEFT.")


def _number(values: Mapping[str, Any], name: str, default: float) -> float:
    return _as_number(name, values.get(name, default))


def _as_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ZOError(f"the checkpoint's {name} is {value!r}, not a number; copy it anew from where it was saved.")
    return value


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


def _target_names(model: nn.Module, values: Mapping[str, Any], paths: Sequence[str], saved: Sequence[str]) -> list[str]:
    """The checkpoint's own names where they say which modules are adapted, else the paths of those that it holds.

    Raises:
        ZOError: names in a list reach modules that the file has nothing for.
    """
    names = values.get("target_modules")
    narrowed = any(values.get(n) not in (None, []) for n in ("layers_to_transform", "exclude_modules"))
    if not isinstance(names, list) or narrowed:
        return list(paths)
    reached = {
        path: module
        for path, module in model.named_modules()
        if any(matches(path, str(name)) for name in names) and not within(path, saved)
    }
    absent = [p for p, m in reached.items() if p not in paths and (isinstance(m, nn.Linear) or is_conv1d(m))]
    if absent:
        raise ZOError(
            f"the checkpoint adapts {', '.join(map(str, names))} and has nothing for {absent[0]!r}; it is incomplete, or made for a smaller model."
        )
    used = [name for name in map(str, names) if any(matches(path, name) for path in paths)]
    return sorted(used) if reached.keys() == set(paths) else list(paths)


def _whole(model: nn.Module, rest: Mapping[str, Tensor], saved: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of the modules trained whole. PEFT also saves base weights of adapted embeddings: they must be the model's own.

    Raises:
        ZOError: something is missing, unknown, of another shape or changed; or a module trained whole shares its weight.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = shared_parameters(model)
    wanted = {name for name in parameters if within(name, saved)}
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
    return {name: _float32(name, rest[name]) for name in wanted}


def _same(saved: Tensor, weight: Tensor) -> bool:
    """Whether they agree in the coarser of their dtypes."""
    coarser = min(saved.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(saved.to(coarser), weight.detach().cpu().to(coarser))
