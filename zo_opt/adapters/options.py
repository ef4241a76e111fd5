"""Options of adapters: fields with a help text and a range, checked in one place by their types."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from zo_opt.choices import Range
from zo_opt.errors import ZOError

MOST_SIZE = 1 << 24  # of a rank, bottleneck or number of steps: what an adapter's size follows from is bounded
MOST_NAMES = 10_000  # of modules or layers in a list: each is looked for in the whole model


SIZE, POSITIVE = Range(least=1, most=MOST_SIZE), Range(above=0)
STEPS, SEED = Range(least=0, most=1 << 40), Range(least=0, most=1 << 40)
ANY = Range()


def option(default: Any, text: str, within: Range | None = None, *, kw_only: bool = False) -> Any:
    """A dataclass field with its help, whose numbers lie within a range (by default: whole ones a size, others positive)."""
    return field(default=default, kw_only=kw_only, metadata={"help": text, "range": within})


def check_options(config: Any) -> None:
    """Hold a frozen dataclass's fields to their types and ranges. Lists become tuples, mappings are copied, a name for a list is one of one.

    Raises:
        ZOError: a field does not fit; the sentence says which, and what does.
    """
    hints = get_type_hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, str) and Sequence[str] in (hints[f.name], *get_args(hints[f.name])):
            value = [value]
        if isinstance(value, list | tuple | dict) and len(value) > MOST_NAMES:
            raise ZOError(f"{f.name} has {len(value):,} entries; give at most {MOST_NAMES:,}.")
        check_value(f.name, value, hints[f.name], f.metadata.get("range"))
        if isinstance(value, list | dict):
            object.__setattr__(config, f.name, tuple(value) if isinstance(value, list) else dict(value))


def check_value(name: str, value: Any, hint: Any, within: Range | None = None) -> None:
    """Hold one value to a type and a range.

    Raises:
        ZOError: it does not fit.

    >>> check_value("rank", 1.5, int | None)
    Traceback (most recent call last):
    zo_opt.errors.ZOError: rank=1.5 is not possible; give a whole number from 1 to 16,777,216, or None.
    """
    if not _fits(value, hint, within):
        texts = [_in_words(kind, within) for kind in _kinds(hint)]
        raise ZOError(f"{name}={value!r} is not possible; give {', or '.join(texts)}.")


def check_positive(name: str, value: Any) -> None:
    """Hold a number to be positive and finite.

    Raises:
        ZOError: it is not.
    """
    check_value(name, value, float)


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any, within: Range | None) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, kind, within) for kind in parts)
    if origin is Literal:
        return type(value) is str and value in parts
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_fits(v, parts[0], within) for v in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(type(k) is str and _fits(v, parts[1], within) for k, v in value.items())
    if hint is int:
        return type(value) is int and (within or SIZE).holds(value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value) and (within or POSITIVE).holds(value)
    return hint is Any or isinstance(value, hint)


def _in_words(hint: Any, within: Range | None) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin is Sequence:
        return "a list of names" if parts[0] is str else f"a list, each entry {_in_words(parts[0], within)}"
    if origin is Mapping:
        return f"names, each with {_in_words(parts[1], within)}"
    if hint in (int, float):
        limits = str(within or (SIZE if hint is int else POSITIVE))
        return f"a {'whole ' if hint is int else ''}number {limits}".rstrip()
    return {str: "a text", bool: "true or false", NoneType: "None"}.get(hint, f"a {getattr(hint, '__name__', hint)}")
