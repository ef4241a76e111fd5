"""The errors users meet. Each carries one sentence: what was given, what was expected, what to do."""

from __future__ import annotations


class ZOError(ValueError):
    """A mistake in what was given to zo_opt; the command line prints its sentence and exits with code 2."""


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had no finite loss; the trainables hold their last good values."""


class RankError(RuntimeError):
    """Another rank failed, is gone, or no longer has the same weights; the trainables are what they were before the step."""


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, without its full stop, and the next where it ends in a colon; its class's name where it says nothing.

    >>> reason_of(RuntimeError("no room.\\nmore of it")), reason_of(MemoryError()), reason_of(ValueError("field 'a':\\n  no number"))
    ('no room', 'MemoryError', "field 'a': no number")
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    said = lines[0] if not lines[0].endswith(":") else " ".join(lines[:2])
    return said.rstrip(".:")
