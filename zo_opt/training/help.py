"""How options are shown: types and defaults in words, and the names of what can be chosen. Needs no torch, so that help is quick."""

from __future__ import annotations

import ast
import re
from argparse import Action
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import DefaultHelpFormatter

EXIT_CODES = (
    "Exit codes: 0 done; 1 it was tried and failed (training without a finite loss, status of a run that stopped); "
    "2 a mistake in what was given, said in one sentence; 130 and 143 stopped by Ctrl-C and SIGTERM."
)
_ZO_OPT = Path(__file__).parent.parent
# The modules whose tables say what there is of a part: their names are read from the source, for importing them takes torch.
_TABLES = {
    "adapter": "adapters/__init__.py", "optimizer": "optim/__init__.py", "estimator": "estimators/__init__.py",
    "directions": "directions/__init__.py", "schedule": "schedules/__init__.py", "update_rule": "optim/update_rules.py",
    "step_control": "optim/step_control.py",
}  # fmt: skip


def part_names(part: str) -> list[str]:
    """The names in a part's table.

    >>> part_names("update_rule")
    ['sgd', 'adam', 'sign', 'momentum', 'amsgrad']
    """
    tree = ast.parse((_ZO_OPT / _TABLES[part]).read_text(encoding="utf-8"))
    tables = (node for node in ast.walk(tree) if isinstance(node, ast.Dict) and node.keys)
    names = [[key.value for key in table.keys if isinstance(key, ast.Constant)] for table in tables]
    return [str(name) for name in max(names, key=len)]


class HelpFormatter(DefaultHelpFormatter):
    """What a value may be and what it is if it is not given, in words behind an option's help; a part as it is typed: ``--adapter NAME``."""

    def _format_action_invocation(self, action: Action) -> str:
        return super()._format_action_invocation(action).replace(".name NAME", " NAME")

    def _get_help_string(self, action: Action) -> str:
        said = re.sub(r":\w+:`~?([\w.]+)`|``(.*?)``", lambda m: m[1] or m[2], action.help or "").replace(
            "[choice] ", ""
        )
        hint = getattr(action, "_typehint", None) or action.type
        if action.dest in ("help", "version") or hint is None:
            return said
        kind = _without_null(hint)
        # Choices without null stand behind the option's name.
        notes = [in_words(kind)] if kind not in (bool, str, Path, Any) and get_origin(hint) is not Literal else []
        if action.option_strings and action.default is not None:
            notes.append(
                f"default: {str(action.default).lower() if isinstance(action.default, bool) else action.default}"
            )
        return f"{said} ({'; '.join(notes)})" if notes else said


def _without_null(hint: Any) -> Any:
    """What an option's value is where there is one."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    return Union[tuple(kind for kind in get_args(hint) if kind is not NoneType)]  # noqa: UP007 - made here


def in_words(hint: Any) -> str:
    """What an option of a type can be.

    >>> in_words(Literal["lm", "classification"] | None), in_words(list[int])
    ('lm, classification or null', 'a list such as [a whole number]')
    """
    words = _words(hint)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _words(hint: Any) -> list[str]:
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return [word for one in inner for word in _words(one)]
    if kind is Literal:
        return [str(one) for one in inner]
    if kind in (list, Sequence):
        return [f"a list such as [{in_words(inner[0])}]"]
    if kind in (dict, Mapping):
        return ["a mapping such as {name: value}"]
    known = {
        "PositiveInt": "a whole number of at least 1", "NonNegativeInt": "a whole number of at least 0",
        "PositiveFloat": "a number above 0", "NonNegativeFloat": "a number of at least 0",
        "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "Path": "a path", "NoneType": "null",
    }  # fmt: skip
    return [known.get(getattr(hint, "__name__", ""), str(hint))]
