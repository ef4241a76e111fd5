"""metrics.jsonl: a line a step while a run goes on, with all that a resumed run needs to take the step in again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_opt.optim import StepRecord
from zo_opt.schedules import History
from zo_opt.system.checksum import checksum
from zo_opt.system.files import GrowingFile
from zo_opt.system.plain_json import is_number

NAME = "metrics.jsonl"
_CHECKSUM = b', "checksum": "'  # of all before it; seconds come after, so that equal runs have equal checksums
_COUNTS, _NUMBERS = ("step", "epoch", "queries", "dropped", "forwards", "tokens"), ("loss", "lr", "seconds")


class MetricsWriter:
    """Appends steps, each in one write; a resumed run first cuts off the lines of steps that it does again.

    Args:
        directory: where metrics.jsonl is.
        keep_steps: lines of steps from this one on are cut off.

    Raises:
        ZOError: the file cannot be written.
    """

    def __init__(self, directory: Path, keep_steps: int) -> None:
        kept = [line.end for line in read_lines(directory) if line.values["step"] < keep_steps]
        self._file = GrowingFile(directory / NAME, max(kept, default=0))

    def write(self, record: StepRecord, lr: float, history: History, seconds: float) -> None:
        """One step."""
        values = step_values(record, lr, history, seconds)
        seconds = values.pop("seconds")
        self._file.append(make_line({name: _finite(value) for name, value in values.items()}, seconds))

    def write_evaluation(self, point: dict[str, Any]) -> None:
        """An evaluation on the way: a line under the name ``held_out``, which is no step's."""
        text = json.dumps({"held_out": point}).encode()[:-1]
        self._file.append(text + _CHECKSUM + f'{checksum([text])}"}}'.encode())

    def sync(self) -> None:
        """Bring all to the disk."""
        self._file.sync()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def make_line(values: dict[str, Any], seconds: float) -> bytes:
    """A step's line, without its end."""
    text = json.dumps(values).encode()[:-1]
    return text + _CHECKSUM + f'{checksum([text])}", "seconds": {seconds}}}'.encode()


def step_values(record: StepRecord, lr: float, history: History, seconds: float) -> dict[str, Any]:
    """What is said of a step; ``history``: with the step in it."""
    return {
        "step": record.step,
        "epoch": record.epoch,
        "loss": record.loss,
        "lr": lr,
        "queries": record.queries,
        "dropped": record.dropped,
        "forwards": history.forwards,
        "tokens": history.tokens,
        "seconds": round(seconds, 3),
        "projected_grads": list(record.projected_grads),
    }


@dataclass(frozen=True)
class Line:
    """A step's line.

    Attributes:
        values: what it says; null stands for a number that is not finite, except in the loss, which is nan then.
        end: where it ends in the file, in bytes.
    """

    values: dict[str, Any]
    end: int

    def record(self, before: History) -> StepRecord:
        """What the optimizer had measured; ``before``: all that was spent up to the step."""
        v = self.values
        grads = tuple(math.nan if g is None else float(g) for g in v["projected_grads"])
        return StepRecord(
            v["step"], v["epoch"], v["loss"], v["queries"], v["dropped"], v["forwards"] - before.forwards, grads,
            v["tokens"] - before.tokens,
        )  # fmt: skip


class Tail:
    """A run's metrics while they grow: each ``read`` gives what is new."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._end = directory, 0

    @property
    def was_cut(self) -> bool:
        """Whether lines that were read are gone, as where a run was resumed: begin anew."""
        path = self.directory / NAME
        return (path.stat().st_size if path.is_file() else 0) < self._end

    def read(self) -> list[dict[str, Any]]:
        """What the whole lines say that came since the last time."""
        lines = read_lines(self.directory, self._end)
        self._end = lines[-1].end if lines else self._end
        return [line.values for line in lines]


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """What the whole lines of a run's metrics say."""
    return [line.values for line in read_lines(directory)]


def read_lines(directory: Path, start: int = 0) -> list[Line]:
    """The lines of a run's metrics that are whole, from a byte on: torn ones are left out, and those that fail their checksum."""
    path = directory / NAME
    if not path.is_file():
        return []
    lines, end = [], start
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    for line in content.split(b"\n")[:-1]:
        end += len(line) + 1
        if (values := _verified(line)) is not None:
            lines.append(Line(values, end))
    return lines


def _verified(line: bytes) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(line)
        if values.pop("checksum") != checksum([line[: line.rfind(_CHECKSUM)]]):
            return None
        values["seconds"] = float(values["seconds"])
        whole = all(type(values[name]) is int and values[name] >= 0 for name in _COUNTS)
        numbers = (*(values[name] for name in _NUMBERS), *values["projected_grads"])
        if not whole or not all(is_number(number, null=True) for number in numbers):
            return None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    if values["loss"] is None:
        values["loss"] = math.nan
    return values


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
