"""A run seen on its held-out rows while it trains: the curve, the best weights, and when to end early.

What is kept as best was chosen on the rows that it is measured on: the report says among how many.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from zo_opt.record import checkpoint
from zo_opt.record.progress import Reporter
from zo_opt.tasks.evaluation import Evaluation, evaluate
from zo_opt.tasks.metrics import METRICS
from zo_opt.training.config import TrainConfig
from zo_opt.training.setup import Tools

BEST_NAME = "best.safetensors"  # the weights of the best point so far: with the checkpoint, what a run goes on from


class Curve:
    """The held-out evaluations of a run.

    Args:
        config: the run's options.
        tools: its model and rows.
        points: those so far, oldest first; grows.
        output_dir: of the run.
        reporter: told each of them.
    """

    def __init__(
        self, config: TrainConfig, tools: Tools, points: list[dict[str, Any]], output_dir: Path, reporter: Reporter
    ) -> None:
        self.points, self._config, self._tools = points, config, tools
        self._path, self._reporter = output_dir / BEST_NAME, reporter

    def due(self, step: int) -> bool:
        """Whether the run is to be evaluated after so many steps and was not; its end is evaluated anyway."""
        every = self._config.eval_steps
        seen = bool(self.points) and self.points[-1]["step"] >= step
        return every is not None and 0 < step < self._tools.steps and step % every == 0 and not seen

    def measure(self, step: int, forwards: int) -> Evaluation:
        """Evaluate after a step, and keep the weights if they are the best so far."""
        found = evaluate(self._tools.model, self._tools.held_out, self._config.eval_batch_size)
        self._reporter.say(f"after step {step}: {found.describe()}")
        self.add(found, step, forwards)
        if self._config.keeps_best and self.best is self.points[-1]:
            checkpoint.save_weights(self._path, self._tools.model)
        return found

    def add(self, found: Evaluation, step: int, forwards: int) -> None:
        """One more point, unless there is one of this step."""
        if not self.points or self.points[-1]["step"] < step:
            plain = found.to_dict()
            point = {"step": step, "forwards": forwards, "metric": found.primary}
            self.points.append(point | {"value": plain[found.primary], "loss": plain["loss"]})

    @property
    def best(self) -> dict[str, Any] | None:
        """The best point by the task's primary metric, of equal ones that of the least loss, of those the first."""
        return max(self.points, key=_goodness) if self.points else None

    @property
    def exhausted(self) -> bool:
        """Whether as many evaluations as ``patience`` allows have brought nothing better."""
        best, patience = self.best, self._config.patience
        return patience is not None and best is not None and len(self.points) - 1 - self.points.index(best) >= patience

    def restore_best(self, step: int) -> int:
        """Put the best weights back, if those after ``step`` are not; returns the step whose weights there are."""
        best = self.best
        if not self._config.keeps_best or best is None or best["step"] == step:
            return step
        checkpoint.load_weights(self._path, self._tools.model)
        metric = METRICS[best["metric"]]
        self._reporter.say(
            f"the weights after step {best['step']} were the best of {len(self.points)} ({metric.label} {metric.show(best['value'])}) and "
            "are kept; chosen on these rows, their figure flatters them."
        )
        return int(best["step"])


def _goodness(point: dict[str, Any]) -> tuple[float, float]:
    value, loss = point["value"], point["loss"]
    if value is not None and not METRICS[point["metric"]].higher_is_better:
        value = -value
    return (-math.inf if value is None else value, -math.inf if loss is None else -loss)
