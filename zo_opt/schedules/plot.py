"""What query schedules ask for, step by step: as a picture and as a CSV table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")


@dataclass(frozen=True)
class Course:
    """One schedule over one run.

    Attributes:
        name: what the legend and the table call it.
        queries: of each step.
        forwards_per_query, forwards_per_step: what queries cost, in forward passes.
    """

    name: str
    queries: Sequence[int]
    forwards_per_query: int = 2
    forwards_per_step: int = 0

    @property
    def forwards(self) -> list[int]:
        """Forward passes spent by the end of each step.

        >>> Course("constant", [3, 3]).forwards
        [6, 12]
        """
        return list(accumulate(self.forwards_per_step + self.forwards_per_query * count for count in self.queries))


def table(courses: Sequence[Course], steps_per_epoch: int) -> bytes:
    """CSV, a row for each schedule and step: its queries, and the forward passes spent by its end."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["query_schedule", "step", "epoch", "queries", "forwards"])
    for course in courses:
        for step, row in enumerate(zip(course.queries, course.forwards, strict=True)):
            writer.writerow([course.name, step, step // steps_per_epoch, *row])
    return text.getvalue().encode()


def picture(courses: Sequence[Course], caption: str) -> bytes:
    """PNG: queries a step on the left, forward passes spent on the right, both against steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(12, 4.6), layout="constrained", dpi=160)
    query_axes, forward_axes = figure.subplots(1, 2)
    for number, course in enumerate(courses):
        # Where schedules coincide, the later, thinner line lies inside the earlier one and both are seen.
        width = 1.8 + 0.5 * (len(courses) - 1 - number)
        style = {"color": COLOURS[number % len(COLOURS)], "linewidth": width, "solid_capstyle": "butt"}
        steps = _changes(course.queries)
        queries = [course.queries[min(step, len(course.queries) - 1)] for step in steps]
        query_axes.plot(steps, queries, drawstyle="steps-post", **style)
        spent = [0, *course.forwards]
        label = f"{course.name}\n{sum(course.queries):,} queries\n{spent[-1]:,} forward passes"
        forward_axes.plot(steps, [spent[step] for step in steps], label=label, **style)
    query_axes.set_ylabel("queries a step")
    query_axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    query_axes.set_ylim(0, 1.08 * max(max(course.queries) for course in courses))
    forward_axes.set_ylabel("forward passes spent")
    forward_axes.set_ylim(bottom=0)
    forward_axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (query_axes, forward_axes):
        axes.set_xlabel("optimizer step")
        axes.set_xlim(0, len(courses[0].queries))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(color="#e2e8f0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    # Outside, because steep and flat schedules together leave no corner free.
    legend = figure.legend(frameon=False, fontsize=9, loc="outside right upper", labelspacing=0.9)
    for handle in legend.get_lines():
        handle.set_linewidth(2.5)
    figure.suptitle(caption, fontsize=11)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _changes(queries: Sequence[int]) -> list[int]:
    """Step 0, every step whose queries differ from those before it, and the run's end: all that a line needs.

    >>> _changes([1, 1, 2, 2])
    [0, 2, 4]
    """
    return [0, *(step for step in range(1, len(queries)) if queries[step] != queries[step - 1]), len(queries)]
