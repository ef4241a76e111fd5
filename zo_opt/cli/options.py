"""The options of commands that have modules of their own to import. Needs no torch, so that help is quick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zo_opt.diagnosis import EPS_GRID
from zo_opt.training.options import DEFAULT_MODEL, NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class DiagnoseConfig:
    """What is measured, beside the options of a run.

    Args:
        queries: directions, each on an example of its own.
        eps_grid: values of zo_eps to try.
        trial_steps: steps of training with which the learning rate is tried, five times at most; 0 for none.
        out: the picture; numbers beside it as .json.
    """

    queries: PositiveInt = 48
    eps_grid: Sequence[float] = EPS_GRID
    trial_steps: NonNegativeInt = 20
    out: Path = Path("diagnose.png")


@dataclass(frozen=True)
class PlanConfig:
    """Which methods to plan, for which model, batch and memory.

    Args:
        model_name_or_path: the built-in name, a local directory or a Hugging Face id, of which config.json alone is read.
        methods: names with commas between: those of zo-opt compare, or any optimizer:adapter; all if not given.
        memory: mark what fits in it, such as 24GB or 22.5GiB; what this machine's device has if not given.
        batch_size: rows a step.
        length: tokens a row.
        precision: of the frozen base: mixed (bf16 matrices), fp32, bf16 (every tensor), or auto: mixed where the device is fast at it.
        device: cuda, cpu, or auto: CUDA where this machine has it.
        head: lm (label words) or classification (a new head).
        logits: labels (the output head at label positions, as zo-opt trains) or all (language modelling).
        layers: adapters in the last so many layers; in all if not given (zo-opt train takes the last quarter).
        query_mode: of zeroth-order methods: sequential, batched, split or auto; the method's if not given.
        quantise: the frozen base in int8, int4, bnb-int8 or bnb-nf4; in full if not given.
        out: a file for the table: .json, .csv or .md.
        overwrite: replace the file if it is there.
    """

    batch_size: PositiveInt = 16
    length: PositiveInt = 128
    precision: Literal["auto", "mixed", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    head: Literal["lm", "classification"] = "lm"
    logits: Literal["labels", "all"] = "labels"
    layers: PositiveInt | None = None
    query_mode: Literal["sequential", "batched", "split", "auto"] | None = None
    quantise: Literal["int8", "int4", "bnb-int8", "bnb-nf4"] | None = None
    model_name_or_path: str = DEFAULT_MODEL
    methods: str | None = None
    memory: str | None = None
    out: Path | None = None
    overwrite: bool = False
