"""The run report: report.md in words and numbers, report.png as a picture, results.json for programs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zo_opt.files import write_atomically
from zo_opt.memory import readable
from zo_opt.training.evaluation import Evaluation
from zo_opt.training.metrics import read_metrics

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"


@dataclass(frozen=True)
class Summary:
    """What a finished run measured."""

    command: str
    model: str
    task: str
    optimizer: str
    adapter: str
    trainable: int
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

    @property
    def how(self) -> str:
        """What a step takes."""
        return "with forward passes alone" if self.queries else "by backpropagation"

    @property
    def gain(self) -> float:
        """Accuracy gained, in percentage points."""
        return 100 * (self.after.accuracy - self.before.accuracy)


def write(directory: Path, summary: Summary) -> None:
    """Write results.json, report.md and report.png."""
    write_atomically(directory / "results.json", (json.dumps(asdict(summary), indent=2) + "\n").encode())
    write_atomically(directory / "report.md", markdown(summary).encode())
    draw(read_metrics(directory), summary, directory / "report.png")


def markdown(s: Summary) -> str:
    """The summary as a short page."""
    whole = s.forwards * s.forward_depth + s.prepared_rows / s.batch_size
    cost = f"{s.forwards:,} in training ({s.forwards / s.steps:.3g} a step, batches of {s.batch_size})"
    if not s.queries:
        cost += ", a backward pass counted as two"
    if s.forward_depth < 1:
        cost += f", each through {s.forward_depth:.0%} of the layers, above the cached prefix"
    cost += f"; {whole:,.0f} whole passes in all, with one over {s.prepared_rows:,} rows to cache and place"
    rows = [
        ("accuracy before", f"{s.before.accuracy:.1%} ± {_standard_error(s.before):.1%}"),
        ("accuracy after", f"**{s.after.accuracy:.1%}** ± {_standard_error(s.after):.1%} ({s.gain:+.1f} points)"),
        ("loss before, after", f"{s.before.loss:.3f}, {s.after.loss:.3f}"),
        ("rows", f"{s.train_rows:,} training, {s.after.rows:,} held out"),
        ("trainables", s.adapter),
        (
            "steps, queries",
            f"{s.steps:,}, {s.queries:,}" + (f" ({s.dropped} dropped: loss not finite)" if s.dropped else ""),
        ),
        ("forward passes", cost),
        ("time", f"{s.train_seconds:.0f} s training, {s.other_seconds:.0f} s caching and evaluation"),
        (
            "peak memory",
            f"{readable(s.peak_memory)} on {s.device} ({readable(s.train_peak_memory)} in training), {_cache_share(s)}",
        ),
        ("frozen base", s.precision),
        ("prompts cut to fit", f"{s.truncated}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in s.versions.items())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# {s.optimizer} on {s.task}\n\n{s.model}, tuned {s.how}.\n\n"
        f"![loss and queries against forward passes, accuracy before and after](report.png)\n\n"
        f"| | |\n|---|---|\n{table}\n\n```\n{s.command}\n```\n\n± is one standard error over the held-out rows.\n"
    )


def _cache_share(s: Summary) -> str:
    elsewhere = {"disk": "on disk", "cpu": "in CPU memory"}.get(s.cache_place)
    if elsewhere is None or (s.cache_place == "cpu" and s.device == "cpu"):
        return f"of which {readable(s.cache_bytes)} cached hidden states"
    return f"and {readable(s.cache_bytes)} of cached hidden states {elsewhere}"


def draw(metrics: list[dict[str, Any]], s: Summary, path: Path) -> None:
    """Loss against forward passes, the query schedule under it, accuracy before and after beside them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(3.4, 1), height_ratios=(3, 1))
    loss_axes = figure.add_subplot(grid[0, 0])
    lower_axes = figure.add_subplot(grid[1, 0], sharex=loss_axes)
    accuracy_axes = figure.add_subplot(grid[:, 1])
    forwards = [m["forwards"] for m in metrics]
    losses = [m["loss"] for m in metrics]
    loss_axes.plot(forwards, losses, ".", color=GREY, markersize=3, label="each step")
    loss_axes.plot(forwards, _smooth(losses), color=BLUE, linewidth=2.2, label="running mean")
    loss_axes.axhline(s.before.loss, color=ORANGE, linewidth=1, linestyle="--", label="held out, before")
    loss_axes.axhline(s.after.loss, color=ORANGE, linewidth=1.6, label="held out, after")
    loss_axes.set_ylabel("loss")
    finite = sorted(x for x in losses if math.isfinite(x))
    if finite:  # one outlying batch must not flatten the curve
        top = max(finite[int(0.99 * (len(finite) - 1))], s.before.loss, s.after.loss)
        low = min(finite[0], s.after.loss)
        loss_axes.set_ylim(low - 0.05 * (top - low), top + 0.25 * (top - low))
    loss_axes.legend(frameon=False, ncols=2, fontsize=9)
    loss_axes.tick_params(labelbottom=False)
    below = "queries" if s.queries else "lr"
    lower_axes.step(forwards, [m[below] for m in metrics], color=BLUE, where="pre")
    lower_axes.set_ylim(0, 1.25 * max((m[below] for m in metrics), default=1))
    lower_axes.set_ylabel("queries\na step" if s.queries else "lr")
    lower_axes.set_xlabel("forward passes")
    bars = accuracy_axes.bar(
        ["before", "after"], [100 * s.before.accuracy, 100 * s.after.accuracy], color=[GREY, BLUE], width=0.62,
        yerr=[100 * _standard_error(s.before), 100 * _standard_error(s.after)], capsize=4, ecolor="#4a5568",
    )  # fmt: skip
    accuracy_axes.bar_label(bars, fmt="%.1f %%", padding=4, fontsize=11)
    accuracy_axes.set_ylim(0, 105)
    accuracy_axes.set_ylabel(f"accuracy on {s.after.rows} held-out rows (%)")
    for axes in (loss_axes, lower_axes, accuracy_axes):
        axes.spines[["top", "right"]].set_visible(False)
    name = Path(s.model).name
    figure.suptitle(
        f"{name} on {Path(s.task).name}: {s.gain:+.1f} points in {s.forwards:,} training forward passes, "
        f"{'no backward pass' if s.queries else 'a backward pass counted as two'}",
        fontsize=13,
    )
    figure.savefig(path)


def _smooth(values: list[float]) -> list[float]:
    """Exponential running mean over a tenth of the run, without the bias of its start; non-finite values are skipped."""
    decay = 1 - 1 / max(len(values) / 10, 2)
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        smoothed.append(mean / weight if weight else math.nan)
    return smoothed


def _standard_error(e: Evaluation) -> float:
    return math.sqrt(e.accuracy * (1 - e.accuracy) / e.rows)
