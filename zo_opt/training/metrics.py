"""metrics.jsonl, one line a step while a run goes on; and TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zo_opt.optim import StepRecord
from zo_opt.schedules import History

NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends steps; a resumed run first drops the lines after its checkpoint.

    Args:
        directory: where metrics.jsonl is.
        keep_steps: lines of steps from this one on are dropped.
    """

    def __init__(self, directory: Path, keep_steps: int) -> None:
        path = directory / NAME
        kept = [line for line in read_metrics(directory) if line["step"] < keep_steps]
        self._file = path.open("w", encoding="utf-8")
        for line in kept:
            self._file.write(json.dumps(_finite(line)) + "\n")
        self._board = _tensorboard(directory)

    def write(self, record: StepRecord, lr: float, history: History, seconds: float) -> None:
        """One step."""
        line = {
            "step": record.step,
            "epoch": record.epoch,
            "loss": record.loss,
            "lr": lr,
            "queries": record.queries,
            "dropped": record.dropped,
            "forwards": history.forwards,
            "seconds": round(seconds, 3),
            "projected_grads": [float(f"{g:.6g}") for g in record.projected_grads],
        }
        self._file.write(json.dumps(_finite(line)) + "\n")
        self._file.flush()
        if self._board is not None:
            for name in ("loss", "lr", "queries", "forwards"):
                self._board.add_scalar(f"train/{name}", line[name], record.step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics (a torn last line of a killed run is left out)."""
    path = directory / NAME
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(_nan(json.loads(line)))
        except json.JSONDecodeError:
            break
    return lines


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


def _tensorboard(directory: Path) -> Any:
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"))
