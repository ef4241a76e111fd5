"""What a Trainer's run was, for its log and its model card: the method, the data, what it cost; and the losses that were not finite."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zo_opt.adapters import trainable_parameters
from zo_opt.choices import split
from zo_opt.system.files import write_atomically
from zo_opt.trainer.arguments import PARTS

_HEADING = "## Training without backpropagation"


@dataclass
class Tally:
    """How many losses there were of micro-batches, and how many of them were not finite."""

    seen: int = 0
    lost: int = 0

    def add(self, finite: bool) -> None:
        """One more."""
        self.seen += 1
        self.lost += not finite

    def mean(self, logged: float) -> float:
        """The mean over those that were finite, from one in which the others stand as 0; NaN if there are none.

        >>> Tally(seen=4, lost=1).mean(3.0), Tally(seen=2, lost=2).mean(0.0)
        (4.0, nan)
        """
        if not self.lost:
            return logged
        return math.nan if self.lost == self.seen else logged * self.seen / (self.seen - self.lost)


def method_of_run(trainer: Any) -> str:
    """The optimizer and what it was told, in words."""
    args = trainer.args
    name, own = split("zo_optimizer", args.zo_optimizer)
    told = {"zo_eps": args.zo_eps, "lr": args.learning_rate, **own}
    told |= {part: _words(getattr(args, part)) for part in (*PARTS, "query_mode", "max_queries") if getattr(args, part)}
    trained = sum(p.numel() for p in trainable_parameters(trainer.model))
    said = ", ".join(f"{option} {value}" for option, value in told.items())
    return f"{name} ({said}), {trained:,} trainable parameters"


def data_of_run(trainer: Any) -> str:
    """The training rows in words: of a data set of ``datasets`` its name, split and fingerprint."""
    return _data(trainer.train_dataset)


def complete_card(path: Path, trainer: Any) -> None:
    """Say in a model card what was done: the Trainer names an optimizer that was not used, and no data."""
    card = path.read_text(encoding="utf-8").split(f"\n{_HEADING}")[0]
    card = re.sub(r"(?m)^- optimizer: .*$", lambda _: f"- optimizer: {method_of_run(trainer)}", card)
    card = card.replace("on the None dataset", f"on {data_of_run(trainer)}").replace(
        "on an unknown dataset", f"on {data_of_run(trainer)}"
    )
    write_atomically(path, f"{card.rstrip()}\n\n{_section(trainer)}".encode())


def _section(trainer: Any) -> str:
    history = trainer.state.log_history
    losses = [line["loss"] for line in history if "loss" in line]
    evaluated: Mapping[str, Any] = next((line for line in reversed(history) if "eval_loss" in line), {})
    figures = {
        n: v for n, v in evaluated.items() if n.startswith("eval_") and not n.endswith(("runtime", "_per_second"))
    }
    optimizer = trainer.zo_optimizer
    rows = {
        "method": method_of_run(trainer),
        "training data": data_of_run(trainer),
        "evaluation data": "" if trainer.eval_dataset is None else _data(trainer.eval_dataset),
        "steps": f"{optimizer.step_count:,} of {trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps} rows",
        "forward passes": f"{optimizer.history.forwards:,} of a micro-batch, no backward pass",
        "queries dropped, their loss not finite": f"{optimizer.dropped_queries:,}" if optimizer.dropped_queries else "",
        "training loss, first and last logged": f"{losses[0]:.4g}, {losses[-1]:.4g}" if losses else "",
        "evaluation": ", ".join(f"{name} {value:.4g}" for name, value in figures.items()),
        "versions": f"zo-opt {version('zo-opt')}, transformers {version('transformers')}, torch {version('torch')}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return f"{_HEADING}\n\n| | |\n|---|---|\n{table}\n"


def _data(dataset: Any) -> str:
    if isinstance(dataset, Mapping):
        return "; ".join(f"{name}: {_data(part)}" for name, part in dataset.items())
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    config, part = getattr(info, "config_name", None), getattr(dataset, "split", None)
    rows = f"{len(dataset):,} rows" if hasattr(dataset, "__len__") else "rows that stream"
    of = rows if name is None else f"{rows} of {name}" + (f" ({config})" if config not in (None, "default") else "")
    said = {"split": part, "fingerprint": getattr(dataset, "_fingerprint", None)}
    return ", ".join([of, *(f"{what} {value}" for what, value in said.items() if value)])


def _words(choice: Any) -> str:
    """A part as it was given: a name, or a name with options."""
    if not isinstance(choice, Mapping):
        return str(choice)
    options = " ".join(f"{option}={value}" for option, value in choice.items() if option != "name")
    return f"{choice['name']} {options}".strip()
