"""The picture of a diagnosis."""

from __future__ import annotations

from math import isnan
from pathlib import Path

from zo_opt.diagnosis.diagnose import Diagnosis
from zo_opt.record.report import BLUE, GREY, ORANGE, save_picture


def draw(d: Diagnosis, path: Path) -> None:
    """Correlation with exact projected gradients against zo_eps, and the relative error beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=160)
    left, right = figure.subplots(1, 2)
    for form, color in zip(d.forms, (BLUE, GREY), strict=False):
        left.plot(d.eps_grid, form.correlations, "o-", color=color, label=form.precision)
        right.plot(d.eps_grid, form.errors, "o-", color=color, label=form.precision)
    for axes in (left, right):
        axes.axvline(d.zo_eps, color=ORANGE, linestyle="--", linewidth=1.2, label=f"recommended: {d.zo_eps:g}")
        axes.set_xlim(min(d.eps_grid) / 2, max(d.eps_grid) * 2)
        axes.set_xscale("log")
        axes.set_xlabel("zo_eps")
        axes.grid(alpha=0.25)
    left.set_ylim(min(0.0, *(c for f in d.forms for c in f.correlations if not isnan(c))), 1.02)
    left.set_title("correlation with exact projected gradients", loc="left")
    right.set_yscale("log")
    right.set_title("relative error (rounding left, curvature right)", loc="left")
    left.legend(frameon=False)
    figure.suptitle(
        f"{d.queries} directions over {d.trainables:,} trainables; slope {d.slope:.3g}, curvature {d.curvature:.3g}"
    )
    save_picture(figure, path)
