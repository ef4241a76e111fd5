"""One rule for the values of a table, whatever its format and whatever the column: a cell is a text, a finite number or a truth value.

A number is read by one spelling: 1, 1.0, "1" and "1.0" are the label 1; true and false are the labels true and false, and no numbers. Everything else
(an empty or blank cell, NaN, infinity, a list, a mapping) is refused in a sentence with the row and the column, and never made a text.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from zo_opt.errors import ZOError

FILL = "fill it or remove the row"  # what is said of a cell that holds nothing
_NOT_A_NUMBER = re.compile(r"[+-]?(nan|inf)", re.IGNORECASE)  # as pandas and numpy write them
_WHOLE = re.compile(r"(-?\d+)\.0+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_UNSEEN = re.compile(r"[\s\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]+")  # space, and what takes no room


def text_of(value: Any, column: str, where: str, remedy: str = FILL) -> str:
    """The text of a cell as it stands, not blank.

    Args:
        value: of the cell.
        column: its column, for the sentence.
        where: its file and row, for the sentence.
        remedy: what to do about a cell that holds nothing.

    Raises:
        ZOError: it is no text.

    >>> text_of(" a film", "text", "my.csv, row 1"), text_of(2.0, "text", "my.csv, row 1"), text_of(True, "text", "my.csv, row 1")
    (' a film', '2', 'true')
    """
    text = plain_text_of(value, column, where, remedy)
    if not text or _UNSEEN.fullmatch(text):
        raise ZOError(f"{where}: column {column!r} is {'blank' if text else 'empty'}; {remedy}.")
    if _NOT_A_NUMBER.fullmatch(text.strip()):
        raise ZOError(_refusal(text, column, where, "which stands for a missing value and is no text"))
    return text


def is_blank(value: Any) -> bool:
    """Whether a cell holds nothing, or what stands for a missing value.

    >>> [is_blank(value) for value in (None, " ", float("nan"), "nan", 0, "a")]
    [True, True, True, True, False, False]
    """
    value = _unwrapped(value)
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas' own
        return True
    return isinstance(value, str | float) and _UNSEEN.sub("", str(value)).lower() in ("", "nan")


def plain_text_of(value: Any, column: str, where: str, remedy: str = FILL) -> str:
    """As :func:`text_of`, of running text, in which a blank line is text too."""
    if value is None:
        raise ZOError(f"{where}: column {column!r} is empty; {remedy}.")
    value = _unwrapped(value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ZOError(_refusal(value, column, where, "of which one character is half a pair")) from None
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Integral):
        return _digits(int(value), column, where)
    if isinstance(value, Real) and math.isfinite(value):
        number = float(value)
        return _digits(int(number), column, where) if number.is_integer() and abs(number) < 1e16 else repr(number)
    raise ZOError(_refusal(value, column, where, f"{_kind(value)} and no text"))


def label_of(value: Any, column: str, where: str) -> str:
    """The name of a label: a cell's text without space around it; whole numbers in one spelling.

    Raises:
        ZOError: the cell holds no label.

    >>> [label_of(value, "label", "my.csv, row 1") for value in (1, 1.0, "1", " 1.0 ", "good ", True)]
    ['1', '1', '1', '1', 'good', 'true']
    """
    return one_spelling(text_of(value, column, where))


def one_spelling(label: str) -> str:
    """A label as it is compared: without space around it; "1.0", as tables of floats have it, is 1."""
    label = label.strip()
    whole = _WHOLE.fullmatch(label)
    return label if whole is None else ("0" if whole[1] == "-0" else whole[1])


def answers_of(value: Any, column: str, where: str) -> tuple[str, ...]:
    """The right texts of a cell: one, or a list of several, of which those that are empty are left out.

    Raises:
        ZOError: there is none, or one is no text.

    >>> answers_of(["one", "", None, "two"], "answer", "my.jsonl, row 1"), answers_of(7, "answer", "my.jsonl, row 1")
    (('one', 'two'), ('7',))
    """
    values = list(value) if isinstance(value, list | tuple) else [value]
    filled = [v for v in values if v is not None and not (isinstance(v, str) and not v.strip())]
    if not filled:
        raise ZOError(f"{where}: column {column!r} holds no text to write; fill it or remove the row.")
    return tuple(text_of(v, column, where).strip() for v in filled)


def name_of(label: str, names: Sequence[str], column: str, where: str) -> str:
    """What a table calls a label that it holds as a number (``ClassLabel``).

    Raises:
        ZOError: it has no such label: -1 stands where nobody gave one.

    >>> name_of("1", ["bad", "good"], "label", "my.parquet, row 1")
    'good'
    """
    if not re.fullmatch(r"-?\d{1,9}", label):
        return label
    if 0 <= int(label) < len(names):
        return one_spelling(names[int(label)])
    raise ZOError(
        f"{where}: column {column!r} holds {label}, and the table names its labels 0 to {len(names) - 1} alone: nobody labelled this row; "
        "remove it."
    )


def check_spellings(found: Mapping[str, str], column: str) -> None:
    """Whether no two labels of a column are one number, one truth value or one word, spelt in two ways.

    Args:
        found: label -> where it stands first.
        column: theirs.

    Raises:
        ZOError: two are.
    """
    numbers: dict[Decimal, str] = {}
    words: dict[str, str] = {}
    for label, where in found.items():
        other = words.setdefault(_UNSEEN.sub(" ", unicodedata.normalize("NFKC", label)).strip().casefold(), label)
        if other != label:
            raise ZOError(_twice(other, found[other], label, where, column, "what reads as one word"))
        if _NUMBER.fullmatch(label) is None:
            continue
        other = numbers.setdefault(Decimal(label), label)
        if other != label:
            raise ZOError(_twice(other, found[other], label, where, column, "one number"))
    for word, number in (("true", "1"), ("false", "0")):
        if word in found and number in found:
            raise ZOError(_twice(word, found[word], number, found[number], column, "one truth value"))


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels sorted: whole numbers by size, then words."""
    return sorted(labels, key=lambda v: (0, int(v), v) if re.fullmatch(r"-?\d{1,18}", v) else (1, 0, v))


def _twice(one: str, one_where: str, other: str, other_where: str, column: str, what: str) -> str:
    return (
        f"{other_where}: column {column!r} holds {_shown(other)}, and {_shown(one)} in {one_where}: two spellings of {what}; write it one way "
        "in all rows."
    )


def _shown(label: str) -> str:
    """A label in which one sees what sets it apart from another: what is composed of several characters, too."""
    return repr(label) if unicodedata.is_normalized("NFKC", label) else ascii(label)


def _unwrapped(value: Any) -> Any:
    """A number of numpy's or torch's as Python's."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _digits(number: int, column: str, where: str) -> str:
    try:
        return str(number)
    except ValueError:  # Python writes no more than 4,300 digits
        raise ZOError(
            f"{where}: column {column!r} holds a number of thousands of digits; write it as a text."
        ) from None


def _refusal(value: Any, column: str, where: str, why: str) -> str:
    shown = ascii(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return f"{where}: column {column!r} holds {shown}, {why}; give a text or a finite number, or name another column."


def _kind(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, Real):
        return "which is not finite"
    if isinstance(value, list | tuple):
        chat = any(isinstance(v, Mapping) and "content" in v for v in value)
        return "a list of messages (a chat)" if chat else "a list"
    return "a mapping" if isinstance(value, Mapping) else f"a value of type {type(value).__name__}"
