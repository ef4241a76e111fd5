"""The tables behind the options that are chosen by name, and what each choice can be told."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from zo_opt.adapters import ADAPTERS
from zo_opt.choices import Choice, Table, split
from zo_opt.directions import DIRECTIONS
from zo_opt.estimators import ESTIMATORS
from zo_opt.optim import OPTIMIZERS, STEP_CONTROLS, UPDATE_RULES, method_of
from zo_opt.schedules import SCHEDULES
from zo_opt.schedules.adazeta import MAX_QUERIES
from zo_opt.training.options import BACKPROPAGATION, WHOLE_MODEL

TABLES: Mapping[str, Table[Any]] = {
    table.part: table for table in (ADAPTERS, OPTIMIZERS, ESTIMATORS, DIRECTIONS, UPDATE_RULES, STEP_CONTROLS)
} | {"schedule": SCHEDULES}  # in Python query_schedule

MIN_QUERIES = 8  # where a schedule begins: in split mode, the default, queries are free
SHORT_RUN = {  # a run has few steps
    ("update_rule", "adam"): {"beta2": 0.99},
    ("optimizer", BACKPROPAGATION): {"beta2": 0.99, "max_grad_norm": 1.0},
}
# Of adapters (recipe.py): what follows from the model, the rows or the run is here in words.
RUN_ADAPTER = {"layers": "the last quarter", "seed": "the run's", "total_steps": "the run's"}
# Of an adapter that acts on answers, for queries on activations.
ON_ANSWERS: dict[str, Any] = {"positions": "answer", "trainable": "input", "rank": 8, "alpha": 8.0, "tt_rank": 64}


def fixed_options(optimizer: str) -> frozenset[str]:
    """Options of a run that an optimizer does not have, for they are what makes it."""
    return frozenset("schedule" if name == "query_schedule" else name for name in method_of(optimizer).fixes)


def default_name(part: str, names: Mapping[str, str | None]) -> str | None:
    """What a part is where it is not named, so that its options can be; None where that is the optimizer's to say."""
    optimizer = names.get("optimizer") or "adazeta"
    if part == "optimizer":
        return optimizer
    if part == "adapter":
        return "tt-lora"
    if part == "step_control":
        return "clip"
    if part == "update_rule" and optimizer == "adazeta":
        return "adam"
    if (preset := _preset(part, optimizer)) is not None:
        return TABLES[part].name_of(preset)
    return {"schedule": "constant", "directions": "rademacher"}.get(part)


def _preset(part: str, optimizer: str) -> Any:
    return method_of(optimizer).presets.get("query_schedule" if part == "schedule" else part)


def shown_defaults(part: str, kind: Any, names: Mapping[str, str | None]) -> dict[str, Any]:
    """The options that a choice has of its own -> what a run takes for those that are not given; ``names``: of the parts that were named."""
    preset = _preset(part, names.get("optimizer") or "adazeta") if names.get(part) is None else None
    found = own_options(part, kind) | (vars(preset) if type(preset) is kind else {})
    name = TABLES[part].name_of(kind)
    run = RUN_ADAPTER if part == "adapter" and name not in WHOLE_MODEL else run_defaults(part, name)
    found |= {option: value for option, value in run.items() if option in found}
    if part == "adapter" and name == "tt-lora" and names.get("optimizer") in (None, "adazeta"):
        found |= ON_ANSWERS | {"layers": "from two fifths of the depth on"}
    return found


def run_defaults(part: str, choice: Choice) -> dict[str, Any]:
    """What a run takes for options of a choice that are not given, where that is not the choice's own default.

    >>> run_defaults("update_rule", "adam"), run_defaults("schedule", {"name": "linear", "end": 3})["start"]
    ({'beta2': 0.99}, 3)
    """
    name, options = split(part, choice)
    if part == "schedule":
        most = options.get("max_queries", options.get("end", MIN_QUERIES))
        fewest = min(MIN_QUERIES, most)
        return {"min_queries": fewest, "start": fewest, "max_queries": MAX_QUERIES}
    return SHORT_RUN.get((part, name), {})


def own_options(part: str, kind: Any) -> dict[str, Any]:
    """The options that a choice has of its own -> their defaults (None where one must be given); closures are given in Python."""
    found: dict[str, Any] = {}
    if part == "optimizer":
        own = getattr(getattr(kind, "method", None), "own", ())
        target = kind.__init__ if inspect.isclass(kind) else getattr(kind, "choose", kind)
        found = {name: p.default for name, p in inspect.signature(target).parameters.items() if name in own}
    elif is_dataclass(kind) and inspect.isclass(kind):
        for f in fields(kind):
            if f.init:
                found[f.name] = f.default if f.default_factory is MISSING else f.default_factory()
    missing = (MISSING, inspect.Parameter.empty)
    return {name: None if d in missing else d for name, d in found.items() if not name.endswith("closure")}
