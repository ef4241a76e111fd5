"""``zo-opt train``."""

from __future__ import annotations

from argparse import Namespace

from zo_opt.cli.say import print_json, reporter_of
from zo_opt.distributed import launched_rank, process_group
from zo_opt.models.models import check_device
from zo_opt.system.memory import readable
from zo_opt.training.config import TrainConfig
from zo_opt.training.followers import check_ranks, follow
from zo_opt.training.loop import train


def run(options: Namespace, command: str) -> None:
    """Train with the options that were given and say what came out; under torchrun, as one of several processes."""
    reporter, as_json = reporter_of(options)
    values = vars(options)
    config = TrainConfig(**values)
    check_device(config.device)  # before anything is fetched
    check_ranks(config)
    with process_group():
        if launched_rank():
            follow(config, values)
            return
        summary, output_dir = train(config, reporter, command, values)
    reporter.say(
        f"{summary.outcome} with "
        f"{summary.forwards:,} forward passes in {summary.train_seconds:.0f} s; peak memory {readable(summary.peak_memory)}"
    )
    reporter.say(f"adapter, report.md, report.html and report.png are in {output_dir}")
    if as_json:
        print_json({"output_dir": output_dir} | summary.to_dict())
