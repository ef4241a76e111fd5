"""``zo-opt``: one subcommand a module."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from zo_opt import __version__
from zo_opt.choices import did_you_mean
from zo_opt.cli.commands import COMMANDS
from zo_opt.errors import NonFiniteLossError, RankError, ZOError, reason_of
from zo_opt.training.options import PARTS
from zo_opt.training.parsing import parse_arguments
from zo_opt.training.sentences import Parser
from zo_opt.training.stop import InterruptedRunError

ROOM = (
    "Give fewer rows at once (--batch_size, --eval_batch_size), shorter ones (--max_length) or a smaller base (--precision bf16, --quantise int8); "
    "zo-opt plan says what a run takes. A run that has a checkpoint goes on with --resume."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (training failed, or status of a run that did), 2 (a mistake in what was given), 128 + signal."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    rank = int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0
    who = f"zo-opt (rank {rank})" if rank else "zo-opt"
    try:
        return _run(arguments)
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
    except (MemoryError, RuntimeError) as error:
        if not _ran_out(error):
            raise
        errors.print(f"{who}: memory ran out ({reason_of(error)}). {ROOM}", markup=False)
        return 1


def _ran_out(error: BaseException) -> bool:
    from zo_opt.queries.copies import out_of_memory  # brings torch, which no help should wait for

    return out_of_memory(error)


def _run(arguments: Sequence[str]) -> int:
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    if chosen is None:
        _overview().parse_args(list(arguments) or ["--help"])
    if chosen is None or chosen not in COMMANDS:
        raise ZOError(
            f"{chosen!r} is no command; choose one of {', '.join(COMMANDS)}.{did_you_mean(str(chosen), COMMANDS)}"
        )
    command, rest = COMMANDS[chosen], list(arguments)
    rest.remove(chosen)

    def parser() -> Parser:
        made = Parser(prog=f"zo-opt {chosen}", description=command.description)
        if command.groups or command.parts:
            made.notes = [
                f"Options of what is chosen by name are shown with it: zo-opt {chosen} {command.naming} --help."
            ]
        command.add(made)
        return made

    print_config = "--print_config" in rest
    rest = [a for a in rest if a != "--print_config"]
    parts = command.parts or (PARTS if command.groups else ())
    values = parse_arguments(rest, parser, command.groups, skip=command.skip, parts=parts, several=command.several)
    if print_config:
        return _print_config(values)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and chosen != "train":
        raise ZOError(f"zo-opt {chosen} is one process; start it without torchrun.")
    run: Any = importlib.import_module(f"zo_opt.cli.{chosen}").run
    code = run(Namespace(**values), shlex.join(["zo-opt", *arguments]))
    return code if isinstance(code, int) else 0


def _print_config(values: dict[str, Any]) -> int:
    """The options given, as a file for ``--config``."""
    import yaml

    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    sys.stdout.write(yaml.safe_dump(plain, sort_keys=False))
    return 0


def _overview() -> Parser:
    """What there is."""
    parser = Parser(
        prog="zo-opt", description="Fine-tune language models with forward passes alone.", version=__version__
    )
    commands = parser.add_subcommands(dest="command", required=False)
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, Parser(description=command.description), help=command.summary)
    return parser


__all__ = ["COMMANDS", "main"]


if __name__ == "__main__":
    sys.exit(main())
