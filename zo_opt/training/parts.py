"""The tables behind the options that are chosen by name, and what each choice can be told."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from zo_opt.adapters import ADAPTERS
from zo_opt.choices import Table
from zo_opt.directions import DIRECTIONS
from zo_opt.estimators import ESTIMATORS
from zo_opt.optim import OPTIMIZERS, STEP_CONTROLS, UPDATE_RULES
from zo_opt.schedules import SCHEDULES

TABLES: Mapping[str, Table[Any]] = {
    "adapter": ADAPTERS,
    "optimizer": OPTIMIZERS,
    "estimator": ESTIMATORS,
    "directions": DIRECTIONS,
    "schedule": SCHEDULES,
    "update_rule": UPDATE_RULES,
    "step_control": STEP_CONTROLS,
}


def default_name(part: str, names: Mapping[str, str | None]) -> str | None:
    """What a part is where it is not named, so that its options can be; None where that is the optimizer's to say."""
    optimizer = names.get("optimizer") or "adazeta"
    presets = getattr(getattr(OPTIMIZERS.find(optimizer), "method", None), "presets", {})
    if part == "optimizer":
        return optimizer
    if part == "adapter":
        return "tt"
    if part == "step_control":
        return "clip"
    if part == "update_rule" and optimizer == "adazeta":
        return "adam"
    preset = presets.get("query_schedule" if part == "schedule" else part)
    if preset is not None:
        return TABLES[part].name_of(preset)
    return {"schedule": "constant", "directions": "rademacher"}.get(part)


def own_options(part: str, kind: Any) -> dict[str, Any]:
    """The options that a choice has of its own -> their defaults (None where one must be given)."""
    if part == "optimizer":
        own = getattr(getattr(kind, "method", None), "own", ())
        target = kind.__init__ if inspect.isclass(kind) else getattr(kind, "choose", kind)
        parameters = inspect.signature(target).parameters
        found = {name: parameters[name].default for name in own if name in parameters}
    elif is_dataclass(kind) and inspect.isclass(kind):
        found = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(kind) if f.init
        }
    else:
        found = {}
    found = {
        name: None if default in (MISSING, inspect.Parameter.empty) else default for name, default in found.items()
    }
    return {
        name: default for name, default in found.items() if not name.endswith("closure")
    }  # a closure is given in Python
