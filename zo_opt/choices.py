"""A choice by name: tables of what can be chosen, the user's own code among it, and the plain form that files keep.

A *choice* is a name, or a mapping of a name and options (``{"name": "adam", "beta1": 0.5}``), or the thing itself. A name without
a table entry may be ``module:attribute``, the user's own.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from zo_opt.errors import ZOError

T = TypeVar("T")
Choice = str | Mapping[str, Any]


class Table(Mapping[str, Any], Generic[T]):
    """Name -> what it stands for: a class whose fields are its options, or a function that is itself the thing.

    Args:
        part: what is chosen, as an option is called: ``"directions"``.
        kind: the class that everything chosen is of; None: anything that can be called.
        entries: what zo_opt has, by name.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Coin:
    ...     bias: float = 0.5
    >>> coins = Table("coin", Coin, {"fair": Coin})
    >>> coins.make({"name": "fair", "bias": 0.25})
    Coin(bias=0.25)
    >>> coins.plain(Coin(0.25))
    {'name': 'fair', 'bias': 0.25}
    """

    def __init__(self, part: str, kind: type[T] | None, entries: Mapping[str, Any] | None = None) -> None:
        self.part, self.kind = part, kind
        self.entries: dict[str, Any] = dict(entries or {})

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, name: str) -> Any:
        """What a name stands for: an entry, or ``module:attribute``.

        Raises:
            ZOError: there is neither.
        """
        if name in self.entries:
            return self.entries[name]
        if isinstance(name, str) and ":" in name:
            return self._import(name)
        raise ZOError(
            f"{self.part}={name!r} is not known; choose one of {', '.join(self.entries)}, or module:name for your own."
            + did_you_mean(str(name), self.entries)
        )

    def make(self, choice: Choice | T, **defaults: Any) -> T:
        """The thing chosen.

        Args:
            choice: a name, a mapping of ``name`` and options, or the thing itself.
            defaults: values for options that it has and that were not given.

        Raises:
            ZOError: the name or an option is not known, a value is not possible, or the thing is of another kind.
        """
        made: Any = choice
        if not isinstance(choice, str | Mapping):
            right = isinstance(choice, self.kind) if self.kind is not None else callable(choice)
            if inspect.isclass(choice) or not right:
                made = f", made: {choice.__name__}(...)" if inspect.isclass(choice) else ""
                raise ZOError(
                    f"{self.part}={choice!r} is not possible; give one of {', '.join(self.entries)}, or your own{made}."
                )
            return made  # type: ignore[no-any-return]
        name, options = split(self.part, choice)
        found = self.find(name)
        if not inspect.isclass(found):
            if options:
                raise ZOError(f"{self.part} {name!r} is a function and has no option {next(iter(options))!r}.")
            return found  # type: ignore[no-any-return]
        has = option_names(found)
        if unknown := [option for option in options if option not in has]:
            raise ZOError(
                f"{self.part} {name!r} has no option {unknown[0]!r}; it has {', '.join(has) or 'none'}."
                + did_you_mean(unknown[0], has)
            )
        values = {k: v for k, v in defaults.items() if k in has} | options
        try:
            made = found(**values)
        except (TypeError, AttributeError) as error:  # a value of another type than the field's
            raise ZOError(f"the options {values} do not fit {self.part} {name!r}: {error}.") from error
        return made  # type: ignore[no-any-return]

    def name_of(self, thing: Any) -> str:
        """The name of a thing or its class in the table; of the user's own, ``module:attribute``.

        >>> Table("thing", None, {}).name_of(Table)
        'zo_opt.choices:Table'
        """
        kind = thing if inspect.isclass(thing) or inspect.isroutine(thing) else type(thing)
        found = next((name for name, entry in self.entries.items() if entry in (kind, thing)), None)
        return found if found is not None else f"{kind.__module__}:{kind.__qualname__}"

    def plain(self, thing: Any) -> dict[str, Any]:
        """Name and options, as :meth:`make` takes them and JSON keeps them."""
        options = {f.name: getattr(thing, f.name) for f in fields(thing) if f.init} if is_dataclass(thing) else {}
        return {"name": self.name_of(thing)} | {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}

    def _import(self, name: str) -> Any:
        """The user's own; modules in the working directory are found, as with ``python -m``."""
        module, _, attribute = name.partition(":")
        here = str(Path.cwd())
        sys.path.insert(0, here)
        try:
            found = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except Exception as error:  # the user's code may do anything
            raise ZOError(f"{self.part}={name!r} cannot be imported ({type(error).__name__}: {error}).") from error
        finally:
            sys.path.remove(here)
        if self.kind is None:
            right = callable(found)
        else:
            right = issubclass(found, self.kind) if inspect.isclass(found) else isinstance(found, self.kind)
        if not right:
            wanted = f"{self.kind.__name__} and no class of one" if self.kind is not None else "class or function"
            raise ZOError(f"{self.part}={name!r} is no {wanted}; give one of that kind.")
        return found


def split(part: str, choice: Choice) -> tuple[str, dict[str, Any]]:
    """Name and options of a choice in its plain form.

    Raises:
        ZOError: a mapping without a name.
    """
    if isinstance(choice, str):
        return choice, {}
    if not isinstance(choice, Mapping):
        raise ZOError(f'{part}={choice!r} is no choice; give a name, or {{"name": ..., and its options}}.')
    options = dict(choice)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ZOError(f'{part}={dict(choice)} has no name; give {{"name": ..., and its options}}.')
    return name, options


def option_names(kind: Any) -> list[str]:
    """The options of a class or function: its dataclass fields, else its arguments by name."""
    if is_dataclass(kind):
        return [f.name for f in fields(kind) if f.init]
    parameters = inspect.signature(kind).parameters.values()
    return [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a sentence on a name that is not known; empty where nothing is near.

    >>> did_you_mean("adamm", ["adam", "sgd"])
    ' Did you mean adam?'
    """
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


class Range(NamedTuple):
    """The numbers that an option takes."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    whole: bool = False

    def holds(self, number: float) -> bool:
        """Whether a number lies in it."""
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"from {self.least:,} to {self.most:,}"
        limits = ((self.least, "of at least"), (self.above, "above"), (self.most, "of at most"), (self.below, "below"))
        return " and ".join(f"{words} {limit:,}" for limit, words in limits if math.isfinite(limit))


def check_numbers(within: Range, /, **values: Any) -> None:
    """Whether values are finite numbers in a range; those of numpy and torch count.

    Raises:
        ZOError: one is not; the sentence says which, and what is possible.

    >>> check_numbers(Range(least=0, below=1), beta1="0.9")
    Traceback (most recent call last):
    zo_opt.errors.ZOError: beta1='0.9' is not possible; give a number of at least 0 and below 1.
    """
    kind = Integral if within.whole else Real
    for name, value in values.items():
        number: Any = python_number(value)
        right = not isinstance(number, bool) and isinstance(number, kind)
        if not right or not abs(number) <= sys.float_info.max or not within.holds(number):
            raise ZOError(
                f"{name}={value!r} is not possible; give a {'whole ' * within.whole}number {within}".rstrip() + "."
            )


def python_number(value: Any) -> Any:
    """A number of numpy or torch as Python's; anything else as it is."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (RuntimeError, ValueError, TypeError):  # of several
        return value
