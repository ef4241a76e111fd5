"""The pictures of the concepts: `python docs/pictures.py` draws docs/pictures/*.svg, the same bytes each time.

Nothing in them is measured. Curves come from the package's own schedules; the rest are drawings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from zo_opt.schedules import (
    RunLength,
    adazeta_queries,
    constant_queries,
    cosine_queries,
    for_run,
    linear_queries,
    simulate,
)

TO = Path(__file__).parent / "pictures"
TEAL, ORANGE, GREY, LIGHT = "#1f6f8b", "#b5542b", "#5f6b73", "#dfe9ec"
ROWS = ("#1f6f8b", "#b5542b", "#6a8f3c", "#8a5aa8")


def canvas(width: float, height: float, across: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, across, squeeze=False)[0]


def drawing(axes: Any, width: float, height: float) -> None:
    """Axes without axes."""
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()


def box(
    axes: Any, x: float, y: float, width: float, height: float, text: str, colour: str = LIGHT, **font: Any
) -> None:
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=GREY, linewidth=0.8)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", **{"fontsize": 10, **font})


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.4})


def query() -> Figure:
    """A loss along a direction, two points, the slope."""
    figure, (axes,) = canvas(7, 3.4)
    at = np.linspace(-1.6, 1.9, 200)

    def loss(x: Any) -> Any:
        return 0.35 * (x - 1.1) ** 2 + 0.12 * np.sin(2.2 * x) + 0.5

    axes.plot(at, loss(at), color=GREY, linewidth=2)
    low, high = -0.85, 0.05
    axes.plot([low, high], [loss(low), loss(high)], "o-", color=ORANGE, markersize=8, linewidth=2)
    axes.plot((low + high) / 2, loss((low + high) / 2), "o", color=TEAL, markersize=9)
    axes.annotate(
        r"$\theta$",
        ((low + high) / 2, loss((low + high) / 2)),
        (-16, -14),
        textcoords="offset points",
        color=TEAL,
        fontsize=14,
    )
    axes.annotate(r"$L(\theta - \epsilon z)$", (low, loss(low)), (10, 6), textcoords="offset points", fontsize=12)
    axes.annotate(r"$L(\theta + \epsilon z)$", (high, loss(high)), (10, 6), textcoords="offset points", fontsize=12)
    axes.set(xlabel="along the direction z", ylabel="loss", xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def memory() -> Figure:
    """What stays in memory."""
    figure, panels = canvas(8, 3.2, 2)
    for axes, title, kept in zip(panels, ("backpropagation", "forward passes"), (range(6), (4,)), strict=True):
        drawing(axes, 6, 5)
        axes.set_title(title, fontsize=12)
        for layer in range(6):
            box(axes, 0.05 + layer, 0.3, 0.8, 1.5, "weights", fontsize=7)
            if layer in kept:
                box(axes, 0.05 + layer, 2.2, 0.8, 2.4, "kept", "#f3d9cc", fontsize=8)
        axes.text(
            3,
            1.95,
            "six layers, and the activations that must be kept",
            ha="center",
            va="center",
            fontsize=9,
            color=GREY,
        )
    return figure


def schedules() -> Figure:
    """Queries of each step."""
    figure, (axes,) = canvas(7, 3.2)
    length = RunLength(steps=1000, steps_per_epoch=4)
    named = {
        "constant": constant_queries(4), "AdaZeta": adazeta_queries(max_queries=15), "linear": linear_queries(1, 15),
        "cosine": cosine_queries(1, 15),
    }  # fmt: skip
    for (name, schedule), colour in zip(named.items(), ROWS, strict=True):
        axes.step(range(1000), simulate(for_run(schedule, length), 1000, 4), color=colour, label=name, linewidth=1.8)
    axes.set(xlabel="step", ylabel="queries")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def split_rows() -> Figure:
    """Which rows a query sees."""
    figure, panels = canvas(8, 3, 2)
    for axes, title, split in zip(
        panels,
        ("sequential: 4 queries, 8 forward passes", "split: 4 queries, 2 forward passes"),
        (False, True),
        strict=True,
    ):
        drawing(axes, 6, 5)
        axes.set_title(title, fontsize=11)
        for row in range(4):
            for query in range(4):
                used = query == row if split else True
                face = ROWS[query] if used else "white"
                axes.add_patch(
                    Rectangle((1.2 + query * 1.1, 3.6 - row), 1.0, 0.8, facecolor=face, edgecolor=GREY, linewidth=0.6)
                )
            axes.text(1.0, 4.0 - row, f"rows {row + 1}", ha="right", va="center", fontsize=9)
        for query in range(4):
            axes.text(1.7 + query * 1.1, 0.25, f"$z_{query + 1}$", ha="center", va="center", fontsize=11)
    return figure


def answer() -> Figure:
    """Where adapters act."""
    figure, (axes,) = canvas(9, 2.8)
    words = ["it", "'s", "a", "charming", "journey", ".", "It", "was", "great"]
    drawing(axes, 9, 3.4)
    for i, word in enumerate(words):
        acts = i >= 7
        box(axes, i + 0.05, 0.2, 0.9, 0.6, word, "white", fontsize=9)
        box(axes, i + 0.05, 1.0, 0.9, 0.6, "frozen", fontsize=8)
        box(axes, i + 0.05, 1.8, 0.9, 0.6, "adapted" if acts else "kept", "#f3d9cc" if acts else LIGHT, fontsize=8)
    axes.text(3.5, 2.75, "the prompt: run once, kept", ha="center", fontsize=10, color=TEAL)
    axes.text(8, 2.75, "the answer: run in every query", ha="center", fontsize=10, color=ORANGE)
    return figure


def feedback() -> Figure:
    """The way of the error."""
    figure, (axes,) = canvas(8, 2.6)
    drawing(axes, 8, 3)
    box(axes, 0.2, 1.6, 1.7, 0.9, "adapter\nh")
    box(axes, 3.1, 1.6, 1.9, 0.9, "the frozen layers")
    box(axes, 6.2, 1.6, 1.6, 0.9, "output")
    arrow(axes, (1.95, 2.05), (3.05, 2.05))
    arrow(axes, (5.05, 2.05), (6.15, 2.05))
    box(axes, 3.1, 0.2, 1.9, 0.9, "learned Jacobian", "#f3d9cc")
    axes.annotate("", (5.05, 0.65), (7.0, 1.55), arrowprops={"arrowstyle": "-|>", "color": ORANGE, "linewidth": 1.4})
    axes.annotate("", (1.05, 1.55), (3.05, 0.65), arrowprops={"arrowstyle": "-|>", "color": ORANGE, "linewidth": 1.4})
    axes.text(6.5, 0.75, "error: probabilities\nminus the right answer", fontsize=9, color=ORANGE, va="center")
    axes.text(0.1, 0.75, "gradient of h,\ncorrected by queries", fontsize=9, color=ORANGE, va="center")
    return figure


PICTURES = {
    "query": query, "memory": memory, "schedules": schedules, "split-rows": split_rows, "answer": answer, "feedback": feedback,
}  # fmt: skip


def main() -> None:
    TO.mkdir(exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "zo_opt", "svg.fonttype": "none", "font.family": "sans-serif"}):
        for name, draw in PICTURES.items():
            draw().savefig(TO / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
