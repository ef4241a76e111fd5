"""``zo-opt``: one subcommand a module."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from zo_opt import __version__
from zo_opt.distributed import RankError, launched_rank, world_size
from zo_opt.errors import NonFiniteLossError, ZOError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (training failed, or status of a run that did), 2 (a mistake in what was given), 128 + signal."""
    from zo_opt.training.stop import InterruptedRunError

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    rank = launched_rank()
    who = f"zo-opt (rank {rank})" if rank else "zo-opt"
    try:
        chosen = next((a for a in arguments if not a.startswith("-")), None)
        # Of these two it matters what was given, and what was not is known from their dataclasses.
        defaults = chosen not in ("train", "compare") or any(a.startswith("--print_config") for a in arguments)
        parsed = _parser(chosen).parse_args(arguments or ["--help"], defaults=defaults)
        return _run(parsed, shlex.join(["zo-opt", *arguments]))
    except ZOError as error:
        errors.print(f"{who}: error: {error}", markup=False)
        return 2
    except (NonFiniteLossError, RankError) as error:
        if not rank or isinstance(error, RankError):  # the same on all ranks
            errors.print(f"{who}: training failed: {error}", markup=False)
        return 1
    except InterruptedRunError as stop:
        if not rank:
            errors.print(f"zo-opt: {stop}", markup=False)
        return stop.exit_code
    except KeyboardInterrupt:
        errors.print("zo-opt: interrupted")
        return 130


def _run(parsed: Namespace, command: str) -> int:
    from zo_opt.cli import compare, diagnose, merge, plan, replay, schedule, status, train
    from zo_opt.cli import eval as evaluate

    if world_size() > 1 and parsed.command != "train":
        raise ZOError(f"zo-opt {parsed.command} is one process; start it without torchrun.")
    if parsed.command == "status":
        return status.run(parsed["status"])
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
    return 0


_DEEPEST = 20  # lists and mappings within each other in a file of options


class _Parser(ArgumentParser):
    """Mistakes in the command line are sentences like all others; true-or-false options may stand alone."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ZOError(f"{' '.join(message.split()).rstrip('.')}; see {self.prog} --help.")

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """As in ``jsonargparse``, of YAML without references, nine lines of which would be read as billions, and of bounded depth."""
        import yaml

        depth = 0
        with suppress(yaml.YAMLError):  # which is said below
            for event in yaml.parse(content, Loader=yaml.SafeLoader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if isinstance(event, yaml.AliasEvent):
                    self.error("a file of options has YAML references (*name); write the values out")
                if depth > _DEEPEST:
                    self.error(f"a file of options is nested more than {_DEEPEST} deep; options are not")
        return super().parse_string(content, *args, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As in ``jsonargparse``; a file of options that holds something else is a mistake, too."""
        try:
            return super().parse_args(*args, **kwargs)
        except ZOError:
            raise
        except (ValueError, RecursionError, MemoryError, OverflowError) as error:
            self.error(f"a file of options cannot be read ({type(error).__name__}: {error})")

    def let_flags_stand_alone(self) -> None:
        """``--resume`` means ``--resume true``."""
        for action in self._actions:
            if getattr(action, "_typehint", None) is bool:
                action.nargs, action.const = "?", True


def _parser(chosen: str | None) -> _Parser:
    """The command line, with the options of one command: those of all take half a second."""
    parser = _Parser(
        prog="zo-opt", description="Fine-tune language models with forward passes alone.", version=__version__
    )
    commands = parser.add_subcommands(dest="command")
    for name, (summary, description, add_options) in _COMMANDS.items():
        command = _Parser(description=description)
        if name == chosen:
            add_options(command)
            command.let_flags_stand_alone()
        commands.add_subcommand(name, command, help=summary)
    return parser


def _add_train(parser: ArgumentParser) -> None:
    from zo_opt.training.config import TrainConfig

    _add_file(parser)
    parser.add_class_arguments(TrainConfig, None)


def _add_compare(parser: ArgumentParser) -> None:
    from zo_opt.comparison.options import OWN, CompareConfig
    from zo_opt.training.config import TrainConfig

    _add_file(parser)
    parser.add_class_arguments(CompareConfig, None)
    parser.add_class_arguments(TrainConfig, None, skip=set(OWN))


