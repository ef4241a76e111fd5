"""``zo-opt completion``: a script with which a shell completes commands and options."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from typing import Literal, get_args, get_origin

from zo_opt.cli.commands import COMMANDS, Command
from zo_opt.errors import ZOError
from zo_opt.training.parsing import add_plain_options
from zo_opt.training.sentences import Parser


def run(options: Namespace, command: str) -> None:
    """Print the script."""
    try:
        import shtab
    except ImportError as error:
        raise ZOError("completion needs shtab; install it with: pip install 'zo-opt[completion]'.") from error
    sys.stdout.write(shtab.complete(_plain_parser(), options.shell) + "\n")


def _plain_parser() -> argparse.ArgumentParser:
    """Commands and their options, as argparse has them; those of parts are known once a part is named, and are left out."""
    parser = argparse.ArgumentParser(prog="zo-opt")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        _add_options(commands.add_parser(name, help=command.summary), command)
    return parser


def _add_options(parser: argparse.ArgumentParser, command: Command) -> None:
    known = Parser()
    command.add(known)
    add_plain_options(known, command.groups, command.skip)
    for option, hint in known.hints().items():
        inner = [hint, *get_args(hint)]
        choices = [str(one) for kind in inner if get_origin(kind) is Literal for one in get_args(kind)]
        if option not in ("run_dir", "journal", "shell"):
            parser.add_argument(f"--{option}", choices=choices or None)
