"""Where tuned weights come from: a fingerprint of the weights at the start, and which optimizer moved them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from torch import Tensor, nn

from zo_opt.directions import DIRECTIONS
from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS, UPDATE_RULES, ZerothOrderOptimizer

# What decides coefficients and not what they do: no part of a replay, where coefficients are given. The key to privacy's noise
# is among it, which must never be in a journal.
_DECIDING = ("seed", "zo_eps", "history", "failed_steps", "dropped_queries", "step_control", "privacy")


def frozen_state(model: nn.Module, tuned: Iterable[Tensor]) -> dict[str, Tensor]:
    """All saved tensors of a model but the tuned ones; those with several names once."""
    seen = {id(p) for p in tuned}
    found = {}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def tuned_names(optimizer: ZerothOrderOptimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's trainables under their names in the model.

    Raises:
        ZOError: one of them is not in the model.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = optimizer.trainables().parameters
    if any(id(p) not in names for p in parameters):
        raise ZOError(
            "the optimizer tunes a parameter that is not in the model; give the model whose parameters it has."
        )
    return {names[id(p)]: p for p in parameters}


def describe(optimizer: ZerothOrderOptimizer, model: nn.Module) -> dict[str, Any]:
    """All that ``optimizer.apply`` depends on besides weights, tensors of its state and the update itself, as plain values."""
    names = {id(p): name for name, p in tuned_names(optimizer, model).items()}
    directions, rule = optimizer.directions, optimizer.update_rule
    description = {
        "name": _name(optimizer, OPTIMIZERS),
        "settings": _settings(optimizer),
        "directions": _name(directions, DIRECTIONS),
        "directions_settings": {k: v for k, v in vars(directions).items() if k[0] != "_" and _is_plain(v)},
        "update_rule": _name(rule, UPDATE_RULES),
        "update_rule_settings": asdict(rule) if is_dataclass(rule) else {},
        "seed": optimizer.seed,
        "groups": [
            {
                "weight_decay": float(group["weight_decay"]),
                "parameters": [names[id(p)] for p in group["params"] if id(p) in names],
            }
            for group in optimizer.param_groups
        ],
    }
    plain: dict[str, Any] = json.loads(json.dumps(description))
    return plain


def progress(optimizer: ZerothOrderOptimizer) -> dict[str, Any]:
    """Where the optimizer stands: step and update counts, and what else the method keeps as plain values."""
    zo = {k: v for k, v in optimizer.state_dict()["zo"].items() if k not in _DECIDING}
    plain: dict[str, Any] = json.loads(json.dumps(zo))
    return plain


def rebuild(description: Mapping[str, Any], start: Mapping[str, Any], model: nn.Module) -> ZerothOrderOptimizer:
    """The optimizer that ``describe`` and ``progress`` described, over a model's parameters: to apply updates, not to estimate.

    Raises:
        ZOError: it was of a class that zo_opt does not know, or has settings that the class does not have.
    """
    try:
        return _rebuild(description, start, model)
    except ZOError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
        raise ZOError(
            f"the journal describes an optimizer that cannot be built ({type(error).__name__}: {str(error)[:200]}); it is damaged, or of another version."
        ) from error


def _rebuild(description: Mapping[str, Any], start: Mapping[str, Any], model: nn.Module) -> ZerothOrderOptimizer:
    for key, table in (("name", OPTIMIZERS), ("directions", DIRECTIONS), ("update_rule", UPDATE_RULES)):
        if description[key] not in table:
            raise ZOError(
                f"{description[key]} is none of zo_opt's own ({key}); build the optimizer as for training and pass it along."
            )
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[n] for n in group["parameters"]], "weight_decay": group["weight_decay"]}
        for group in description["groups"]
    ]
    kind: Any = OPTIMIZERS[description["name"]]
    optimizer: ZerothOrderOptimizer = kind(groups, lr=0.0, module=model, **description["settings"])
    # Not as arguments: some methods fix theirs.
    optimizer.directions = DIRECTIONS[description["directions"]](**description["directions_settings"])
    optimizer.update_rule = UPDATE_RULES[description["update_rule"]](**description["update_rule_settings"])
    optimizer.seed = description["seed"]
    fresh = optimizer.state_dict()
    optimizer.load_state_dict(fresh | {"zo": fresh["zo"] | start})
    return optimizer


def check_described(description: Mapping[str, Any], optimizer: ZerothOrderOptimizer, model: nn.Module) -> None:
    """Whether an optimizer over a model's parameters is the one described.

    Raises:
        ZOError: it differs; the sentence says in what.
    """
    found = difference(description, describe(optimizer, model))
    if found is not None:
        raise ZOError(
            f"the journal is of another optimizer than the one given ({found}); build it with the same options."
        )


def is_portable(description: Mapping[str, Any]) -> bool:
    """Whether updates give the same bits on every device: all products are with +-1 or 0, so that only sums round.

    >>> is_portable({"name": "mezo", "directions": "rademacher", "update_rule": "adam"})
    False
    """
    own_arithmetic = {"hizoo", "zo-kalman"}
    return (
        description["name"] in OPTIMIZERS.keys() - own_arithmetic
        and description["directions"] == "rademacher"
        and description["update_rule"] in ("sgd", "sign")
    )


def device_type(optimizer: ZerothOrderOptimizer) -> str:
    """The kind of device, "cpu" or "cuda", where the (first) trainable is."""
    return optimizer.trainables().parameters[0].device.type


def difference(recorded: Any, given: Any, where: str = "") -> str | None:
    """The first place where two plain values differ, in words; None if they are equal.

    >>> difference({"a": [1, 2]}, {"a": [1, 3]})
    'a.1: 2 and 3'
    """
    if isinstance(recorded, Mapping) and isinstance(given, Mapping) and recorded.keys() == given.keys():
        pairs = [(str(k), recorded[k], given[k]) for k in recorded]
    elif isinstance(recorded, list) and isinstance(given, list) and len(recorded) == len(given):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(recorded, given, strict=True))]
    else:
        return None if recorded == given else f"{where}: {recorded} and {given}"
    found = (difference(a, b, f"{where}.{k}" if where else k) for k, a, b in pairs)
    return next((text for text in found if text is not None), None)


def _name(thing: Any, table: Mapping[str, type]) -> str:
    """The name in zo_opt's table; of others, subclasses included, the full name of the class."""
    kind = type(thing)
    return next((name for name, known in table.items() if known is kind), f"{kind.__module__}.{kind.__qualname__}")


def _settings(optimizer: ZerothOrderOptimizer) -> dict[str, Any]:
    """The plain arguments that a method has beyond those of all optimizers, where it keeps them under their names."""
    shared = inspect.signature(ZerothOrderOptimizer).parameters
    kinds = [kind for kind in type(optimizer).__mro__ if issubclass(kind, ZerothOrderOptimizer)]
    own = {name for kind in kinds for name in inspect.signature(kind).parameters} - set(shared)
    return {name: value for name in sorted(own) if _is_plain(value := getattr(optimizer, name, None))}


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)
