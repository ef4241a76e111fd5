"""The journal as a file: lines, checksums, and a reader that finds every change.

Format: lines of ``<JSON> <checksum>``, the checksum 12 hexadecimal digits of SHA-256 over the line and the checksum before it, so that
no line can be changed, lost, repeated or moved unnoticed. The first line describes the optimizer (run seed included, from which with step
and query every direction follows) and has fingerprints of the frozen and the tuned weights at the start. A step is a list, ``[step,
learning rates, coefficients, curvatures, older, lost]``, empty ends left out; ``older`` names earlier steps by number where their
coefficients are those of their own lines. ``{"steps": n, "weights": ...}`` is a fingerprint of the tuned weights after n steps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from zo_opt.errors import ZOError
from zo_opt.journal.header import check_header, numbers, text, whole
from zo_opt.optim import Update
from zo_opt.system.plain_json import parse

FORMAT = "zo_opt.journal/2"
COLUMNS = ("step", "lrs", "coefficients", "curvatures", "older", "lost")
_DIGITS = 12  # of a checksum


@dataclass
class Contents:
    """What a journal holds.

    Attributes:
        header: its first line.
        updates: the steps.
        weights: steps done -> fingerprint of the tuned weights then.
        end: length in bytes of the whole lines read.
        checksum: the last line's.
        damaged: the line at which reading ended because it does not verify; None where all did.
    """

    header: dict[str, Any]
    updates: list[Update] = field(default_factory=list)
    weights: dict[int, str] = field(default_factory=dict)
    end: int = 0
    checksum: str = ""
    damaged: int | None = None

    @property
    def start(self) -> int:
        """The first step."""
        return int(self.header["start"]["step"])

    @property
    def steps(self) -> int:
        """The step after the last."""
        return self.start + len(self.updates)


def read_journal(path: str | Path, steps: int | None = None, *, needed: int | None = None) -> Contents:
    """Read and verify a journal. What follows the last line end is a line that a crash has torn, and is left out.

    Args:
        path: the file.
        steps: read up to this step only; what comes later is not looked at.
        needed: damage after this step ends the reading (``damaged`` says where) instead of being an error.

    Raises:
        ZOError: it is no journal, or damaged: the sentence says in which line, and at which step.
    """
    path = Path(path)
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ZOError(f"journal {path} cannot be read ({error.strerror}); give one written by a run.") from error
    if not lines or not _verified(lines[0], ""):
        raise ZOError(f"{path} is no journal, or its first line is damaged; restore it from a copy.")
    try:
        contents = Contents(parse(lines[0][: -_DIGITS - 1]))
        if contents.header.get("format") != FORMAT:
            raise ZOError(f"{path} has the format {contents.header.get('format')!r}; this version reads {FORMAT!r}.")
        check_header(contents.header)
    except ZOError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # verified, yet not one of ours
        raise ZOError(
            f"{path} is no journal of zo_opt: its first line is of another form; restore it from a copy."
        ) from error
    for number, line in enumerate(lines, 1):
        wanted = steps is None or contents.steps < steps
        if not wanted and not line.startswith(b"{"):
            break
        if not _verified(line, contents.checksum):
            if not wanted:
                break
            if needed is not None and contents.steps >= needed:
                contents.damaged = number
                break
            raise _damaged(path, number, contents.steps)
        if number > 1:
            try:
                _take(contents, parse(line[: -_DIGITS - 1]), path, number)
            except ZOError:
                raise
            except (
                TypeError,
                KeyError,
                IndexError,
                ValueError,
                OverflowError,
            ) as error:  # verified, yet not one of ours
                raise _damaged(path, number, contents.steps) from error
        contents.checksum = line[-_DIGITS:].decode()
        contents.end += len(line) + 1
    else:
        if _verified(torn[:-1], contents.checksum):  # a whole line, and what was its end: not torn but changed
            if needed is not None and contents.steps >= needed:
                contents.damaged = len(lines) + 1
                return contents
            raise _damaged(path, len(lines) + 1, contents.steps)
    return contents


def _take(contents: Contents, content: Any, path: Path, number: int) -> None:
    """One line more."""
    if isinstance(content, dict):
        contents.weights[whole(content["steps"])] = text(content["weights"])
        return
    step, lrs, coefficients, *rest = content
    if whole(step) != contents.steps:
        raise ZOError(f"{path} has a gap: line {number} is step {step}, expected {contents.steps}.")
    curvatures, older, lost = [*rest, (), (), ()][:3]
    named = [(o, contents.updates[o - contents.start].coefficients) if isinstance(o, int) else o for o in older]
    if any(not 0 <= whole(s) <= step for s, _ in named):
        raise ValueError("it refers to a step that is not before it")
    pairs = tuple((s, numbers(c)) for s, c in named)
    found = numbers(coefficients)
    if any(not 0 <= whole(query) < len(found) for query in lost):
        raise ValueError("it has lost a query that there was not")
    update = Update(step, numbers(lrs), found, numbers(curvatures, (0, len(found))), pairs, tuple(lost))
    contents.updates.append(update)


def make_line(content: Any, previous: str) -> tuple[str, bytes]:
    """The checksum and the line."""
    text = json.dumps(content, separators=(",", ":"))
    checksum = _checksum(text.encode(), previous)
    return checksum, f"{text} {checksum}\n".encode()


def _verified(line: bytes, previous: str) -> bool:
    text, space, checksum = line[: -_DIGITS - 1], line[-_DIGITS - 1 : -_DIGITS], line[-_DIGITS:]
    return space == b" " and _checksum(text, previous).encode() == checksum


def _checksum(text: bytes, previous: str) -> str:
    return sha256(previous.encode() + text).hexdigest()[:_DIGITS]


def _damaged(path: Path, number: int, step: int) -> ZOError:
    return ZOError(
        f"{path} is damaged in line {number} (step {step}): a line was changed, lost or moved; restore it from a copy, or replay "
        f"the {step} steps before."
    )
