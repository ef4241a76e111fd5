"""Loss against forward passes, loss against seconds, the result against peak memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zo_opt.comparison.results import Row
from zo_opt.comparison.runs import Run
from zo_opt.record.report import save_picture, smooth
from zo_opt.tasks.metrics import METRICS
from zo_opt.training.pairings import get_pairing

_MARKERS = "osD^vPX*<>hp8d"


def draw(rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """A curve for each method: the mean over its seeds of the running mean of the training loss. Forward-only methods are solid."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(15, 6.2), layout="constrained", dpi=140)
    by_forwards, by_seconds, by_memory = figure.subplots(1, 3)
    shown = [row for row in rows if row.score is not None]
    colours = [colormaps["tab20"](i) for i in [*range(0, 20, 2), *range(1, 20, 2)]]
    handles: list[Line2D] = []
    lowest, highest = math.inf, -math.inf
    for i, row in enumerate(shown):
        zeroth, colour = get_pairing(row.method).config().zeroth_order, colours[i % len(colours)]
        point: dict[str, Any] = {
            "marker": _MARKERS[i % len(_MARKERS)], "color": colour, "markerfacecolor": colour if zeroth else "white",
        }  # fmt: skip
        line: dict[str, Any] = point | {"linestyle": "-" if zeroth else "--", "linewidth": 1.9, "markersize": 7}
        forwards, seconds, losses = _curve(runs[row.method])
        for axes, spent in ((by_forwards, forwards), (by_seconds, seconds)):
            axes.plot(spent, losses, markevery=[len(losses) - 1], **line)
        handles.append(Line2D([], [], label=row.method, **line))
        if np.isfinite(losses).any():
            lowest = min(lowest, float(np.nanmin(losses)))
            highest = max(highest, float(losses[np.isfinite(losses)][0]))
        assert row.score is not None and row.low is not None and row.high is not None and row.peak_memory is not None
        if np.isfinite([row.score, row.low, row.high]).all():
            unit = METRICS[row.metric].unit
            reach = [[max(unit * (row.score - row.low), 0)], [max(unit * (row.high - row.score), 0)]]
            by_memory.errorbar(
                [row.peak_memory / 2**20], [unit * row.score], yerr=reach, markersize=8, capsize=3, linewidth=1,
                linestyle="none", **point,
            )  # fmt: skip
    for axes, what in (
        (by_forwards, "forward passes (a backward pass counts as two)"),
        (by_seconds, "seconds of training"),
    ):
        axes.set_xlabel(what)
        axes.set_ylabel("training loss, running mean")
        if lowest < highest:  # what diverges must not flatten the others
            axes.set_ylim(lowest - 0.08 * (highest - lowest), highest + 0.1 * (highest - lowest))
    by_memory.set_xlabel("peak memory while training (MiB)")
    if shown:
        metric = METRICS[shown[0].metric]
        by_memory.set_ylabel(f"{metric.label}{' (%)' if metric.share else ''}, rows evaluated on")
        if not metric.share and not metric.higher_is_better:
            by_memory.set_yscale("log")
        if shown[0].before is not None and math.isfinite(shown[0].before):
            by_memory.axhline(metric.unit * shown[0].before, color="#a0aec0", linewidth=1, linestyle=":")
        figure.legend(handles=handles, loc="outside lower center", ncols=9, frameon=False, fontsize=9)
    figure.suptitle("solid, filled: forward passes alone; dashed, hollow: backpropagation", fontsize=11)
    save_picture(figure, path)


def _curve(runs: Sequence[Run]) -> tuple[Any, Any, Any]:
    """Forward passes, seconds and losses after each step: the mean over the runs that finished, as long as the shortest."""
    curves = [run.steps_done() for run in runs if (o := run.outcome()) is not None and o.state == "finished"]
    steps = min(map(len, curves))
    losses = np.nanmean([smooth([line["loss"] for line in curve[:steps]]) for curve in curves], axis=0)
    seconds = np.mean([[line["seconds"] for line in curve[:steps]] for curve in curves], axis=0)
    return [line["forwards"] for line in curves[0][:steps]], seconds, losses
