"""The journal as a file: lines, checksums, and a reader that finds every change.

Format: lines of ``<JSON> <checksum>``, the checksum over the one before it and the line, so that no line can be changed, lost,
repeated or moved unnoticed. The first line is a :class:`Header`. A step is a list, ``[step, learning rates, coefficients, curvatures,
older, lost]``, empty ends left out; ``older`` names earlier steps by number where their coefficients are those of their own lines.
``{"steps": n, "weights": ...}`` is a fingerprint of the tuned weights after n steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from zo_opt.errors import ZOError
from zo_opt.optim import Update
from zo_opt.system.checksum import checksum, fingerprint
from zo_opt.system.plain_json import parse

FORMAT = "zo_opt.journal/2"
COLUMNS = ("step", "lrs", "coefficients", "curvatures", "older", "lost")
MOST = 1 << 62  # of a step, a seed or a count
MOST_RANK = 4096  # of directions of low rank, whose factors have so many columns
_DIGITS = 12  # of a checksum
# What comes of a line that verifies and is none of ours: checksums find accidents, anybody can write others that fit.
_MALFORMED = (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError)


@dataclass(frozen=True, kw_only=True)
class Header:
    """A journal's first line: the optimizer (run seed included, from which with step and query every direction follows), and the start.

    Attributes:
        format: of the file.
        columns: what the values of a step's line are.
        optimizer: as :func:`~zo_opt.journal.provenance.describe` describes it.
        start: as :func:`~zo_opt.journal.provenance.progress` does.
        frozen: fingerprint of the frozen weights.
        tuned: fingerprint of the weights to be tuned, at the start.
        device: the kind of device that they were on.
        torch: its version.
    """

    format: str = FORMAT
    columns: tuple[str, ...] = COLUMNS
    optimizer: dict[str, Any]
    start: dict[str, Any]
    frozen: str
    tuned: str
    device: str
    torch: str

    def __post_init__(self) -> None:
        _check_plain(vars(self))
        for name in (self.frozen, self.tuned, self.device, self.torch, *self.parameters):
            _string(name)
        for group in self.optimizer["groups"]:
            _number(group["weight_decay"])
        for count in (self.optimizer["seed"], self.start["step"], self.start["updates"]):
            _whole(count)

    @property
    def parameters(self) -> list[str]:
        """The names of all tuned parameters."""
        return [name for group in self.optimizer["groups"] for name in group["parameters"]]

    @property
    def machine(self) -> str:
        """Where it was written, in words."""
        return machine_in_words(self.device, self.torch)


def machine_in_words(device: str, version: str) -> str:
    """A kind of device and a version of torch: where these are the same, so are the bits."""
    return f"{device} with torch {version}"


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

    header: Header
    updates: list[Update] = field(default_factory=list)
    weights: dict[int, str] = field(default_factory=dict)
    end: int = 0
    checksum: str = ""
    damaged: int | None = None

    def differs(self, steps: int, tuned: Mapping[str, Tensor]) -> bool:
        """Whether the tuned weights are others than those on record after so many steps."""
        recorded = self.weights.get(steps)
        return recorded is not None and recorded != fingerprint(tuned)

    @property
    def start(self) -> int:
        """The first step."""
        return int(self.header.start["step"])

    @property
    def steps(self) -> int:
        """The step after the last."""
        return self.start + len(self.updates)

    def take(self, line: bytes) -> None:
        """One line more.

        Raises:
            ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError: it does not verify, or is none of ours.
        """
        if not _is_whole(line, self.checksum):
            raise ValueError("another checksum")
        content = parse(line[: -_DIGITS - 1])
        if isinstance(content, dict):
            self.weights[_whole(content["steps"])] = _string(content["weights"])
        else:
            self.updates.append(self._update(*content))
        self.checksum = line[-_DIGITS:].decode()
        self.end += len(line) + 1

    def _update(
        self, step: Any, lrs: Any, coefficients: Any, curvatures: Any = (), older: Any = (), lost: Any = ()
    ) -> Update:
        if _whole(step) != self.steps:
            raise ValueError("a gap")
        named = [(o, self.updates[o - self.start].coefficients) if isinstance(o, int) else o for o in older]
        if any(not 0 <= _whole(s) <= step for s, _ in named):
            raise ValueError("it refers to a step that is not before it")
        found, curved = _numbers(coefficients), _numbers(curvatures)
        if len(curved) not in (0, len(found)):
            raise ValueError("as many curvatures as coefficients")
        if any(not 0 <= _whole(query) < len(found) for query in lost):
            raise ValueError("it has lost a query that there was not")
        return Update(step, _numbers(lrs), found, curved, tuple((s, _numbers(c)) for s, c in named), tuple(lost))


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
        first, *lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ZOError(f"journal {path} cannot be read ({error.strerror}); give one written by a run.") from error
    contents = _begun(path, first, whole=bool(lines))
    for number, line in enumerate(lines, 2):
        enough = steps is not None and contents.steps >= steps
        if enough and not line.startswith(b"{"):
            break
        if number > len(lines) and not _is_whole(line[:-1], contents.checksum):
            break  # torn; a line that is whole but for its end was not torn but changed
        try:
            contents.take(line)
        except _MALFORMED as error:
            if enough:
                break
            if needed is not None and contents.steps >= needed:
                contents.damaged = number
                break
            raise ZOError(
                f"{path} is damaged in line {number} (step {contents.steps}): a line was changed, lost or moved; restore it from a "
                f"copy, or replay the {contents.steps} steps before."
            ) from error
    return contents


def _begun(path: Path, line: bytes, *, whole: bool) -> Contents:
    """A journal's first line."""
    if not whole or not _is_whole(line, ""):
        raise ZOError(f"{path} is no journal, or its first line is damaged; restore it from a copy.")
    try:
        values = parse(line[: -_DIGITS - 1])
        if (found := values.get("format")) != FORMAT:
            raise ZOError(f"{path} has the format {found!r}; this version reads {FORMAT!r}.")
        return Contents(Header(**values), end=len(line) + 1, checksum=line[-_DIGITS:].decode())
    except ZOError:
        raise
    except _MALFORMED as error:
        raise ZOError(
            f"{path} is no journal of zo_opt: its first line is of another form; restore it from a copy."
        ) from error


def make_line(content: Any, previous: str) -> tuple[str, bytes]:
    """The checksum and the line of a JSON value, or of its text as bytes; ``previous``: the checksum before."""
    text = content if isinstance(content, bytes) else json.dumps(content, separators=(",", ":")).encode()
    found = checksum([previous.encode(), text], _DIGITS)
    return found, text + f" {found}\n".encode()


def _is_whole(line: bytes, previous: str) -> bool:
    return make_line(line[: -_DIGITS - 1], previous)[1] == line + b"\n"


def _check_plain(value: Any, name: str = "") -> None:
    """Whether plain values are such as a replay can bear: numbers finite, ranks that memory can hold."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(inner, key)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_plain(inner, name)
    elif name == "rank" and not 1 <= value <= MOST_RANK:
        raise ValueError("a rank beyond all bounds")
    elif type(value) in (int, float):
        _number(value)


def _whole(value: Any) -> int:
    """A whole number from 0 to MOST."""
    if type(value) is not int or not 0 <= value <= MOST:
        raise ValueError("no whole number")
    return value


def _number(value: Any) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not abs(value) < math.inf:
        raise ValueError("no finite number")
    return float(value)  # an OverflowError for thousands of digits is a number that nobody wrote


def _numbers(values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple):
        raise TypeError("no list of numbers")
    return tuple(map(_number, values))


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value
