"""The picture of a run: what it learned against what that cost, the queries that it asked for, the metric on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from zo_opt.record.summary import Summary
from zo_opt.system.pictures import BLUE, GREEN, PALE, VERMILION, key, new_figure, styled, to_png
from zo_opt.system.plain_json import or_nan
from zo_opt.tasks.metrics import METRICS


def picture(metrics: Sequence[dict[str, Any]], s: Summary) -> bytes:
    """PNG: loss against forward passes, queries under it, the primary metric beside both.

    Args:
        metrics: what metrics.jsonl says, a mapping a step.
        s: what the run measured.
    """
    from matplotlib.ticker import MaxNLocator

    with styled():
        figure = new_figure(10.5, 5.4, _title(s), _below(s))
        grid = figure.add_gridspec(2, 2, width_ratios=(1.9, 1), height_ratios=(2.8, 1))
        loss = figure.add_subplot(grid[0, 0])
        lower = figure.add_subplot(grid[1, 0], sharex=loss)
        metric = figure.add_subplot(grid[:, 1])
        _draw_loss(loss, metrics, s)
        _draw_steps(lower, metrics, s)
        _draw_metric(metric, s)
        loss.tick_params(labelbottom=False)
        for axes in (lower, metric):
            axes.set_xlabel("forward passes" if s.queries else "forward passes (a backward pass counts as two)")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return to_png(figure)


def _title(s: Summary) -> str:
    metric, before, after = METRICS[s.metric], s.before.value, s.after.value
    return (
        f"{Path(s.task).name}: {metric.label} {metric.show(before)} → {metric.show(after)} "
        f"({metric.change(before, after)})".replace("%", " %")
    )


def _below(s: Summary) -> str:
    kept = "" if s.kept_step is None else f"; the weights after step {s.kept_step:,} were kept"
    passes = "and no backward pass" if s.queries else "a backward pass counted as two"
    return (
        f"{Path(s.model).name} tuned with {s.optimizer}: {_short(s.trainable)} trained numbers, measured on {s.after.on_rows}\n"
        f"{s.steps:,} steps, {s.forwards:,} forward passes {passes}, {s.train_seconds:,.0f} s on {s.device}{kept}"
    )


def _held_out(s: Summary) -> list[tuple[int, float, float]]:
    """Forward passes, value and loss of every evaluation on held-out rows; the last one's weights are what the run gives."""
    points = [(0, s.before.value, s.before.loss)]
    points += [(p["forwards"], or_nan(p["value"]), or_nan(p["loss"])) for p in s.curve]
    return points if s.curve else [*points, (s.forwards, s.after.value, s.after.loss)]


def _draw_loss(axes: Any, metrics: Sequence[dict[str, Any]], s: Summary) -> None:
    forwards, losses = ([m[name] for m in metrics] for name in ("forwards", "loss"))
    axes.plot(forwards, losses, "o", color=PALE, markersize=3, markeredgewidth=0, label="training, each step")
    axes.plot(forwards, smooth(losses), color=BLUE, linewidth=2.2, label="training, running mean")
    seen = _held_out(s)
    axes.plot(
        [x for x, _, _ in seen],
        [y for _, _, y in seen],
        "o",
        linestyle=_joined(s),
        color=VERMILION,
        linewidth=1.4,
        markersize=5,
        label=_rows(s),
    )
    axes.set_ylabel("loss")
    finite = sorted(x for x in losses if math.isfinite(x))
    ends = [y for _, _, y in seen if math.isfinite(y)]
    if finite and ends:  # one outlying batch must not flatten the curve
        top = max(finite[int(0.98 * (len(finite) - 1))], losses[0] if math.isfinite(losses[0]) else 0.0, *ends)
        axes.set_ylim(min(0.0, finite[0]), 1.06 * top)
    axes.set_xlim(-0.015 * s.forwards, 1.015 * s.forwards)
    key(axes)


