"""Methods side by side: the result, what it took in memory and time, and the loss against forward passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zo_opt.comparison.results import CONFIDENCE, Row
from zo_opt.comparison.runs import Run
from zo_opt.record.report_picture import smooth
from zo_opt.system.pictures import COLOURS, FAINT, PALE, VERMILION, key, new_figure, styled, to_png
from zo_opt.tasks.metrics import METRICS, Metric
from zo_opt.training.pairings import get_pairing

_MARKERS = "osD^vPX*<>hp8d"


def picture(rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], title: str, below: str) -> bytes:
    """PNG: a line a method, the best first, those that did not finish last and named so; beside them a curve of each one's loss."""
    metric = METRICS[next((row.metric for row in rows if row.score is not None), "accuracy")]
    ordered = sorted(rows, key=lambda row: _place(row, higher=metric.higher_is_better))
    styles = {row.method: _style(row.method, number) for number, row in enumerate(ordered)}
    with styled():
        figure = new_figure(12, max(4.6, 2.0 + 0.3 * len(rows)), title, below)
        result, memory, time, loss = figure.subplots(1, 4, width_ratios=(1.7, 0.8, 0.8, 2.0))
        _draw_results(result, ordered, styles, metric)
        bars = (
            (memory, "peak memory (GiB)", [None if r.peak_memory is None else r.peak_memory / 2**30 for r in ordered]),
            (time, "seconds a step", [row.step_seconds for row in ordered]),
        )
        for axes, what, values in bars:
            _draw_bars(axes, what, values, [styles[row.method]["color"] for row in ordered])
        for axes in (result, memory, time):
            axes.set_ylim(len(ordered) - 0.4, -0.6)
            axes.grid(axis="y", visible=False)
        _draw_losses(loss, ordered, runs, styles)
        return to_png(figure)


def _place(row: Row, *, higher: bool) -> tuple[bool, float]:
    """Where a row stands."""
    missing = row.score is None or math.isnan(row.score)
    score = 0.0 if missing or row.score is None else row.score
    return missing, -score if higher else score


def _style(method: str, number: int) -> dict[str, Any]:
    """Forward-only methods are solid and filled, others dashed and hollow."""
    forward, colour = get_pairing(method).config().zeroth_order, COLOURS[number % len(COLOURS)]
    return {
        "color": colour, "marker": _MARKERS[number % len(_MARKERS)], "markerfacecolor": colour if forward else "white",
        "linestyle": "-" if forward else "--",
    }  # fmt: skip


def _draw_results(axes: Any, rows: Sequence[Row], styles: Mapping[str, dict[str, Any]], metric: Metric) -> None:
    from matplotlib.lines import Line2D

    highest = 0.0
    for place, row in enumerate(rows):
        if (
            row.score is None
            or row.low is None
            or row.high is None
            or not np.isfinite([row.score, row.low, row.high]).all()
        ):
            said = row.state if row.score is None else "no finite result"
            axes.text(0.02, place, said, transform=axes.get_yaxis_transform(), va="center", color=VERMILION)
            continue
        score, low, high = (metric.unit * value for value in (row.score, row.low, row.high))
        highest = max(highest, high)
        style = styles[row.method] | {"linestyle": "none"}
        axes.errorbar(
            [score],
            [place],
            xerr=[[max(score - low, 0)], [max(high - score, 0)]],
            capsize=3,
            linewidth=1.2,
            markersize=8,
            **style,
        )
        note = metric.show(row.score).replace("%", " %")
        axes.text(1.03, place, note, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(styles[row.method]["color"])
    axes.set_xlim(0, 100 if metric.share else 1.1 * highest or 1)
    less = "" if metric.higher_is_better else ", less is better"
    axes.set_xlabel(f"{metric.label}{' (%)' if metric.share else less}, {100 * CONFIDENCE:.0f} % interval")
    before = next((row.before for row in rows if row.before is not None and math.isfinite(row.before)), None)
    if before is not None:
        axes.axvline(metric.unit * before, color=FAINT, linewidth=1.2, linestyle=":", zorder=1)
    plain: dict[str, Any] = {"color": FAINT, "marker": "o", "linestyle": "none", "markersize": 6}
    handles = [
        Line2D([], [], label="forward passes alone", **plain),
        Line2D([], [], label="backpropagation", markerfacecolor="white", **plain),
        Line2D([], [], label="before", color=FAINT, linestyle=":"),
    ]
    key(axes, 3, handles if before is not None else handles[:2])


def _draw_bars(axes: Any, what: str, values: Sequence[float | None], colours: Sequence[str]) -> None:
    for place, (value, colour) in enumerate(zip(values, colours, strict=True)):
        if value is not None:
            axes.barh(place, value, height=0.55, color=colour, alpha=0.75)
            axes.annotate(
                f"{value:.3g}", (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8.5
            )
    axes.set_xlim(0, 1.3 * max((v for v in values if v is not None), default=1.0) or 1)
    axes.set_yticks([])
    axes.spines["left"].set_color(PALE)
    axes.set_xlabel(what)


def _draw_losses(
    axes: Any, rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], styles: Mapping[str, dict[str, Any]]
) -> None:
    """The mean over seeds of the running mean of the training loss, from zero; what diverged is drawn up to its end, which is crossed out."""
    highest = 0.0
    for row in rows:
        forwards, losses = _curve(runs.get(row.method, ()), finished=row.score is not None)
        if not np.isfinite(losses).any():
            continue
        style, last = styles[row.method], int(np.flatnonzero(np.isfinite(losses))[-1])
        end = {} if row.score is not None else {"marker": "x", "markeredgewidth": 2.2}
        axes.plot(forwards, losses, markevery=[last], markersize=7, linewidth=1.8, **(style | end))
        if row.score is not None:
            highest = max(highest, float(losses[np.isfinite(losses)][0]))
    axes.set_ylim(0, 1.15 * highest or None)  # what diverges must not flatten the others
    axes.set_xlim(left=0)
    axes.set_xlabel("forward passes (a backward pass counts as two)")
    axes.set_title(
        "training loss, running mean" + ("; x: it ended there" if any(row.score is None for row in rows) else "")
    )


def _curve(runs: Sequence[Run], *, finished: bool) -> tuple[list[int], Any]:
    """Forward passes and losses after each step: the mean over the runs (that finished, where any did), as long as the shortest."""
    done = [run for run in runs if not finished or ((o := run.outcome()) is not None and o.state == "finished")]
    curves = [curve for run in done if (curve := run.steps_done())]
    if not curves:
        return [], np.array([])
    steps = min(map(len, curves))
    with np.errstate(all="ignore"):
        losses = np.mean([smooth([line["loss"] for line in curve[:steps]]) for curve in curves], axis=0)
    return [line["forwards"] for line in curves[0][:steps]], losses
