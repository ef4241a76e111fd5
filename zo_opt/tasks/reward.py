"""A reward function of the user's own, from a file in the working directory."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from zo_opt.errors import ZOError

SIGNATURE = "reward(predictions: list[str], references: list[list[str]]) -> list[float]"


@dataclass(frozen=True)
class Reward:
    """``reward(predictions, references)`` -> one number a row, the larger the better.

    ``predictions``: what the model wrote (its first line, where the right text has one), or the name of the label it chose.
    ``references``: the right texts of each row, at least one, or the name of the right label.

    Attributes:
        name: "module:function".
        function: the user's.

    >>> length = Reward("mine:length", lambda predictions, references: [-len(p) for p in predictions])
    >>> length(["a", "bcd"], [["a"], ["b"]])
    [-1.0, -3.0]
    """

    name: str
    function: Callable[[list[str], list[list[str]]], Any]

    def __call__(self, predictions: list[str], references: list[list[str]]) -> list[float]:
        """The rewards, one a row.

        Raises:
            ZOError: the function failed, or gave something else than one finite number a row.
        """
        try:
            found = self.function(predictions, references)
        except Exception as error:
            raise ZOError(
                f"{self.name} failed{_place(error)} with {type(error).__name__}: {error}; mend it."
            ) from error
        values = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(values, list | tuple) or not all(isinstance(v, Real) for v in values):
            raise ZOError(f"{self.name} returned {_short(found)}; it must return a list of numbers: {SIGNATURE}.")
        if len(values) != len(predictions):
            raise ZOError(f"{self.name} returned {len(values)} rewards for {len(predictions)} rows; return one a row.")
        for row, value in enumerate(values):
            if not math.isfinite(value):
                raise ZOError(
                    f"{self.name} returned {value} for {predictions[row]!r} (right: {references[row]}); return finite numbers."
                )
        return [float(v) for v in values]

    @staticmethod
    def check_name(name: str, known: Sequence[str]) -> None:
        """Whether a name has the form "module:function".

        Raises:
            ZOError: it has not.
        """
        module, _, function = name.partition(":")
        if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise ZOError(
                f"objective={name!r} is not known; choose one of {', '.join(known)}, or name a function of yours as my_module:reward."
            )

    @classmethod
    def load(cls, name: str) -> Reward:
        """Import the module from the working directory, which runs its code, and take the function.

        Raises:
            ZOError: there is no such module or function, or importing it failed.
        """
        module_name, _, function_name = name.partition(":")
        here = Path.cwd()
        stem = here.joinpath(*module_name.split("."))
        file = next((f for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.is_file()), None)
        if file is None:
            raise ZOError(
                f"objective={name!r}: there is no {module_name.replace('.', '/')}.py in {here}; run where it is."
            )
        sys.path.insert(0, str(here))  # as python -m does; what the module imports later is found too
        try:
            importlib.invalidate_caches()
            module = importlib.import_module(module_name)
        except Exception as error:
            raise ZOError(
                f"{file} cannot be imported{_place(error)} ({type(error).__name__}: {error}); mend it."
            ) from error
        if getattr(module, "__file__", None) is None or Path(str(module.__file__)).resolve() != file.resolve():
            raise ZOError(f"objective={name!r}: {module_name!r} is a package of Python's or installed; rename {file}.")
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ZOError(
                f"{file} has no function {function_name!r}; write {SIGNATURE.replace('reward', function_name, 1)}."
            )
        return cls(name, function)


def _place(error: BaseException) -> str:
    """The line of the user's code where it happened."""
    trace = error.__traceback__
    if isinstance(error, SyntaxError) or trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
