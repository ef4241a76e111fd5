"""One style for all pictures: colours, type, grid, a title that says what is seen and a line under it that says of what."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, PINK, AMBER, SKY, BLACK = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d",
)  # fmt: skip
COLOURS = (BLUE, VERMILION, GREEN, PINK, AMBER, SKY, BLACK)
INK, FAINT, PALE = "#1f2933", "#7b8794", "#cbd2d9"
DPI = 160
_STYLE: Any = {
    "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.axisbelow": True, "axes.grid": True, "grid.color": "#e4e7eb", "grid.linewidth": 0.8,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.major.size": 3,
    "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": 9, "lines.solid_capstyle": "round",
    "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.08,
}  # fmt: skip
_TITLE, _LINE, _MARGIN = 13.5, 9.5, 0.14  # points, points, inches


def styled() -> AbstractContextManager[None]:
    """Everything that is drawn within has the style."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


def new_figure(width: float, height: float, title: str, below: str = "") -> Any:
    """A figure in inches with its title, left-aligned, and a line in grey under it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    lines = below.count("\n") + 1 if below else 0
    top = (_TITLE * 1.5 + lines * _LINE * 1.45) / 72 + 2 * _MARGIN
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1, 1 - (top - 0.08) / height))
    left = _MARGIN / width
    figure.text(left, 1 - _MARGIN / height, title, fontsize=_TITLE, fontweight="bold", va="top")
    under = 1 - (_MARGIN + _TITLE * 1.55 / 72) / height
    figure.text(left, under, below, fontsize=_LINE, color=FAINT, va="top", linespacing=1.35)
    return figure


def key(axes: Any, columns: int = 4, handles: Any = None) -> None:
    """What is what, in lines above the axes: the whole of them is left to the data, and their width as it is."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    legend = axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.6,
        columnspacing=1.4, handletextpad=0.5, borderpad=0.1,
    )  # fmt: skip
    legend.set_in_layout(False)
    axes.set_title("\n".join([" "] * -(-len(handles) // columns)))  # keeps the room


def to_png(figure: Any) -> bytes:
    """The picture's bytes."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
