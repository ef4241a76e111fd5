"""How a command talks: as it does, not at all (``--quiet``), or to programs (``--json``)."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from rich.console import Console

from zo_opt.record.progress import Reporter
from zo_opt.system.plain_json import without_nan


def reporter_of(options: Namespace, *, beside: bool = False) -> tuple[Reporter, bool]:
    """Who says what happens, and whether the result is to be JSON on standard output, where it is alone: all else goes to standard error.

    Both options are taken out.

    Args:
        options: ``quiet``: nobody says anything; ``json``: for programs.
        beside: results come on standard output anyway.
    """
    quiet, as_json = (bool(vars(options).pop(name, False)) for name in ("quiet", "json"))
    if quiet:
        return Reporter(Console(quiet=True)), as_json
    if beside or as_json:
        return Reporter(Console(stderr=True, highlight=False, soft_wrap=True)), as_json
    return Reporter(), as_json


def print_json(values: dict[str, Any]) -> None:
    """A result, in one line on standard output; null where a number is not finite."""
    sys.stdout.write(json.dumps(without_nan(values), ensure_ascii=False) + "\n")
    sys.stdout.flush()
