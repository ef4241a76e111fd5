"""What query schedules ask for, step by step: as a picture and as a CSV table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from zo_opt.system.pictures import COLOURS, key, new_figure, styled, to_png


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
    """PNG: queries a step on the left, forward passes spent on the right, both against steps; ``caption``: what the numbers rest on."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    steps = len(courses[0].queries)
    with styled():
        title = f"What {'a query schedule asks' if len(courses) == 1 else 'query schedules ask'} for in {steps:,} steps"
        figure = new_figure(10.5, 4.6, title, caption)
        query_axes, forward_axes = figure.subplots(1, 2)
        for number, course in enumerate(courses):
            # Where schedules coincide, the later, thinner line lies inside the earlier one and both are seen.
            width = 1.8 + 0.4 * (len(courses) - 1 - number)
            style = {"color": COLOURS[number % len(COLOURS)], "linewidth": width, "solid_capstyle": "butt"}
            changes = _changes(course.queries)
            queries = [course.queries[min(step, steps - 1)] for step in changes]
            query_axes.plot(
                changes,
                queries,
                drawstyle="steps-post",
                label=f"{course.name}: {sum(course.queries):,} queries",
                **style,
            )
            spent = [0, *course.forwards]
            forward_axes.plot(
                changes, [spent[step] for step in changes], label=f"{course.name}: {spent[-1]:,} passes", **style
            )
        for axes, what in ((query_axes, "queries a step"), (forward_axes, "forward passes spent")):
            axes.set_ylabel(what)
            axes.set_xlabel("optimizer step")
            axes.set_xlim(0, steps)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            key(axes, 2)
        query_axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        query_axes.set_ylim(0, 1.08 * max(max(course.queries) for course in courses))
        forward_axes.set_ylim(bottom=0)
        forward_axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        return to_png(figure)


def _changes(queries: Sequence[int]) -> list[int]:
    """Step 0, every step whose queries differ from those before it, and the run's end: all that a line needs.

    >>> _changes([1, 1, 2, 2])
    [0, 2, 4]
    """
    return [0, *(step for step in range(1, len(queries)) if queries[step] != queries[step - 1]), len(queries)]
