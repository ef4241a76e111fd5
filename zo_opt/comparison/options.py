"""The options of a comparison's runs: the user's, as far as they mean something to a method, under its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zo_opt.adapters import ADAPTERS
from zo_opt.choices import option_names
from zo_opt.comparison.config import CompareConfig, listed
from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS
from zo_opt.system.memory import parse_bytes
from zo_opt.training.config import TrainConfig
from zo_opt.training.options import PARTS, WHOLE_MODEL
from zo_opt.training.pairings import Pairing, get_pairing
from zo_opt.training.parsing import typed
from zo_opt.training.parts import fixed_options, own_options

SECONDS_PROBE_STEPS = 4


def check(options: CompareConfig) -> list[Pairing]:
    """Everything that can be wrong before anything is run; returns the methods.

    Raises:
        ZOError: with a sentence on the first mistake.
    """
    methods = methods_of(options)
    for name, given in (("methods", listed(options.methods)), ("seeds", options.seed_list)):
        if not given or len(set(given)) < len(given):
            raise ZOError(f"{name}={given} is not possible; give one or more, each once.")
    if min(options.seed_list) < 0:
        raise ZOError(f"seeds={options.seeds!r} is not possible; give whole numbers of at least 0.")
    if options.budget_forwards is not None and options.budget_seconds is not None:
        raise ZOError("budget_forwards and budget_seconds were both given; a comparison is at one of them.")
    for name in ("budget_forwards", "budget_seconds", "lr_forwards", "lr", "jobs"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ZOError(f"{name}={value} is not possible; give a positive number.")
    if options.lr_trials < 0 or options.lr_trials == 1:
        raise ZOError(f"lr_trials={options.lr_trials} is not possible; give 0 for none, or at least 2.")
    if options.lr_forwards is not None and not options.lr_trials:
        raise ZOError(
            "lr_forwards was given without lr_trials, whose forward passes they are; give both, or leave it out."
        )
    if options.lr_trials and options.lr is not None:
        raise ZOError("lr and lr_trials were both given; leave one out.")
    if options.budget_memory is not None:
        parse_bytes(options.budget_memory)
    if options.budget_seconds is not None and options.lr_trials and options.lr_forwards is None:
        raise ZOError("lr_trials with budget_seconds needs lr_forwards, the forward passes of each trial.")
    return methods


def methods_of(options: CompareConfig) -> list[Pairing]:
    """The methods.

    Raises:
        ZOError: one is not known.
    """
    return [get_pairing(name) for name in listed(options.methods)]


def run_config(base: TrainConfig, pairing: Pairing, **changes: Any) -> TrainConfig:
    """The options of one run of a method: the user's, as far as they mean something to it, under its own."""
    given = base.given()
    adapter, optimizer = ADAPTERS.find(pairing.adapter), OPTIMIZERS.find(pairing.optimizer)
    has = {"adapter": option_names(adapter), "optimizer": own_options("optimizer", optimizer)}
    chosen = {"adapter": pairing.adapter, "optimizer": pairing.optimizer}
    for part, name in chosen.items():
        options = given.pop(part, {})
        kept = {k: v for k, v in options.items() if k in has[part]} if isinstance(options, Mapping) else {}
        own = pairing.adapter_options if part == "adapter" else {}
        chosen[part] = {"name": name} | dict(own) | (_with_rank(kept, pairing.adapter) if part == "adapter" else kept)  # type: ignore[assignment]
    without = _unheeded(base, pairing)
    given = {name: value for name, value in given.items() if name not in without}
    return TrainConfig.from_dict(dict(pairing.options) | given | chosen | changes)


def check_heeded(base: TrainConfig, pairings: Sequence[Pairing]) -> None:
    """Whether every option of a run that was given means something to a method.

    Raises:
        ZOError: one does to none.
    """
    for name in base.given():
        if all(name in _unheeded(base, pairing) for pairing in pairings):
            raise ZOError(f"{name}={getattr(base, name)!r} is of no use to any of the methods compared; leave it out.")


def _unheeded(base: TrainConfig, pairing: Pairing) -> frozenset[str]:
    """Options of a run that mean nothing to a method, and may to others."""
    narrow = base.precision == "mixed" and pairing.adapter in WHOLE_MODEL
    return fixed_options(pairing.optimizer) | ({"precision"} if narrow else set())


def _with_rank(options: dict[str, Any], adapter: str) -> dict[str, Any]:
    """One rank for all methods: what AdaLoRA ends at (it begins with half as much again), and LaMDA++'s mean."""
    rank = options.get("rank")
    if rank is None or {"target_rank", "ranks"} & options.keys():
        return options
    if adapter == "adalora":
        return options | {"rank": rank + (rank + 1) // 2, "target_rank": rank}
    if adapter == "lamda++":
        return options | {"ranks": sorted({max(rank - rank // 2, 1), rank, rank + rank // 2})}
    return options


def unions(pairings: Sequence[Pairing]) -> dict[str, list[Any]]:
    """The parts whose options are those of any of the methods."""
    return {
        "adapter": [ADAPTERS.find(pairing.adapter) for pairing in pairings],
        "optimizer": [OPTIMIZERS.find(pairing.optimizer) for pairing in pairings],
    }


def plain(options: CompareConfig) -> dict[str, Any]:
    """The options as JSON keeps them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def recorded(options: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[CompareConfig, TrainConfig]:
    """The options of a comparison and of its runs that a record holds.

    Raises:
        ZOError: they are none that this version has.
    """
    parts = {name: value for name, value in base.items() if name in PARTS and value is not None}
    rest = {name: value for name, value in base.items() if name not in PARTS}
    return CompareConfig(**typed(options, (CompareConfig,), ())), TrainConfig(**typed(rest, parts=()), **parts)