def _add_eval(parser: ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="the run's output_dir")
    parser.add_argument("--eval_file", type=Path | None, help="other rows, with the columns of the run's own")
    parser.add_argument("--zero_shot", action="store_true", help="leave the adapter out")
    _add_trust(parser)


def _add_diagnose(parser: ArgumentParser) -> None:
    from zo_opt.diagnosis.diagnose import EPS_GRID

    _add_train(parser)
    parser.add_argument("--queries", type=int, default=48, help="directions, each on an example of its own")
    parser.add_argument("--eps_grid", type=list[float], default=list(EPS_GRID), help="values of zo_eps to try")
    parser.add_argument(
        "--out", type=Path, default=Path("diagnose.png"), help="the picture; numbers beside it as .json"
    )


def _add_schedule(parser: ArgumentParser) -> None:
    from zo_opt.cli.schedule import ScheduleConfig

    _add_file(parser)
    parser.add_class_arguments(ScheduleConfig, None)


def _add_plan(parser: ArgumentParser) -> None:
    from zo_opt.cli.plan import PlanConfig

    parser.add_class_arguments(PlanConfig, None)


def _add_status(parser: ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="the output_dir of a run or of a comparison")
    parser.add_argument("--follow", action="store_true", help="go on showing it until it ends")


def _add_replay(parser: ArgumentParser) -> None:
    parser.add_argument("journal", type=Path, help="the run's output_dir, or the journal in it")
    parser.add_argument("--to", type=Path | None, help="a new directory for the adapter")
    parser.add_argument("--steps", type=int | None, help="the adapter after so many steps; after all if not given")
    parser.add_argument("--device", type=str | None, help="cpu, cuda or auto; the run's if not given")
    parser.add_argument("--inexact", action="store_true", help="accept weights that differ from training's bits")
    _add_trust(parser)


def _add_merge(parser: ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="the run's output_dir")
    parser.add_argument("--to", type=Path | None, help="a new directory for the model and its tokenizer")
    parser.add_argument("--as", type=str, default="model", help="model, or lora: the adapter alone in PEFT's format")
    _add_trust(parser)


# name -> what zo-opt --help says, what the command's own --help says, its options
_COMMANDS: dict[str, tuple[str, str, Callable[[ArgumentParser], None]]] = {
    "train": (
        "tune a model on labelled rows",
        "Tune a model, evaluate it before and after, and write a report. Without options: the built-in model and task.",
        _add_train,
    ),
    "compare": (
        "compare methods on the same data, budget and memory",
        "Run several methods at one budget, each in a process of its own, and show what they cost and give.",
        _add_compare,
    ),
    "eval": (
        "evaluate a run again, or on other rows",
        "Evaluate the model that a run of zo-opt train made.",
        _add_eval,
    ),
    "diagnose": (
        "find zo_eps, lr and precision before training",
        "Measure which zo_eps, lr and precision a model and task can bear, without training.",
        _add_diagnose,
    ),
    "schedule": (
        "show query schedules as a table and a picture",
        "Show how many queries each step takes, and what that costs, before training.",
        _add_schedule,
    ),
    "plan": (
        "which methods fit in memory, before downloading anything",
        "What each method needs in memory, from the model's config alone, before anything is loaded.",
        _add_plan,
    ),
    "status": (
        "follow a run from another terminal",
        "Where a run stands, seen from another terminal: progress, losses, checkpoint, journal.",
        _add_status,
    ),
    "replay": (
        "rebuild a tuned adapter from its journal",
        "Rebuild the adapter that a run tuned, to the bit, from its base model and its journal.",
        _add_replay,
    ),
    "merge": (
        "save the tuned model as a plain one, or the adapter as a LoRA",
        "Fold the adapter that a run tuned into its base model, and save a plain model.",
        _add_merge,
    ),
}


def _add_file(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="a YAML file of options")


def _add_trust(parser: ArgumentParser) -> None:
    """What was allowed when the run was made is not taken from its directory, which may be a stranger's."""
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="let the base model's own Python code run, as in training"
    )


if __name__ == "__main__":
    sys.exit(main())
