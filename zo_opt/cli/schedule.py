"""``zo-opt schedule``."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import isclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from zo_opt.choices import option_names
from zo_opt.cli.say import print_json, reporter_of
from zo_opt.errors import ZOError
from zo_opt.schedules import SCHEDULES, AdaZetaQueries, QueryMode, QuerySchedule, RunLength, for_run, simulate
from zo_opt.schedules.base import two_sided_cost
from zo_opt.schedules.plot import Course, picture, table
from zo_opt.system.files import write_atomically
from zo_opt.training.options import PositiveFloat, PositiveInt

MAX_STEPS = 1_000_000


@dataclass
class ScheduleConfig:
    """Which schedules to show, over which run.

    Args:
        query_schedule: one or several with commas between: constant, adazeta, linear, cosine, stepwise, budget, variance,
            every-example (split alone), or module:function; their options are --schedule.alpha, --schedule.max_queries and so on.
        steps: optimizer steps of the run.
        steps_per_epoch: steps in an epoch, examples / batch_size rounded up.
        signal_end: what is left of the mean square of projected gradients at the last step, assumed to fall geometrically;
            the variance schedule follows it (in a run, what was measured).
        query_mode: split gets all queries of a step for two forward passes.
        batch_size: examples a step, which bounds the queries in split mode.
        out: the picture, a .png file; a .csv file of all steps goes beside it. If not given: schedule.png here, or
            schedule-2.png and so on where that is taken.
        overwrite: replace files that are there.
        schedule: options of the schedules; each takes those that it has.
    """

    query_schedule: str = "adazeta"
    steps: PositiveInt = 1000
    steps_per_epoch: PositiveInt = 1
    signal_end: PositiveFloat = 0.1
    query_mode: QueryMode = "sequential"
    batch_size: PositiveInt = 16
    out: Path | None = None
    overwrite: bool = False
    schedule: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The schedules asked for, each once."""
        return list(dict.fromkeys(name.strip() for name in self.query_schedule.split(",")))

    @property
    def cost(self) -> tuple[int, int]:
        """Forward passes of a query, and of a step besides: two-sided queries cost two each, or two together where they share the batch."""
        return two_sided_cost(self.query_mode)

    def check(self) -> None:
        """What no schedule checks by itself.

        Raises:
            ZOError: with a sentence on the first mistake.
        """
        if self.steps > MAX_STEPS:
            raise ZOError(f"steps={self.steps} is more than can be shown; give at most {MAX_STEPS}.")
        if self.signal_end > 1:
            raise ZOError(f"signal_end={self.signal_end} is not possible; give a number above 0 and at most 1.")
        for name in self.names:
            if getattr(SCHEDULES.find(name), "needs_split", False) and self.query_mode != "split":
                raise ZOError(f"schedule {name!r} gives each example a direction of its own; add --query_mode split.")

    def courses(self) -> list[Course]:
        """What each schedule asks for over the whole run."""
        signals = [self.signal_end ** (step / max(self.steps - 1, 1)) for step in range(self.steps)]
        courses = []
        for name in self.names:
            schedule = self._schedule(name)
            queries = simulate(schedule, self.steps, self.steps_per_epoch, *self.cost, signals)
            courses.append(Course(name, queries, *self.cost))
        return courses

    def _schedule(self, name: str) -> QuerySchedule:
        kind = SCHEDULES.find(name)
        has = option_names(kind) if isclass(kind) else []
        length = RunLength(self.steps, self.steps_per_epoch, *self.cost)
        schedule = for_run(
            SCHEDULES.make({"name": name} | {k: v for k, v in self.schedule.items() if k in has}), length
        )
        if self.query_mode != "split":
            return schedule
        # A direction needs an example of its own, so the optimizer asks for no more of them than there are.
        return lambda step, epoch, history: min(schedule(step, epoch, history), self.batch_size)

    def notes(self) -> list[str]:
        """What the numbers rest on."""
        epoch = "a step" if self.steps_per_epoch == 1 else f"{self.steps_per_epoch:,} steps"
        if self.query_mode == "split":
            notes = [
                f"an epoch is {epoch}; a step costs 2 forward passes whatever its queries, at most {self.batch_size} (split)"
            ]
        else:
            notes = [f"an epoch is {epoch}; a query costs 2 forward passes"]
        if "adazeta" in self.names and self.schedule.get("beta") == "derived":
            adazeta: Any = self._schedule("adazeta")
            if isinstance(adazeta, AdaZetaQueries):
                epochs = -(-self.steps // self.steps_per_epoch)
                notes.append(f"beta {adazeta.beta:.4f}, derived for {epochs:,} epochs")
        if "variance" in self.names:
            notes.append(
                f"variance: for a mean square of projected gradients that falls to {self.signal_end:g} of its start"
            )
        return notes

    def files(self) -> tuple[Path, Path]:
        """Where the picture and its numbers go; nothing there is replaced unless that was asked for.

        Raises:
            ZOError: not a .png name, or a file is there.
        """
        if self.out is not None:
            if self.out.suffix.lower() != ".png":
                raise ZOError(f"out={self.out} is no picture's name; give one that ends in .png.")
            files = self.out, self.out.with_suffix(".csv")
            for path in files:
                if path.is_dir() or (path.exists() and not self.overwrite):
                    raise ZOError(
                        f"{path} is there already; give another name as --out, or --overwrite to replace a file."
                    )
            return files
        stems = chain(["schedule"], (f"schedule-{number}" for number in count(2)))
        pairs = ((Path(f"{stem}.png"), Path(f"{stem}.csv")) for stem in stems)
        return next(pair for pair in pairs if self.overwrite or not any(path.exists() for path in pair))


def run(options: Namespace, command: str) -> None:
    """Print the table, draw the picture, write all steps beside it."""
    reporter, as_json = reporter_of(options)
    config = ScheduleConfig(**vars(options))
    config.check()
    courses, notes = config.courses(), config.notes()
    image_path, table_path = config.files()
    write_atomically(image_path, picture(courses, notes[0]))
    write_atomically(table_path, table(courses, config.steps_per_epoch))
    reporter.show(summary(courses, config.steps_per_epoch))
    for note in notes:
        reporter.say(note)
    reporter.say(f"picture: {image_path}; every step: {table_path}")
    if as_json:
        spent = {c.name: {"queries": sum(c.queries), "forwards": c.forwards[-1]} for c in courses}
        print_json({"picture": image_path, "table": table_path, "notes": notes, "schedules": spent})


def summary(courses: list[Course], steps_per_epoch: int) -> Table:
    """Queries at steps spread over the run, a column for each schedule; then what each asks for in all."""
    last = len(courses[0].queries) - 1
    shown = sorted({*((last + 1) * tenth // 10 for tenth in range(10)), last})
    columns = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns.add_column("step", justify="right")
    if steps_per_epoch > 1:
        columns.add_column("epoch", justify="right")
    for course in courses:
        columns.add_column(course.name, justify="right")
    epoch = [""] if steps_per_epoch > 1 else []
    for step in shown:
        numbers = [step, step // steps_per_epoch] if epoch else [step]
        columns.add_row(*(f"{n:,}" for n in numbers), *(f"{course.queries[step]:,}" for course in courses))
    columns.add_section()
    columns.add_row("queries", *epoch, *(f"{sum(course.queries):,}" for course in courses))
    columns.add_row("forwards", *epoch, *(f"{course.forwards[-1]:,}" for course in courses))
    return columns


def kinds(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The schedules asked for, whose options the command line takes."""
    asked = ScheduleConfig(query_schedule=values.get("query_schedule", ScheduleConfig.query_schedule)).names
    return {"schedule": [SCHEDULES.find(name) for name in asked]}
