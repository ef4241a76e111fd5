"""Loss against forward passes, loss against seconds, the result against peak memory."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zo_opt.comparison.results import Row
from zo_opt.comparison.runs import Run
from zo_opt.record.report import smooth
from zo_opt.system.files import write_atomically
from zo_opt.tasks.metrics import METRICS
from zo_opt.training.methods import get_method

_MARKERS = "osD^vPX*<>hp8d"


def draw(rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """A curve for each method: the mean over its seeds of the running mean of the training loss. Forward-only methods are solid."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(15, 6.2), layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    by_forwards, by_seconds, by_memory = figure.subplots(1, 3)
    shown = [row for row in rows if row.score is not None]
    colours = _colours(len(shown))
    handles: list[Line2D] = []
    lowest, highest = math.inf, -math.inf
    for i, row in enumerate(shown):
        zeroth = get_method(row.method).zeroth_order
        filled = colours[i] if zeroth else "white"
        look: dict[str, Any] = {"color": colours[i], "linestyle": "-" if zeroth else "--", "linewidth": 1.9}
        curves = [run.steps_done() for run in runs[row.method] if _finished(run)]
        steps = min(map(len, curves))
        losses = np.nanmean([smooth([line["loss"] for line in curve[:steps]]) for curve in curves], axis=0)
        forwards = [line["forwards"] for line in curves[0][:steps]]
        seconds = np.mean([[line["seconds"] for line in curve[:steps]] for curve in curves], axis=0)
        end: dict[str, Any] = {
            "marker": _MARKERS[i % len(_MARKERS)],
            "markevery": [steps - 1],
            "markerfacecolor": filled,
            "markersize": 7,
        }
        handles.append(Line2D([], [], label=row.method, **look, **(end | {"markevery": None})))
        by_forwards.plot(forwards, losses, **look, **end)
        by_seconds.plot(seconds, losses, **look, **end)
        if np.isfinite(losses).any():
            lowest = min(lowest, float(np.nanmin(losses)))
            highest = max(highest, float(losses[np.isfinite(losses)][0]))
        unit = METRICS[row.metric].unit
        assert row.score is not None and row.low is not None and row.high is not None and row.peak_memory is not None
        if not np.isfinite([row.score, row.low, row.high]).all():
            continue
        reach = [[max(unit * (row.score - row.low), 0)], [max(unit * (row.high - row.score), 0)]]
        by_memory.errorbar(
            [row.peak_memory / 2**20], [unit * row.score], yerr=reach,
            marker=_MARKERS[i % len(_MARKERS)], color=colours[i], markersize=8, capsize=3, linewidth=1,
            markerfacecolor=filled, linestyle="none",
        )  # fmt: skip
    if lowest < highest:  # what diverges must not flatten the others
        for axes in (by_forwards, by_seconds):
            axes.set_ylim(lowest - 0.08 * (highest - lowest), highest + 0.1 * (highest - lowest))
    by_forwards.set_xlabel("forward passes (a backward pass counts as two)")
    by_seconds.set_xlabel("seconds of training")
    by_memory.set_xlabel("peak memory while training (MiB)")
    for axes in (by_forwards, by_seconds):
        axes.set_ylabel("training loss, running mean")
    if shown:
        metric = METRICS[shown[0].metric]
        by_memory.set_ylabel(f"{metric.label}{' (%)' if metric.share else ''}, held-out rows")
        if not metric.share and not metric.higher_is_better:
            by_memory.set_yscale("log")
        if shown[0].before is not None and math.isfinite(shown[0].before):
            by_memory.axhline(metric.unit * shown[0].before, color="#a0aec0", linewidth=1, linestyle=":")
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=9, frameon=False, fontsize=9)
    for axes in (by_forwards, by_seconds, by_memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("solid, filled: forward passes alone; dashed, hollow: backpropagation", fontsize=11)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())


def _finished(run: Run) -> bool:
    outcome = run.outcome()
    return outcome is not None and outcome.state == "finished"


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    cycle = [colormaps["tab20"](i) for i in [*range(0, 20, 2), *range(1, 20, 2)]]
    return [cycle[i % len(cycle)] for i in range(count)]
