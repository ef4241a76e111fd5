"""What ``zo-opt compare`` can be told beyond the options of a run. Needs no torch, so that help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_opt.errors import ZOError

DEFAULT_METHODS = "adazeta,mezo-lora,lora,lora+,adalora,lamda"


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

    @property
    def seed_list(self) -> list[int]:
        """The seeds.

        Raises:
            ZOError: not whole numbers.
        """
        try:
            return [int(seed) for seed in listed(self.seeds)]
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
    return {str(name) for name in listed(methods) if str(name).count(":") > 1}


def listed(value: Any) -> list[Any]:
    """The parts of a text with commas between, or a list as it is."""
    return [part.strip() for part in str(value).split(",")] if not isinstance(value, list) else value
