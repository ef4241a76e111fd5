"""A reward function of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
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
                f"{self.name} failed{place_of(error)} with {type(error).__name__}: {error}; mend it."
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


def place_of(error: BaseException) -> str:
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
