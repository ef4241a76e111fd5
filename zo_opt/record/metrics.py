"""metrics.jsonl: a line a step while a run goes on, with all that a resumed run needs to take the step in again."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_opt.optim import StepRecord
from zo_opt.schedules import History
from zo_opt.system.files import GrowingFile
from zo_opt.system.plain_json import is_number

NAME = "metrics.jsonl"
_CHECKSUM = ', "crc32": "'  # of all before it; seconds come after, so that equal runs have equal checksums


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
        values = _finite(step_values(record, lr, history, seconds))
        seconds = values.pop("seconds")
        text = json.dumps(values)[:-1]
        self._file.append(f'{text}{_CHECKSUM}{zlib.crc32(text.encode()):08x}", "seconds": {seconds}}}'.encode())

    def sync(self) -> None:
        """Bring all to the disk."""
        self._file.sync()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


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
        "seconds": round(seconds, 3),
        "projected_grads": list(record.projected_grads),
    }


@dataclass(frozen=True)
class Line:
    """A step's line.

    Attributes:
        values: what it says; null stands for a number that is not finite, except in the loss, which is nan then.
        end: where it ends in the file, in bytes.
        exact: whether it has a checksum and its numbers are whole; not so in runs of earlier versions.
    """

    values: dict[str, Any]
    end: int
    exact: bool = True

    def record(self, forwards_before: int) -> StepRecord:
        """What the optimizer had measured; ``forwards_before``: all forwards up to the step."""
        v = self.values
        grads = tuple(math.nan if g is None else float(g) for g in v["projected_grads"])
        return StepRecord(
            v["step"], v["epoch"], v["loss"], v["queries"], v["dropped"], v["forwards"] - forwards_before, grads
        )


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
            lines.append(Line(values, end, _CHECKSUM.encode() in line))
    return lines


def _verified(line: bytes) -> dict[str, Any] | None:
    try:
        values, checksum = json.loads(line), f"{zlib.crc32(line[: line.rfind(_CHECKSUM.encode())]):08x}"
        if values.pop("crc32", checksum) != checksum:  # runs of earlier versions have none
            return None
        values["seconds"] = float(values["seconds"])
        counts = (values[name] for name in ("step", "epoch", "queries", "dropped", "forwards"))
        numbers = (values["loss"], values["lr"], *values["projected_grads"], values["seconds"])
        whole = all(type(count) is int and count >= 0 for count in counts)
        return _nan(values) if whole and all(is_number(number, null=True) for number in numbers) else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: null stands for it."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {k: plain(v) for k, v in line.items()}


def _nan(line: dict[str, Any]) -> dict[str, Any]:
    if line["loss"] is None:
        line["loss"] = math.nan
    return line
