"""What a journal's values may be: its checksums find accidents, anybody can write others that fit."""

from __future__ import annotations

import math
from typing import Any

MOST = 1 << 62  # of a step, a seed or a count
MOST_RANK = 4096  # of directions of low rank, whose factors have so many columns


def check_header(header: dict[str, Any]) -> None:
    """Whether a journal's first line has the form that a replay relies on.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OverflowError: it has not.
    """
    optimizer, start = header["optimizer"], header["start"]
    for name in ("frozen", "tuned", "device", "torch"):
        text(header[name])
    for name in ("method", "machine"):
        text(optimizer[name])
    for part in ("directions", "update_rule"):
        text(optimizer[part]["name"])
    if type(optimizer["portable"]) is not bool:
        raise TypeError("no truth value")
    whole(optimizer["seed"])
    for name in ("step", "updates"):
        whole(start[name])
    for settings in (optimizer["options"], optimizer["directions"], optimizer["update_rule"]):
        for name, value in settings.items():
            if type(value) is not bool and not isinstance(value, str):
                number(value)
            if name == "rank" and not 1 <= value <= MOST_RANK:
                raise ValueError("a rank beyond all bounds")
    for group in optimizer["groups"]:
        number(group["weight_decay"])
        if not isinstance(group["parameters"], list):
            raise TypeError("no list of parameters")
        for name in group["parameters"]:
            text(name)


def whole(value: Any) -> int:
    """A whole number from 0 to MOST."""
    if type(value) is not int or not 0 <= value <= MOST:
        raise ValueError("no whole number")
    return value


def number(value: Any) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not abs(value) < math.inf:
        raise ValueError("no finite number")
    return float(value)  # an OverflowError for thousands of digits is a number that nobody wrote


def numbers(values: Any, lengths: tuple[int, ...] | None = None) -> tuple[float, ...]:
    """A list of finite numbers, of one of these lengths if given."""
    if not isinstance(values, list | tuple) or (lengths is not None and len(values) not in lengths):
        raise ValueError("no list of numbers")
    return tuple(v if type(v) is float and math.isfinite(v) else number(v) for v in values)


def text(value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise TypeError("no text")
    return value
