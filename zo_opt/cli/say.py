"""How a command talks: as it does, not at all (``--quiet``), or to programs (``--json``)."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from rich.console import Console

from zo_opt.record.progress import Reporter


def reporter_of(options: Namespace) -> Reporter:
    """Who says what happens: nobody with ``--quiet``; with ``--json`` to standard error, for the result alone is on standard output.

    Both are taken out of the options.
    """
    quiet, to_programs = (bool(vars(options).pop(name, False)) for name in ("quiet", "json"))
    return _reporter(quiet=quiet, beside=to_programs)


def beside_results(options: Namespace) -> Reporter:
    """Who says what happens in a command whose results come on standard output: standard error, or nobody with ``--quiet``."""
    return _reporter(quiet=options.quiet, beside=True)


def _reporter(*, quiet: bool, beside: bool) -> Reporter:
    if quiet:
        return Reporter(Console(quiet=True))
    return Reporter(Console(stderr=True, highlight=False, soft_wrap=True)) if beside else Reporter()


def print_json(values: dict[str, Any]) -> None:
    """A result, in one line on standard output."""
    sys.stdout.write(json.dumps(values, ensure_ascii=False) + "\n")
