"""The picture of a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from textwrap import fill
from typing import Any

from zo_opt.diagnosis.diagnose import Diagnosis
from zo_opt.diagnosis.trials import best_trial
from zo_opt.system.pictures import BLUE, COLOURS, FAINT, GREEN, VERMILION, key, new_figure, styled, to_png

_BAND = "#e3f4ec"


def picture(d: Diagnosis, about: str) -> bytes:
    """PNG: how well slopes of two losses agree with exact ones at each zo_eps; and, where training was tried, what each lr did to the loss.

    Args:
        d: what was measured.
        about: model, task and method.
    """
    best = best_trial(d.trials)
    title = f"zo_eps {d.zo_eps:g}" + (
        f" and lr {best.lr:g}" if best is not None else ", no lr that learns" if d.trials else ""
    )
    with styled():
        below = f"advised for {about}; {d.queries} directions over {d.trainables:,} trained numbers\n{fill(d.advice[0], 150)}"
        figure = new_figure(10.5, 4.9, title, below)
        axes = figure.subplots(1, 2) if d.trials else [figure.subplots()]
        _draw_zo_eps(axes[0], d)
        if d.trials:
            _draw_trials(axes[1], d)
        return to_png(figure)


def _draw_zo_eps(axes: Any, d: Diagnosis) -> None:
    good = [
        e
        for e, c in zip(d.eps_grid, d.forms[0].correlations, strict=True)
        if c > max(_seen(d.forms[0].correlations)) - 0.05
    ]
    axes.axvspan(min(good) / 1.5, max(good) * 1.5, color=_BAND, zorder=0, linewidth=0)
    for form, colour, order in zip(d.forms, (BLUE, FAINT), (3, 2), strict=False):
        axes.plot(
            d.eps_grid,
            form.correlations,
            "o-",
            color=colour,
            linewidth=1.8,
            markersize=5,
            label=form.precision,
            zorder=order,
        )
    at = d.forms[0].correlations[d.eps_grid.index(d.zo_eps)]
    axes.plot([d.zo_eps], [at], "o", color=VERMILION, markersize=9, label=f"advised: {d.zo_eps:g}", zorder=4)
    axes.set_xscale("log")
    axes.set_xticks(d.eps_grid, [f"{e:g}" for e in d.eps_grid], fontsize=8.5)
    axes.minorticks_off()
    axes.set_xlim(min(d.eps_grid) / 1.7, max(d.eps_grid) * 1.7)
    low = min(0.0, *_seen([c for form in d.forms for c in form.correlations]))
    axes.set_ylim(1.1 * low, 1.04)
    for x, words, side in (
        (0.02, "rounding\ndrowns it", "left"),
        (0.98, "loss too\ncurved", "right"),
    ):
        axes.text(x, 0.04, words, transform=axes.transAxes, ha=side, color=FAINT, fontsize=8.5)
    axes.set_xlabel("zo_eps")
    axes.set_ylabel("correlation with exact slopes")
    key(axes, 3)


def _draw_trials(axes: Any, d: Diagnosis) -> None:
    """The loss on the same rows before and after each trial; what rose beyond the start is cut off at twice the start."""
    best, before = best_trial(d.trials), d.trials[0].before
    top = 1.9 * before
    axes.axhline(before, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.text(
        0.01, before, "before training", transform=axes.get_yaxis_transform(), va="bottom", color=FAINT, fontsize=8.5
    )
    for trial in d.trials:
        colour = VERMILION if trial is best else GREEN if trial.learned else COLOURS[-1]
        shown = min(trial.after, top) if not isnan(trial.after) else top
        axes.plot([trial.lr, trial.lr], [before, shown], color=colour, linewidth=6, alpha=0.35, solid_capstyle="butt")
        axes.plot([trial.lr], [shown], "o" if shown < top else "^", color=colour, markersize=9 if trial is best else 6)
        said = "no finite loss" if isnan(trial.after) else f"{trial.after:.3g}"
        axes.annotate(
            said, (trial.lr, shown), xytext=(0, -9 if shown < before else 8), textcoords="offset points", ha="center",
            va="top" if shown < before else "bottom", fontweight="bold" if trial is best else "normal",
        )  # fmt: skip
    rates = [trial.lr for trial in d.trials]
    axes.set_xscale("log")
    axes.set_xlim(min(rates) / 2.2, max(rates) * 2.2)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_ylim(0, 1.12 * top if any(not t.learned for t in d.trials) else 1.2 * before)
    axes.set_xlabel("lr")
    axes.set_ylabel("loss on training rows")
    axes.set_title(f"tried: {len(d.trials[0].losses)} steps of training with each lr")


def _seen(values: Sequence[float]) -> list[float]:
    return [value for value in values if not isnan(value)]
