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
        # Choices that cannot be left out stand behind the option's name.
        notes = [] if _kinds(hint)[0] in (bool, str, Path, Any) or get_origin(hint) is Literal else [in_words(hint)]
        if action.option_strings and action.default is not None:
            notes.append(
                f"default: {str(action.default).lower() if isinstance(action.default, bool) else action.default}"
            )
        return f"{said} ({'; '.join(notes)})" if notes else said


def in_words(hint: Any) -> str:
    """What an option of a type can be; that it can be left out is not said.

    >>> in_words(Literal["lm", "classification"] | None), in_words(list[int])
    ('lm or classification', 'a list of whole numbers')
    """
    words = [word for kind in _kinds(hint) for word in _words(kind)]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def advice(hint: Any) -> str:
    """What to give for an option of a type, with examples.

    >>> advice(int | None), advice(list[float])
    ('a whole number, such as 1, 10 or 100', 'a list of numbers, such as [0.001, 0.01, 0.1]')
    """
    kinds = _kinds(hint)
    examples = _examples(kinds[0]) if len(kinds) == 1 else ""
    return in_words(hint) + (f", such as {examples}" if examples else "")


def _kinds(hint: Any) -> list[Any]:
    """The types that a value may be of where there is one."""
    if get_origin(hint) not in (Union, UnionType):
        return [hint]
    return [kind for kind in get_args(hint) if kind is not NoneType]


_NUMBERS = {  # type -> in words, several, examples
    "PositiveInt": ("a whole number of at least 1", "whole numbers", "1, 10 or 100"),
    "NonNegativeInt": ("a whole number of at least 0", "whole numbers", "0, 1 or 100"),
    "PositiveFloat": ("a number above 0", "numbers", "0.001, 0.1 or 1"),
    "NonNegativeFloat": ("a number of at least 0", "numbers", "0, 0.001 or 0.1"),
    "int": ("a whole number", "whole numbers", "1, 10 or 100"),
    "float": ("a number", "numbers", "0.001, 0.1 or 1"),
}  # fmt: skip
_OTHERS = {"bool": "true or false", "str": "a text", "Path": "a path"}


def _words(kind: Any) -> list[str]:
    origin, inner, name = get_origin(kind), get_args(kind), getattr(kind, "__name__", "")
    if origin is Literal:
        return [str(one) for one in inner]
    if origin in (list, Sequence):
        return [f"a list of {_NUMBERS[inner[0].__name__][1]}" if inner[0].__name__ in _NUMBERS else "a list of names"]
    if origin in (dict, Mapping):
        return ["a mapping such as {name: value}"]
    return [_NUMBERS[name][0] if name in _NUMBERS else _OTHERS.get(name, str(kind))]


def _examples(kind: Any) -> str:
    if get_origin(kind) in (list, Sequence):
        return "[1, 10, 100]" if get_args(kind)[0].__name__.endswith(("Int", "int")) else "[0.001, 0.01, 0.1]"
    return _NUMBERS.get(getattr(kind, "__name__", ""), ("", "", ""))[2]
