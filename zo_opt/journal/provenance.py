"""Where tuned weights come from: a fingerprint of the weights at the start, and which optimizer moved them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zo_opt.choices import Table
from zo_opt.directions import Rademacher
from zo_opt.errors import ZOError
from zo_opt.journal.format import machine_in_words
from zo_opt.optim import OPTIMIZERS, ZerothOrderOptimizer
from zo_opt.optim.choices import PARTS

# What decides coefficients and not what they do: no part of a replay, where coefficients are given. The key to privacy's noise
# is among it, which must never be in a journal.
_DECIDING = ("seed", "zo_eps", "history", "failed_steps", "dropped_queries", "step_control", "estimator", "choices")
_TABLES = {part: PARTS[part] for part in ("directions", "update_rule")}  # of the choices, what a replay needs
_MACHINES: Table[Any] = Table(
    "machine",
    ZerothOrderOptimizer,
    {"zeroth-order": ZerothOrderOptimizer}
    | {
        name: kind
        for name, kind in OPTIMIZERS.items()
        if isinstance(kind, type) and issubclass(kind, ZerothOrderOptimizer)
    },
)


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
    """All that :func:`~zo_opt.optim.apply` depends on besides weights, tensors of its state and the update itself, as plain values."""
    names = {id(p): name for name, p in tuned_names(optimizer, model).items()}
    choices = optimizer.choices
    own = {name: getattr(optimizer, name) for name in optimizer.method.own if hasattr(optimizer, name)}
    description = {
        "method": optimizer.method.name,
        "machine": _MACHINES.name_of(optimizer),
        "options": {name: value for name, value in own.items() if isinstance(value, bool | int | float | str)},
        **{part: table.plain(getattr(choices, part)) for part, table in _TABLES.items()},
        # The same bits on every device: all products are with +-1 or 0, so that only sums round.
        "portable": isinstance(choices.directions, Rademacher)
        and choices.update_rule.exact_signs
        and not optimizer.own_arithmetic,
        "seed": optimizer.setting.seed,
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
    zo = {k: v for k, v in optimizer.progress().items() if k not in _DECIDING}
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
            f"the journal describes an optimizer that cannot be built ({type(error).__name__}: {str(error)[:200]}); "
            "it is damaged, or of another version."
        ) from error


def _rebuild(description: Mapping[str, Any], start: Mapping[str, Any], model: nn.Module) -> ZerothOrderOptimizer:
    for part, name in (("machine", description["machine"]), *((p, description[p]["name"]) for p in _TABLES)):
        if ":" in name:  # a file does not decide what code is imported
            raise ZOError(
                f"{name} is none of zo_opt's own ({part}); build the optimizer as for training and pass it along."
            )
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[n] for n in group["parameters"]], "weight_decay": group["weight_decay"]}
        for group in description["groups"]
    ]
    kind: Any = _MACHINES.find(description["machine"])
    optimizer: ZerothOrderOptimizer = kind(groups, lr=0.0, module=model, **description["options"])
    parts = {part: table.make(description[part]) for part, table in _TABLES.items()}
    # Not as arguments: some methods fix theirs.
    optimizer.choices = replace(optimizer.choices, **parts)
    optimizer.setting = replace(optimizer.setting, seed=description["seed"])
    optimizer.method = replace(optimizer.method, name=description["method"])
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


def device_type(optimizer: ZerothOrderOptimizer) -> str:
    """The kind of device, "cpu" or "cuda", where the (first) trainable is."""
    return optimizer.trainables().parameters[0].device.type


def here_in_words(optimizer: ZerothOrderOptimizer) -> str:
    """Where the optimizer runs, as :attr:`~zo_opt.journal.format.Header.machine` says where a journal was written."""
    return machine_in_words(device_type(optimizer), str(torch.__version__))


def difference(recorded: Any, given: Any, where: str = "") -> str | None:
    """The first place where two plain values differ, in words; None if they are equal.

    >>> difference({"a": [1, 2]}, {"a": [1, 3]})
    'a.1: 2 and 3'
    """
    if isinstance(recorded, Mapping) and isinstance(given, Mapping):
        pairs = [(str(k), recorded.get(k), given.get(k)) for k in {**recorded, **given}]
    elif isinstance(recorded, list) and isinstance(given, list) and len(recorded) == len(given):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(recorded, given, strict=True))]
    else:
        return None if recorded == given else f"{where}: {recorded} and {given}"
    found = (difference(a, b, f"{where}.{k}" if where else k) for k, a, b in pairs)
    return next((text for text in found if text is not None), None)
