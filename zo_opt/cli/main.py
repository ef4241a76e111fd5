"""``zo-opt``: one subcommand a module."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from zo_opt import __version__
from zo_opt.errors import NonFiniteLossError, ZOError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (training failed), 2 (a mistake in what was given), 128 + signal."""
    from zo_opt.training.loop import InterruptedRunError

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        parsed = _parser().parse_args(arguments or ["--help"])
        _run(parsed, shlex.join(["zo-opt", *arguments]))
    except ZOError as error:
        errors.print(f"zo-opt: error: {error}", markup=False)
        return 2
    except NonFiniteLossError as error:
        errors.print(f"zo-opt: training failed: {error}", markup=False)
        return 1
    except InterruptedRunError as stop:
        errors.print(f"zo-opt: {stop}", markup=False)
        return stop.exit_code
    except KeyboardInterrupt:
        errors.print("zo-opt: interrupted")
        return 130
    return 0


def _run(parsed: Namespace, command: str) -> None:
    from zo_opt.cli import compare, diagnose, merge, plan, replay, schedule, train
    from zo_opt.cli import eval as evaluate

    if parsed.command == "train":
        train.run(parsed["train"], command)
    elif parsed.command == "compare":
        compare.run(parsed["compare"], command)
    elif parsed.command == "diagnose":
        diagnose.run(parsed["diagnose"])
    elif parsed.command == "schedule":
        schedule.run(parsed["schedule"])
    elif parsed.command == "plan":
        plan.run(parsed["plan"])
    elif parsed.command == "replay":
        replay.run(parsed["replay"])
    elif parsed.command == "merge":
        merge.run(parsed["merge"])
    else:
        evaluate.run(parsed["eval"])


class _Parser(ArgumentParser):
    """Mistakes in the command line are sentences like all others; true-or-false options may stand alone."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ZOError(f"{' '.join(message.split()).rstrip('.')}; see {self.prog} --help.")

    def let_flags_stand_alone(self) -> None:
        """``--resume`` means ``--resume true``."""
        for action in self._actions:
            if getattr(action, "_typehint", None) is bool:
                action.nargs, action.const = "?", True


def _parser() -> ArgumentParser:
    from zo_opt.cli.plan import PlanConfig
    from zo_opt.cli.schedule import ScheduleConfig
    from zo_opt.comparison.options import OWN, CompareConfig
    from zo_opt.training.config import TrainConfig
    from zo_opt.training.diagnose import EPS_GRID

    parser = _Parser(
        prog="zo-opt", description="Fine-tune language models with forward passes alone.", version=__version__
    )
    commands = parser.add_subcommands(dest="command")
    train = _Parser(
        description="Tune a model, evaluate it before and after, and write a report. Without options: the built-in model and task."
    )
    train.add_argument("--config", action="config", help="a YAML file of options")
    train.add_class_arguments(TrainConfig, None)
    train.let_flags_stand_alone()
    commands.add_subcommand("train", train, help="tune a model on labelled rows")
    compare = _Parser(
        description="Run several methods at one budget, each in a process of its own, and show what they cost and give."
    )
    compare.add_argument("--config", action="config", help="a YAML file of options")
    compare.add_class_arguments(CompareConfig, None)
    compare.add_class_arguments(TrainConfig, None, skip=set(OWN))
    compare.let_flags_stand_alone()
    commands.add_subcommand("compare", compare, help="compare methods on the same data, budget and memory")
    evaluate = _Parser(description="Evaluate the model that a run of zo-opt train made.")
    evaluate.add_argument("run_dir", type=Path, help="the run's output_dir")
    evaluate.add_argument("--eval_file", type=Path | None, help="other rows, with the columns of the run's own")
    evaluate.add_argument("--zero_shot", action="store_true", help="leave the adapter out")
    commands.add_subcommand("eval", evaluate, help="evaluate a run again, or on other rows")
    diagnose = _Parser(
        description="Measure which zo_eps, lr and precision a model and task can bear, without training."
    )
    diagnose.add_argument("--config", action="config", help="a YAML file of options")
    diagnose.add_class_arguments(TrainConfig, None)
    diagnose.add_argument("--queries", type=int, default=48, help="directions, each on an example of its own")
    diagnose.add_argument("--eps_grid", type=list[float], default=list(EPS_GRID), help="values of zo_eps to try")
    diagnose.add_argument(
        "--out", type=Path, default=Path("diagnose.png"), help="the picture; numbers beside it as .json"
    )
    diagnose.let_flags_stand_alone()
    commands.add_subcommand("diagnose", diagnose, help="find zo_eps, lr and precision before training")
    schedule = _Parser(description="Show how many queries each step takes, and what that costs, before training.")
    schedule.add_argument("--config", action="config", help="a YAML file of options")
    schedule.add_class_arguments(ScheduleConfig, None)
    schedule.let_flags_stand_alone()
    commands.add_subcommand("schedule", schedule, help="show query schedules as a table and a picture")
    plan = _Parser(
        description="What each method needs in memory, from the model's config alone, before anything is loaded."
    )
    plan.add_class_arguments(PlanConfig, None)
    plan.let_flags_stand_alone()
    commands.add_subcommand("plan", plan, help="which methods fit in memory, before downloading anything")
    replay = _Parser(
        description="Rebuild the adapter that a run tuned, to the bit, from its base model and its journal."
    )
    replay.add_argument("journal", type=Path, help="the run's output_dir, or the journal in it")
    replay.add_argument("--to", type=Path | None, help="a new directory for the adapter")
    replay.add_argument("--steps", type=int | None, help="the adapter after so many steps; after all if not given")
    replay.add_argument("--device", type=str | None, help="cpu, cuda or auto; the run's if not given")
    replay.add_argument("--inexact", action="store_true", help="accept weights that differ from training's bits")
    commands.add_subcommand("replay", replay, help="rebuild a tuned adapter from its journal")
    merge = _Parser(description="Fold the adapter that a run tuned into its base model, and save a plain model.")
    merge.add_argument("run_dir", type=Path, help="the run's output_dir")
    merge.add_argument("--to", type=Path | None, help="a new directory for the model and its tokenizer")
    merge.add_argument("--as", type=str, default="model", help="model, or lora: the adapter alone in PEFT's format")
    commands.add_subcommand("merge", merge, help="save the tuned model as a plain one, or the adapter as a LoRA")
    return parser


if __name__ == "__main__":
    sys.exit(main())
