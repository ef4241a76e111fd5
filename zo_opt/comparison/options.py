"""What ``zo-opt compare`` can be told beyond the options of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_opt.adapters import ADAPTERS
from zo_opt.choices import option_names
from zo_opt.errors import ZOError
from zo_opt.optim import OPTIMIZERS
from zo_opt.system.memory import parse_bytes
from zo_opt.training.config import TrainConfig
from zo_opt.training.options import PARTS, WHOLE_MODEL
from zo_opt.training.pairings import Pairing, get_pairing
from zo_opt.training.parsing import typed
from zo_opt.training.parts import fixed_options, own_options

DEFAULT_METHODS = "adazeta,mezo-lora,lora,lora+,adalora,lamda"
SECONDS_PROBE_STEPS = 4


@dataclass
class CompareConfig:
    """Options of a comparison.

    Args:
        methods: names with commas between, or a list: full, bitfit, lora, lora+, dora, adalora, lora-fa, vera, aflora, lisa, lamda,
            lamda++, adapter, spectral, loretta, mezo,
            mezo-lora, sparse-mezo, adazeta, adazeta-feedback, or optimizer:adapter for any two (adamw or a zeroth-order
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

    def check(self) -> list[Pairing]:
        """Everything that can be wrong before anything is run; returns the methods.

        Raises:
            ZOError: with a sentence on the first mistake.
        """
        methods = self.check_methods()
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
        if self.lr_forwards is not None and not self.lr_trials:
            raise ZOError(
                "lr_forwards was given without lr_trials, whose forward passes they are; give both, or leave it out."
            )
        if self.lr_trials and self.lr is not None:
            raise ZOError("lr and lr_trials were both given; leave one out.")
        if self.budget_memory is not None:
            parse_bytes(self.budget_memory)
        if self.budget_seconds is not None and self.lr_trials and self.lr_forwards is None:
            raise ZOError("lr_trials with budget_seconds needs lr_forwards, the forward passes of each trial.")
        return methods

    def check_methods(self) -> list[Pairing]:
        """The methods.

        Raises:
            ZOError: one is not known.
        """
        return [get_pairing(name) for name in _listed(self.methods)]

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

    @property
    def trial_forwards(self) -> int | None:
        """The budget of a trial of a learning rate in forward passes; None where there are no trials."""
        return (self.lr_forwards or max((self.forwards or 0) // 5, 1)) if self.lr_trials else None


def own_methods(methods: Any) -> set[str]:
    """Those with code of the user's own: ``module:name`` besides the colon between optimizer and adapter.

    >>> own_methods("adazeta, fzoo:lora, research:MyZO:lora")
    {'research:MyZO:lora'}
    """
    return {str(name) for name in _listed(methods) if str(name).count(":") > 1}


def _listed(value: Any) -> list[Any]:
    return [part.strip() for part in str(value).split(",")] if not isinstance(value, list) else value


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
