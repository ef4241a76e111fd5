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
    from zo_opt.cli import eval as evaluate
    from zo_opt.cli import train

    if parsed.command == "train":
        train.run(parsed["train"], command)
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
    from zo_opt.training.config import TrainConfig

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
    evaluate = _Parser(description="Evaluate the model that a run of zo-opt train made.")
    evaluate.add_argument("run_dir", type=Path, help="the run's output_dir")
    evaluate.add_argument("--eval_file", type=Path | None, help="other rows, with the columns of the run's own")
    evaluate.add_argument("--zero_shot", action="store_true", help="leave the adapter out")
    commands.add_subcommand("eval", evaluate, help="evaluate a run again, or on other rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())