def _draw_steps(axes: Any, metrics: Sequence[dict[str, Any]], s: Summary) -> None:
    """What each step asked for, over the forward passes that it took."""
    from matplotlib.ticker import MaxNLocator

    name = "queries" if s.queries else "lr"
    values, ends = [m[name] for m in metrics], [0, *(m["forwards"] for m in metrics)]
    wide = [i for i, (a, b) in enumerate(pairwise(ends)) if b > a]  # a dropped step takes none
    if wide:
        heights, edges = [values[i] for i in wide], [ends[wide[0]], *(ends[i + 1] for i in wide)]
        axes.stairs(heights, edges, color=BLUE, fill=True, alpha=0.25)
        axes.stairs(heights, edges, color=BLUE, linewidth=1.4, baseline=None)
    axes.set_ylim(0, 1.2 * max(values, default=1) or 1)
    axes.set_ylabel("queries a step" if s.queries else "learning rate")
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=bool(s.queries)))


def _draw_metric(axes: Any, s: Summary) -> None:
    metric, seen = METRICS[s.metric], _held_out(s)
    values = [y * metric.unit for _, y, _ in seen]
    axes.plot([x for x, _, _ in seen], values, "o", linestyle=_joined(s), color=VERMILION, linewidth=1.4, markersize=5)
    last = s.forwards if s.kept_step is None else _forwards_of(s, s.kept_step)
    for x, found, above in (
        (0, s.before, s.after.value < s.before.value),
        (last, s.after, s.after.value >= s.before.value),
    ):
        y, error = found.value * metric.unit, found.standard_error * metric.unit
        if math.isfinite(y):
            axes.errorbar([x], [y], yerr=[error], fmt="o", color=VERMILION, capsize=4, linewidth=1.4, markersize=8)
            kept = f", step {s.kept_step:,}" if x and s.kept_step is not None else ""
            axes.annotate(
                metric.show(found.value).replace("%", " %") + kept, (x, y + error if above else y - error), xytext=(0, 5 if above else -5),
                textcoords="offset points", ha="right" if x > 0.5 * s.forwards else "left", va="bottom" if above else "top",
                fontsize=11, fontweight="bold",
            )  # fmt: skip
    if s.regression is not None and s.metric == "accuracy":
        level, below = 100 * s.regression, s.after.value >= s.regression
        axes.axhline(level, color=GREEN, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"logistic regression {level:.1f} %", (1.02 * s.forwards, level), xytext=(0, -9 if below else 9),
            textcoords="offset points", ha="right", va="top" if below else "bottom", color=GREEN, fontsize=9,
        )  # fmt: skip
    highest = max((y for y in values if math.isfinite(y)), default=1.0)
    axes.set_ylim(0, 103 if metric.share else 1.2 * highest or 1)
    axes.set_xlim(-0.04 * s.forwards, 1.04 * s.forwards)
    less = "" if metric.higher_is_better else ", less is better"
    axes.set_title(f"{metric.label}{' (%)' if metric.share else less}, ± one standard error")


def _joined(s: Summary) -> str:
    """Between two points with nothing seen between them a line would be made up."""
    return "-" if s.curve else "none"


def _forwards_of(s: Summary, step: int) -> int:
    """The forward passes up to a step that was evaluated."""
    return next((int(p["forwards"]) for p in s.curve if p["step"] == step), s.forwards)


def _rows(s: Summary) -> str:
    return "held-out rows" if s.after.trained_on == 0 else "rows evaluated on"


def _short(number: int) -> str:
    """A count in a few letters.

    >>> _short(512), _short(419_328), _short(134_515_008)
    ('512', '419 K', '135 M')
    """
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential running mean over a tenth of the run, without the bias of its start; non-finite values are skipped."""
    decay = 1 - 1 / max(len(values) / 10, 2)
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        smoothed.append(mean / weight if weight else math.nan)
    return smoothed
