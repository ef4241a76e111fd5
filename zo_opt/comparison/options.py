"""What ``zo-opt compare`` can be told beyond the options of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from zo_opt.adapters import ADAPTERS
from zo_opt.adapters.tt_init import FEATURES
from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS
from zo_opt.system.memory import parse_bytes
from zo_opt.training.config import ADAPTER_OPTIONS, TrainConfig
from zo_opt.training.methods import Method, get_method

# Options of a run that the comparison sets itself.
OWN = (
    "optimizer", "adapter", "lr", "loraplus_lr_ratio", "loraplus_lr_embedding", "budget_forwards", "steps", "seed", "output_dir",
    "save_steps", "resume", "validation",
    "privacy_epsilon", "privacy_delta", "privacy_noise", "privacy_clip",  # of one run: the epsilons of several add up
)  # fmt: skip
# Options of a run that mean something to zeroth-order optimizers only.
_ZEROTH_ORDER = ("directions", "query_mode", "query_schedule", "max_queries", "update_rule")
DEFAULT_METHODS = "adazeta,mezo-lora,lora,lora+,adalora,lamda"
SECONDS_PROBE_STEPS = 4


@dataclass
class CompareConfig:
    """Options of a comparison.

    Args:
        methods: names with commas between, or a list: full, bitfit, lora, lora+, dora, adalora, lora-fa, vera, aflora, lisa, lamda, lamda++, adapter, spectral, loretta, mezo,
            mezo-lora, sparse-mezo, adazeta, adazeta-placed, or optimizer:adapter for any two (adamw or a zeroth-order
            optimizer).
        seeds: numbers with commas between, or a list: of directions, adapters and the order of examples; a run for each.
        budget_forwards: forward passes that each run may take, a backward pass counted as two (600 if no budget is given).
        budget_seconds: seconds of training that each run may take: as many forward passes as that buys at the speed of a few
            steps measured beforehand.
        budget_memory: what a step's tensors may take at once, such as 2GiB, as foretold by zo-opt plan for the longest row: the
            batch is halved until it fits; methods that do not fit at one example are left out, and shown as such.
        lr: one learning rate for all methods; each method's own if not given.
        lr_trials: learning rates to try for each method, on a log grid around its own, on rows held out of the training rows.
        lr_forwards: forward passes of each trial (a fifth of the budget if not given); they are counted apart.
        jobs: runs at a time.
        keep_models: keep the tuned weights of every run, which are large where the whole model is tuned.
        output_dir: where everything goes; must be empty unless resuming.
        resume: go on with the comparison in output_dir; its options are read from there, jobs may be given anew.
            Runs that failed are tried again.
    """

    methods: str | list[str] = DEFAULT_METHODS
    seeds: int | str | list[int] = 0
    budget_forwards: int | None = None
    budget_seconds: float | None = None
    budget_memory: str | None = None
    lr: float | None = None
    lr_trials: int = 0
    lr_forwards: int | None = None
    jobs: int = 1
    keep_models: bool = False
    output_dir: Path | None = None
    resume: bool = False

    def check(self) -> list[Method]:
        """Everything that can be wrong before anything is run; returns the methods.

        Raises:
            ZOError: with a sentence on the first mistake.
        """
        methods = [get_method(name) for name in _listed(self.methods)]
        for name, given in (("methods", _listed(self.methods)), ("seeds", self.seed_list)):
            if not given or len(set(given)) < len(given):
                raise ZOError(f"{name}={given} is not possible; give one or more, each once.")
        if min(self.seed_list) < 0:
            raise ZOError(f"seeds={self.seeds!r} is not possible; give whole numbers of at least 0.")
        if self.budget_forwards is not None and self.budget_seconds is not None:
            raise ZOError("budget_forwards and budget_seconds were both given; a comparison is at one of them.")
        for name in ("budget_forwards", "budget_seconds", "lr_forwards", "lr", "jobs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ZOError(f"{name}={value} is not possible; give a positive number.")
        if self.lr_trials < 0 or self.lr_trials == 1:
            raise ZOError(f"lr_trials={self.lr_trials} is not possible; give 0 for none, or at least 2.")
        if self.lr_trials and self.lr is not None:
            raise ZOError("lr and lr_trials were both given; leave one out.")
        if self.budget_memory is not None:
            parse_bytes(self.budget_memory)
        if self.budget_seconds is not None and self.lr_trials and self.lr_forwards is None:
            raise ZOError("lr_trials with budget_seconds needs lr_forwards, the forward passes of each trial.")
        return methods

    @property
    def seed_list(self) -> list[int]:
        """The seeds.

        Raises:
            ZOError: not whole numbers.
        """
        try:
            return [int(seed) for seed in _listed(self.seeds)]
        except ValueError:
            raise ZOError(f"seeds={self.seeds!r} is not possible; give whole numbers with commas between.") from None

    @property
    def forwards(self) -> int | None:
        """The budget in forward passes; None where it is in seconds."""
        return 600 if self.budget_forwards is None and self.budget_seconds is None else self.budget_forwards


def _listed(value: Any) -> list[Any]:
    return [part.strip() for part in str(value).split(",")] if not isinstance(value, list) else value


def run_config(base: TrainConfig, method: Method, **changes: Any) -> TrainConfig:
    """The options of one run of a method: the user's, as far as they mean something to it, under its own."""
    has = {f.name for f in fields(ADAPTERS[method.adapter])}
    drop: dict[str, Any] = {option: None for option, name in ADAPTER_OPTIONS.items() if name not in has}
    if base.adapter_options:
        drop["adapter_options"] = {k: v for k, v in base.adapter_options.items() if k in has} or None
    starts = ("auto", "random", *(FEATURES if method.adapter == "tt" else ()))
    if base.adapter_init not in starts and (base.adapter_init in FEATURES or "init" not in has):
        drop["adapter_init"] = "auto"
    if not method.zeroth_order:
        drop |= dict.fromkeys(_ZEROTH_ORDER)
    else:
        kind = OPTIMIZERS[method.optimizer]
        drop |= dict.fromkeys(["directions"] * kind.own_directions + ["update_rule"] * kind.own_update_rule)
    given = _with_rank(replace(base, **drop), method.adapter)
    own = {name: value for name, value in method.options.items() if getattr(given, name) == DEFAULTS[name]}
    return replace(given, **own, optimizer=method.optimizer, adapter=method.adapter, **changes)


def _with_rank(config: TrainConfig, adapter: str) -> TrainConfig:
    """One --rank for all methods: what AdaLoRA ends at (it begins with half as much again), and LaMDA++'s mean."""
    rank, options = config.rank, dict(config.adapter_options or {})
    if rank is None or {"target_rank", "ranks"} & options.keys():
        return config
    if adapter == "adalora":
        return replace(config, rank=rank + (rank + 1) // 2, adapter_options=options | {"target_rank": rank})
    if adapter == "lamda++":
        ranks = sorted({max(rank - rank // 2, 1), rank, rank + rank // 2})
        return replace(config, adapter_options=options | {"ranks": ranks})
    return config


def given_options(config: TrainConfig) -> Mapping[str, Any]:
    """The options that differ from the defaults, as plain values."""
    return {name: value for name, value in config.to_dict().items() if getattr(config, name) != DEFAULTS[name]}


DEFAULTS = vars(TrainConfig())
