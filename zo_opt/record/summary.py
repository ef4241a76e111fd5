"""What a run measures: so far, and at its end."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from zo_opt.tasks.evaluation import Evaluation
from zo_opt.tasks.metrics import METRICS


@dataclass
class Progress:
    """What a run has measured so far; saved in every checkpoint."""

    before: dict[str, Any] = field(default_factory=dict)
    train_seconds: float = 0.0
    other_seconds: float = 0.0
    loss: float | None = None  # running mean, for the progress bar
    peak_memory: int = 0  # of everything before training
    train_peak_memory: int = 0
    regression: float | None = None  # accuracy of logistic regression on hidden states
    curve: list[dict[str, Any]] = field(default_factory=list)  # held-out evaluations on the way

    def smooth(self, loss: float) -> float:
        """Update the running mean of the loss with one step's (non-finite ones are skipped)."""
        if isfinite(loss):
            self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        return self.loss if self.loss is not None else loss


@dataclass(frozen=True)
class Summary:
    """What a finished run measured."""

    command: str
    model: str
    task: str
    kind: str
    metric: str
    optimizer: str
    adapter: str
    trainable: int
    trainable_end: int
    lr: float
    before: Evaluation
    after: Evaluation
    train_rows: int
    steps: int
    queries: int
    forwards: int
    forward_depth: float
    prepared_rows: int
    cache_bytes: int
    cache_place: str
    dropped: int
    truncated: int
    train_seconds: float
    other_seconds: float
    peak_memory: int
    train_peak_memory: int
    adapter_bytes: int
    device: str
    precision: str
    batch_size: int
    versions: dict[str, str]
    privacy: str = ""  # the guarantee of a private run
    tokens: int = 0  # token evaluations
    on_answers: bool = False  # a forward is one of the answers, whose prompts were kept
    regression: float | None = None  # accuracy of logistic regression on the frozen model's hidden states
    curve: Sequence[
        Mapping[str, Any]
    ] = ()  # held-out evaluations on the way, the last one's included: step, forwards, value, loss
    kept_step: int | None = None  # whose weights are the run's, where they are not the last ones

    @property
    def how(self) -> str:
        """What a step takes."""
        return "with forward passes alone" if self.queries else "by backpropagation"

    @property
    def gain(self) -> float:
        """Change of the primary metric: in percentage points where it is a share. Of perplexity less is better."""
        return METRICS[self.metric].unit * (self.after.value - self.before.value)

    @property
    def outcome(self) -> str:
        """The primary metric before and after, in words."""
        metric, before, after = METRICS[self.metric], self.before.value, self.after.value
        note = "" if metric.higher_is_better else ", less is better"
        return f"{metric.label} {metric.show(before)} -> {metric.show(after)} ({metric.change(before, after)}{note})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"before": self.before.to_dict(), "after": self.after.to_dict()}


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import version

    packages = ("zo-opt", "torch", "transformers", "tensorly", "numpy", "scikit-learn", "rouge-score")
    return {"python": platform.python_version()} | {p: version(p) for p in packages}
