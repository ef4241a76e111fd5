"""``zo-opt train`` under torchrun: rank 0 runs the loop of loop.py, writes and talks; every other rank follows it, step by step."""

from __future__ import annotations

import signal
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from zo_opt.distributed import meet, world_size
from zo_opt.errors import ZOError
from zo_opt.record import checkpoint
from zo_opt.record.progress import Reporter
from zo_opt.training.config import TrainConfig
from zo_opt.training.examples import load_examples
from zo_opt.training.resume import resumed_config
from zo_opt.training.row_record import check_resumed
from zo_opt.training.setup import Tools, build_tools
from zo_opt.training.stepper import Stepper
from zo_opt.training.stop import InterruptedRunError, StopSignals


def check_ranks(config: TrainConfig) -> None:
    """What several processes cannot do together.

    Raises:
        ZOError: with a sentence on the first thing asked for.
    """
    if world_size() == 1:
        return
    if not config.zeroth_order:
        raise ZOError(
            f"optimizer={config.optimizer_name!r} trains in one process; start it without torchrun, or choose a zeroth-order optimizer."
        )
    if config.eval_steps is not None:
        raise ZOError("eval_steps would keep the other processes waiting; start it without torchrun, or leave it out.")
    if config.private:
        raise ZOError("privacy clips and hides all rows of a step in one process; start it without torchrun.")
    if config.output_dir is None:
        raise ZOError("several processes need --output_dir: all of them read the checkpoint that the first one writes.")
    if config.prompt_cache == "disk":
        raise ZOError(
            "prompt_cache='disk' is one process's file; with several processes give --prompt_cache cpu, device or off."
        )


def follow(config: TrainConfig, given: Collection[str] | None = None) -> None:
    """A rank that writes nothing: it starts from rank 0's checkpoint and takes every step with it.

    Args:
        config: the options.
        given: of a resumed run: names of the options that were given, as in :func:`~zo_opt.training.resume.resumed_config`.

    Raises:
        RankError: another rank failed.
        InterruptedRunError: all ranks were asked to stop.
    """
    reporter, record = Reporter(Console(quiet=True)), None
    if config.resume:
        config, record = resumed_config(config, given, reporter)
    config.check()
    check_ranks(config)
    assert config.output_dir is not None
    meet()
    with StopSignals() as stop:
        try:
            examples = load_examples(config, reporter)
            if record is not None:  # as rank 0 does: all end alike
                check_resumed(record, examples.record, f"the run in {config.output_dir}", reporter.say)
            tools = build_tools(config, examples, reporter)
            _follow(replace(config, steps=tools.steps), tools, stop, config.output_dir, reporter)
        except KeyboardInterrupt as request:
            raise InterruptedRunError(config.output_dir, getattr(request, "signum", signal.SIGINT)) from None


def _follow(config: TrainConfig, tools: Tools, stop: StopSignals, output_dir: Path, reporter: Reporter) -> None:
    stepper = Stepper(config, tools)
    tools.record_prompts(config, output_dir, reporter)
    if config.compile:
        tools.compile_model(reporter)
    meet()
    path = checkpoint.newest(output_dir, reporter.say)
    checkpoint.load_checkpoint(path, tools.model, stepper.optimizer, stepper.lr_scheduler)
    with stop.held():
        while stepper.optimizer.step_count < tools.steps:
            stepper.step(stop)
            if (signum := stepper.ending(stop)) is not None:
                meet()
                raise InterruptedRunError(output_dir, signum, after=f" after step {stepper.optimizer.step_count}")
