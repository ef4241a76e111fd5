"""``zo-opt train``."""

from __future__ import annotations

from jsonargparse import Namespace

from zo_opt.memory import readable
from zo_opt.training.config import TrainConfig
from zo_opt.training.loop import train
from zo_opt.training.progress import Reporter


def run(options: Namespace, command: str) -> None:
    """Train with the parsed options and say what came out."""
    reporter = Reporter()
    values = options.as_dict()
    values.pop("config", None)
    summary, output_dir = train(TrainConfig(**values), reporter, command)
    reporter.say(
        f"{summary.outcome} with "
        f"{summary.forwards:,} forward passes in {summary.train_seconds:.0f} s; peak memory {readable(summary.peak_memory)}"
    )
    reporter.say(f"adapter, report.md and report.png are in {output_dir}")
