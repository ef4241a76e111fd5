"""JSON from files that may be anybody's: read whole or not at all, with one sentence on what is wrong."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from zo_opt.errors import ZOError

MOST_BYTES = 16 << 20  # of a file that is read as a whole; a configuration has a few kilobytes


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        advice: the end of the error's sentence: what to do.

    Raises:
        ZOError: it is missing or too long, or holds something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
        values = parse(content)
    except OSError as error:
        raise ZOError(f"{path} cannot be read ({error.strerror}); {advice}.") from error
    except ValueError as error:
        raise ZOError(f"{path} is damaged ({error}); {advice}.") from error
    if not isinstance(values, dict):
        raise ZOError(f"{path} is damaged (it holds no JSON object); {advice}.")
    return values


def parse(text: str | bytes) -> Any:
    """Plain values of JSON as its standard has it: no NaN, no name twice in an object, no halves of characters.

    Raises:
        ValueError: it is something else, is nested too deeply, or has a number of thousands of digits.

    >>> parse('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    >>> parse('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the name 'a' twice in an object
    """
    try:
        values = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        # A lone surrogate can be neither printed nor tokenised.
        json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a character (a lone surrogate)") from None
    return values


def is_number(value: Any, *, null: bool = False, most: float = sys.float_info.max) -> bool:
    """Whether a value of JSON is a finite number, of this size at most; ``null``: or the null that stands for what is not finite.

    >>> is_number(2), is_number(True), is_number(10**400), is_number(None), is_number(None, null=True)
    (True, False, False, False, True)
    """
    return (null and value is None) or (type(value) in (int, float) and abs(value) <= most)


def without_nan(value: Any) -> Any:
    """The same values with null for every number that is not finite, which JSON does not have; paths as their text.

    >>> without_nan({"a": [1.0, float("inf")], "b": float("nan")})
    {'a': [1.0, None], 'b': None}
    """
    if isinstance(value, dict):
        return {name: without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def or_nan(value: float | None) -> float:
    """A number as it was before :func:`without_nan`."""
    return math.nan if value is None else value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {name[:80]!r} twice in an object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
